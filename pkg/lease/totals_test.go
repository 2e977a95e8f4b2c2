package lease

import (
	"testing"

	"pgregory.net/rapid"
)

// What was counted beyond a lease stays beyond it, whatever is granted later: the
// units of the later grant are the gateway's to use, and out until it says so.
func TestWhatWasBeyondALeaseStaysBeyondIt(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 100, nil)
	d.ask(Ask{Gateway: anna, Seq: 1, Need: 3})
	d.apply(Entry{Counted: []Counted{{anna, 5}}})
	s := d.e.State()
	d.is("beyond", s.Counts.Above, int64(2))
	d.is("settled and out", [2]int64{s.Settled, s.Outstanding}, [2]int64{5, 0})
	a, _ := d.ask(Ask{Gateway: anna, Seq: 2, Known: 3, Used: 3, Over: 2, Need: 7})
	d.is("granted", a.Granted, int64(10))
	d.apply(Entry{Counted: []Counted{{anna, 1}}})
	s = d.e.State()
	d.is("beyond, after a grant", s.Counts.Above, int64(2))
	d.is("settled and out, after a grant", [2]int64{s.Settled, s.Outstanding}, [2]int64{6, 6})
	// Of a gateway that has not said it yet it is no other.
	d.ask(Ask{Gateway: bert, Seq: 1, Need: 3})
	d.apply(Entry{Counted: []Counted{{bert, 5}}})
	d.ask(Ask{Gateway: bert, Seq: 2, Known: 3, Need: 7})
	before := d.e.State()
	d.apply(Entry{Counted: []Counted{{bert, 1}}})
	s = d.e.State()
	d.is("beyond, of both", s.Counts.Above, int64(4))
	d.is("one more is settled, and no longer out", [2]int64{s.Settled, s.Outstanding}, [2]int64{before.Settled + 1, before.Outstanding - 1})
}

// TestTotalsNeverFall: whatever comes, honest or not, what a lease has in total
// beyond it, used and beyond, granted, returned and counted only grows, as do the
// counts of the allowance that are no corrections.
func TestTotalsNeverFall(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		terms := Terms{Term: second, Patience: 100 * ms, Horizon: 5 * second, MaxLeases: 8}
		if rapid.Bool().Draw(t, "leased tier") {
			terms.ReleaseAfter, terms.MaxExposure = second, 20
		}
		e := NewEscrow(rapid.Int64Range(0, 200).Draw(t, "amount"), terms)
		gateways := []Gateway{anna, bert, cleo}
		units := rapid.Int64Range(0, 12)
		now, sequence := Micros(0), uint64(0)
		seq := map[Gateway]uint64{}
		for range rapid.IntRange(1, 40).Draw(t, "entries") {
			sequence++
			now += Micros(rapid.SampledFrom([]int64{0, 0, 0, 0, 30, 700, 3000, 6000}).Draw(t, "pass")) * ms
			g := rapid.SampledFrom(gateways).Draw(t, "gateway")
			en := Entry{Sequence: sequence, Time: now}
			switch rapid.SampledFrom([]string{"ask", "ask", "ask", "ask", "count", "count", "count", "outside", "amount", "end", "pass"}).Draw(t, "what") {
			case "ask":
				seq[g]++
				m := Ask{Gateway: g, Seq: seq[g], Sent: now, Need: units.Draw(t, "need"), Want: units.Draw(t, "want"), Over: max(0, units.Draw(t, "over")-10)}
				if i, known := e.find(g); known {
					l := &e.leases[i]
					m.Known = l.granted
					m.Used = rapid.Int64Range(0, l.granted-l.returned).Draw(t, "used")
					m.Returned = rapid.Int64Range(0, l.granted-m.Used).Draw(t, "returned")
					m.Held = rapid.Int64Range(0, l.granted-m.Used-m.Returned).Draw(t, "held")
					m.Seen = rapid.SampledFrom([]uint64{0, l.recall}).Draw(t, "seen")
				} else {
					m.Over = 0
				}
				if rapid.IntRange(0, 19).Draw(t, "closing") == 0 {
					m.Closing, m.Need, m.Want, m.Held = true, 0, 0, 0
				}
				en.Ask = &m
			case "count":
				en.Counted = []Counted{{g, units.Draw(t, "units")}}
			case "outside":
				en.Outside = rapid.Int64Range(-5, 12).Draw(t, "outside")
			case "amount":
				amount := rapid.Int64Range(0, 200).Draw(t, "amount")
				en.Amount = &amount
			case "end":
				en.Ended = &End{Gateway: g, Keep: units.Draw(t, "keep")}
			}
			before := append([]lease(nil), e.leases...)
			counts := e.counts
			e.Apply(en)
			for i := range before {
				was := &before[i]
				k, known := e.find(was.gateway)
				if !known || was.closed && now-was.heard > terms.Horizon {
					continue // forgotten, and maybe begun anew
				}
				is := &e.leases[k]
				if is.over < was.over || is.used+is.over < was.used+was.over || is.granted < was.granted || is.returned < was.returned || is.said < was.said || is.beyond < was.beyond || is.counted < was.counted {
					t.Fatalf("%+v after\n%+v", is, was)
				}
				if is.out() < 0 {
					t.Fatalf("%d are out: %+v", is.out(), is)
				}
			}
			for i, n := range e.counts.fields() {
				if n != &e.counts.Outside && *n < *counts.fields()[i] {
					t.Fatalf("%+v after\n%+v", e.counts, counts)
				}
			}
			if s := e.State(); s.Settled < 0 || s.Outstanding < 0 || s.Exposure < 0 || s.Exposure > terms.MaxExposure || s.Settled+s.Outstanding > s.Amount+s.Excess {
				t.Fatalf("%+v", s)
			}
		}
	})
}
