package books

import (
	"fmt"
	"maps"
	"slices"

	"github.com/tollkeeper/tollkeeper/pkg/audit"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Shards returns the shards that the ledger has used, in order.
func (b *Books) Shards() []uint32 { return slices.Sorted(maps.Keys(b.shards)) }

// Ask returns at most limit accounts of a shard that have changed since the
// counters last agreed: the next to be asked for.
func (b *Books) Ask(n uint32, limit int) []string {
	s := b.shards[n]
	if s == nil {
		return nil
	}
	return slices.Clone(s.dirty[:min(limit, len(s.dirty))])
}

// Comparable reports how the books stand to an answer of the counters: behind
// it, so that entries have to be folded first, beyond it, so that it is of no
// use, or exactly there.
func (b *Books) Comparable(r *ledger.UsageReply) (behind, beyond bool) {
	s := b.shards[r.Shard]
	return b.Position < r.Sequence, s != nil && s.last > r.Sequence
}

// Counters compares an answer of a shard's counters, which must be comparable,
// with the accounts that it was asked for.
func (b *Books) Counters(asked []string, r *ledger.UsageReply) {
	s := b.shards[r.Shard]
	if s == nil || !b.Whole {
		b.stats.SkippedComparisons++
		return
	}
	answers := map[string]*ledger.Totals{}
	for i := range r.Accounts {
		answers[r.Accounts[i].ID] = &r.Accounts[i].Own
	}
	done := map[string]bool{}
	wrong := false
	for _, id := range asked {
		life := s.accounts[id]
		if life == nil {
			continue
		}
		got := answers[id]
		if got == nil && counted(&s.total, &r.Total) == s.total.Tally {
			// The shard lacks nothing: it has too many unknown accounts, and counts
			// this one's calls with those of others.
			b.stats.SkippedComparisons++
			b.out = append(b.out, Outcome{Pair: LedgerCounters, Origin: origin(r.Shard, id), To: r.Sequence})
			life.Dirty, done[id] = false, true
			continue
		}
		if got == nil {
			got = &ledger.Totals{}
		}
		b.stats.CheckedAccounts++
		if b.life(r, id, life, got) {
			life.First, life.Last = 0, 0
			delete(s.wrong, id)
		} else {
			wrong = true
			if s.wrong == nil {
				s.wrong = map[string]bool{}
			}
			s.wrong[id] = true
		}
		life.Dirty = false
		done[id] = true
	}
	s.dirty = slices.DeleteFunc(s.dirty, func(id string) bool { return done[id] })
	b.total(s, r, wrong)
}

func origin(shard uint32, account string) string { return fmt.Sprintf("%d/%s", shard, account) }

// life compares one account and says whether it agrees.
func (b *Books) life(r *ledger.UsageReply, id string, life *Life, got *ledger.Totals) bool {
	o := Outcome{Pair: LedgerCounters, Origin: origin(r.Shard, id), To: r.Sequence}
	if t := counted(life, got); t != life.Tally {
		o.Differences = []audit.Difference{{Minute: max(life.First, 0), Account: id, Kind: audit.KindOf(&life.Tally, &t), Want: life.Tally, Got: t}}
		if life.First == 0 {
			// Nothing was counted since it agreed: it is the counters that changed.
			o.Differences[0].Minute = audit.MinuteOf(b.high)
		}
	}
	b.out = append(b.out, o)
	return o.Differences == nil
}

// total compares the whole shard. Where only that differs all accounts are asked
// for, one after the other, until the one is found.
func (b *Books) total(s *shard, r *ledger.UsageReply, wrong bool) {
	t := counted(&s.total, &r.Total)
	agrees := t == s.total.Tally
	if agrees {
		s.total.First, s.total.Last = 0, 0
		// Those that were wrong may be right again without a call of theirs.
		for _, id := range slices.Sorted(maps.Keys(s.wrong)) {
			if life := s.accounts[id]; life != nil && !life.Dirty {
				life.Dirty = true
				s.dirty = append(s.dirty, id)
			}
		}
	}
	if !agrees && !wrong && len(s.dirty) == 0 {
		for id, life := range s.accounts {
			life.Dirty = true
			s.dirty = append(s.dirty, id)
		}
		slices.Sort(s.dirty)
	}
}

// counted is what counters say. They sum up what calls say of the meter calls by
// themselves: what those stand for that say nothing is the books' own. Corrections
// are no calls.
func counted(life *Life, t *ledger.Totals) audit.Tally {
	out := audit.Tally{Count: t.Admitted + t.Refused, Refused: t.Refused, Hash: t.Hash}
	for m, v := range t.Meters {
		if m != usage.Calls { // what a correction says of calls is in no sum
			v -= t.Adjusted[m]
		}
		if i, ok := m.Index(); ok {
			out.Sums[i] += v
		} else {
			out.Sums[audit.Own] += v
		}
	}
	calls := &out.Sums[usage.CallsIndex]
	*calls += life.Sums[usage.CallsIndex] - life.Reported
	return out
}
