package replay

import (
	"slices"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/drive"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
)

// Limit that every account of a replay has.
type Limit struct {
	ID          string
	Meter       usage.Meter
	Window      window.Kind
	Amount      int64
	Tier        usage.Tier
	MaxExposure int64 // tier leased
}

// LimitResult is how a limit was kept, as the clients saw it.
type LimitResult struct {
	Limit
	// Windows of accounts in which the limit was reached, and Over those in which more
	// than the amount was used; OverUnits is by how much in all of them.
	Windows, Over int
	OverUnits     int64
	// Worst is the window that went furthest over.
	Worst WindowUse
	// Broken is a window beyond what the tier states; nil: there is none.
	Broken *WindowUse
}

// WindowUse is what an account used in one window of a limit.
type WindowUse struct {
	Account     string
	Start       usage.Micros // 0: lifetime
	Used, Bound int64
	// CountLatency is the longest time from a call's beginning until it was in the
	// ledger, DecisionLatency from there until the decision was held by another
	// process: the bound of the tier eventual is what is used within both.
	CountLatency, DecisionLatency time.Duration
}

// Latencies of the eventual tier for one account.
type Latencies func(account int) (count, decision time.Duration)

// traffic is what a replay sent and saw.
type traffic struct {
	rows []trace.Row
	of   []RowOf
	seen *drive.Seen
}

// units returns how much of a meter a row uses; false: it is not known.
func units(row *trace.Row, m usage.Meter) (int64, bool) {
	if m == usage.Calls {
		return 1, true
	}
	for _, q := range row.Meters {
		if q.Meter == m {
			return q.Value, true
		}
	}
	return 0, false
}

type cell struct {
	account int32
	window  int64
}

// check looks how a limit was kept. Rows lie in the windows of their own time.
func (t *traffic) check(l Limit, latency Latencies) LimitResult {
	out := LimitResult{Limit: l}
	used, refused := map[cell]int64{}, map[cell]bool{}
	at := func(i int) cell { return cell{t.of[i].Account, l.Window.Number(usage.At(t.rows[i].Time))} }
	for i := range t.rows {
		switch o := t.seen.Outcomes[i]; o {
		case drive.Admitted:
			if v, ok := units(&t.rows[i], l.Meter); ok {
				used[at(i)] += v
			}
		case drive.NotSent, drive.Failed:
		default:
			refused[at(i)] = true
		}
	}
	over := map[int32][]cell{}
	for c, v := range used {
		if v >= l.Amount || refused[c] {
			out.Windows++
		}
		if v > l.Amount {
			out.Over++
			out.OverUnits += v - l.Amount
			over[c.account] = append(over[c.account], c)
		}
	}
	if out.Over == 0 {
		return out
	}
	uses := map[int32][]use{}
	for i := range t.rows {
		if over[t.of[i].Account] != nil && t.seen.Outcomes[i] == drive.Admitted {
			if v, ok := units(&t.rows[i], l.Meter); ok {
				uses[t.of[i].Account] = append(uses[t.of[i].Account], use{t.seen.Sent[i], v})
			}
		}
	}
	for account, cells := range over {
		w := WindowUse{Account: t.rows[slices.IndexFunc(t.of, func(o RowOf) bool { return o.Account == account })].Account}
		w.CountLatency, w.DecisionLatency = latency(int(account))
		switch l.Tier {
		case usage.TierExact:
		case usage.TierLeased:
			w.Bound = l.MaxExposure
		default:
			w.Bound = mostWithin(uses[account], w.CountLatency+w.DecisionLatency)
		}
		for _, c := range cells {
			w.Used, w.Start = used[c], l.Window.Start(c.window)
			if w.Used > out.Worst.Used || w.Used == out.Worst.Used && w.Account < out.Worst.Account {
				out.Worst = w
			}
			if w.Used-l.Amount > w.Bound && (out.Broken == nil || w.Used > out.Broken.Used) {
				broken := w
				out.Broken = &broken
			}
		}
	}
	return out
}

// use is what an admitted call used, and when it was sent.
type use struct {
	sent  time.Duration
	units int64
}

// mostWithin returns the most that is used within any span of the given length: the
// peak of "rate x latency".
func mostWithin(uses []use, span time.Duration) int64 {
	slices.SortFunc(uses, func(a, b use) int { return int(a.sent - b.sent) })
	most, sum, lo := int64(0), int64(0), 0
	for hi := range uses {
		sum += uses[hi].units
		for uses[hi].sent-uses[lo].sent > span {
			sum -= uses[lo].units
			lo++
		}
		most = max(most, sum)
	}
	return most
}
