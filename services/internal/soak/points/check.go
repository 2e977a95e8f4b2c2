package points

import (
	"fmt"
	"maps"
	"slices"

	"github.com/tollkeeper/tollkeeper/services/internal/soak/traffic"
)

// Check compares the points with what clients saw, call by call and account by
// account.
type Check struct {
	Sent     int64 `json:"sent"`
	Passed   int64 `json:"passed"`
	Refused  int64 `json:"refused"`
	Unknown  int64 `json:"unknown_503"`
	Other    int64 `json:"other_answers"`
	Nothing  int64 `json:"no_answer"`
	Ledger   int64 `json:"ledger_calls"`
	Counters int64 `json:"counter_calls"`
	History  int64 `json:"history_calls"`
	Rollups  int64 `json:"rollup_calls"`
	// Redelivered frames are in the ledger twice and count once.
	Redelivered int64 `json:"redelivered_frames"`

	// Lost were answered with success and are not in the ledger, LostRefusals
	// were refused by a decision and are not.
	Lost         int64 `json:"lost"`
	LostRefusals int64 `json:"lost_refusals"`
	// Doubled are there more than once, at any point.
	Doubled int64 `json:"doubled"`
	// Misjudged are recorded as the opposite of what the client was told.
	Misjudged int64 `json:"misjudged"`
	// Apart are calls that the history has otherwise than the ledger, and
	// accounts whose counters or rollups differ from it.
	ApartHistory  int64    `json:"history_differs_in_calls"`
	ApartCounters []string `json:"counters_differ_in_accounts,omitempty"`
	ApartRollups  []string `json:"rollups_differ_in_accounts,omitempty"`
	Gaps          int64    `json:"frame_gaps"`
	Unreadable    int64    `json:"unreadable_entries"`

	// LostCalls are the numbers of the lost ones, and of lost refusals.
	LostCalls []int `json:"-"`
}

// Points that are compared; nil ones are not.
type Points struct {
	Seen     []traffic.Seen
	Ledger   *Ledger
	Counters map[string]Sums
	History  *History
	Rollups  map[string]Sums
}

const mostNamed = 10

// Compare compares the points.
func Compare(p Points) Check {
	c := Check{Sent: int64(len(p.Seen)), Redelivered: p.Ledger.Repeated, Gaps: p.Ledger.Gaps, Unreadable: p.Ledger.Unreadable}
	for n, s := range p.Seen {
		held := p.Ledger.At(n)
		c.Ledger += int64(held.Times())
		switch s.Outcome {
		case traffic.Passed:
			c.Passed++
			if held.Times() == 0 {
				c.Lost++
				c.LostCalls = append(c.LostCalls, n)
			}
			if held.Refused > 0 {
				c.Misjudged++
			}
		case traffic.Refused:
			c.Refused++
			if held.Times() == 0 {
				c.LostRefusals++
				c.LostCalls = append(c.LostCalls, n)
			}
			if held.Admitted > 0 {
				c.Misjudged++
			}
		case traffic.Unknown:
			c.Unknown++
			if held.Admitted > 0 {
				c.Misjudged++
			}
		case traffic.Other:
			c.Other++
		case traffic.Nothing, traffic.NotSent:
			c.Nothing++
		}
		double := held.Times() > 1
		if p.History != nil {
			in := p.History.At(n)
			c.History += int64(in.Times())
			if in != held {
				c.ApartHistory++
			}
			double = double || in.Times() > 1
		}
		if double {
			c.Doubled++
		}
	}
	if p.Counters != nil {
		c.Counters, c.ApartCounters = p.Ledger.apart(p.Counters)
	}
	if p.Rollups != nil {
		c.Rollups, c.ApartRollups = p.Ledger.apart(p.Rollups)
	}
	return c
}

// apart names accounts whose sums differ from the ledger's.
func (l *Ledger) apart(sums map[string]Sums) (calls int64, differ []string) {
	for _, account := range slices.Sorted(maps.Keys(l.Accounts)) {
		want, got := *l.Accounts[account], sums[account]
		calls += got.Admitted + got.Refused
		if !want.Equal(got) && len(differ) < mostNamed {
			differ = append(differ, fmt.Sprintf("%s: ledger %d+%d %v, here %d+%d %v", account,
				want.Admitted, want.Refused, nonZero(want.Meters), got.Admitted, got.Refused, nonZero(got.Meters)))
		}
	}
	for _, account := range slices.Sorted(maps.Keys(sums)) {
		if s := sums[account]; l.Accounts[account] == nil && s.Admitted+s.Refused > 0 && len(differ) < mostNamed {
			differ = append(differ, fmt.Sprintf("%s: the ledger has none of its %d calls", account, s.Admitted+s.Refused))
		}
	}
	return calls, differ
}

// Broken says which laws the points break. lossAllowed: without
// spool-before-answer a killed gateway takes calls with it.
func (c *Check) Broken(lossAllowed bool) []string {
	var out []string
	say := func(n int64, what string) {
		if n > 0 {
			out = append(out, fmt.Sprintf("%d %s", n, what))
		}
	}
	if !lossAllowed {
		say(c.Lost, "answered calls are not in the ledger")
		say(c.LostRefusals, "refused calls are not in the ledger")
	}
	say(c.Doubled, "calls are there more than once")
	say(c.Misjudged, "calls are recorded otherwise than the client was told")
	say(c.ApartHistory, "calls stand in ClickHouse otherwise than in the ledger")
	say(c.Gaps, "frame numbers were skipped")
	say(c.Unreadable, "entries of the ledger can't be read")
	for _, text := range c.ApartCounters {
		out = append(out, "counters: "+text)
	}
	for _, text := range c.ApartRollups {
		out = append(out, "rollups: "+text)
	}
	return out
}
