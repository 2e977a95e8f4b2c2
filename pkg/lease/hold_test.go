package lease

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// Reservations of many lifetimes are made, resolved, swept and forgotten in whatever
// order: each is what its deadline, and what was done to it, say.
func TestReservationsAreWhatBecameOfThem(t *testing.T) {
	t.Parallel()
	type said struct {
		hold     *Hold
		deadline Micros
		state    holdState
	}
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 1))
		room := 1 + r.IntN(20)
		p := filled(1, 1<<40)[0]
		hs := NewHolds(room)
		var all []*said
		var want HoldCounts
		var order []*said // as they expired
		expire := func(now Micros) {
			var due []*said
			for _, s := range all {
				if s.state == open && now >= s.deadline {
					due = append(due, s)
				}
			}
			slices.SortStableFunc(due, func(a, b *said) int { return int(a.deadline - b.deadline) })
			for _, s := range due {
				s.state = expired
				want.Open--
				want.Expired++
			}
			order = append(order, due...)
		}
		deadlines := r.Perm(100_000) // no two are the same
		for now := Micros(1); now < 1000; now += Micros(r.IntN(4)) {
			switch n := r.IntN(10); {
			case n < 5:
				deadline := now + 1 + Micros(deadlines[len(all)]%(1+r.IntN(500)))
				for slices.ContainsFunc(all, func(s *said) bool { return s.deadline == deadline }) {
					deadline++
				}
				h, out, _ := hs.Reserve([]Part{{p, 2}}, now, deadline)
				if want.Open+want.Expired == room {
					order = slices.DeleteFunc(order, func(s *said) bool { return s.state != expired })
					if len(order) > 0 {
						order[0].state = forgotten
						want.Expired--
						want.Forgotten++
					}
				}
				if (h != nil) != (want.Open+want.Expired < room) || out.OK() != (h != nil) {
					t.Fatalf("seed %d: reserved: %d, with %+v", seed, out, want)
				}
				if h != nil {
					want.Open++
					all = append(all, &said{hold: h, deadline: deadline})
				}
			case n < 8 && len(all) > 0:
				s := all[r.IntN(len(all))]
				is := Settled
				switch {
				case s.state == resolved:
					is = Already
					want.Already++
				case s.state == forgotten:
					is = Forgotten
				case s.state == expired:
					is = Late
					want.Expired--
					want.Late++
				case now >= s.deadline:
					is = Late
					want.Open--
					want.Late++
				default:
					want.Open--
					want.Settled++
				}
				s.state = resolved
				if got, _ := s.hold.Settle([]int64{1}, now); got != is {
					t.Fatalf("seed %d: it is %d, want %d", seed, got, is)
				}
			case n == 8:
				hs.Sweep(now)
				expire(now)
			}
			if got := hs.Counts(); got != want {
				t.Fatalf("seed %d at %d: %+v, want %+v", seed, now, got, want)
			}
			if len(hs.expired) > 3*room+65 {
				t.Fatalf("seed %d: %d are remembered as expired, with room for %d", seed, len(hs.expired), room)
			}
		}
		held := int64(2 * (want.Open + want.Expired))
		for _, s := range all {
			if s.state == forgotten {
				held += 2
			}
		}
		if got := p.held.Load(); got < held {
			t.Errorf("seed %d: %d held, want %d at least", seed, got, held)
		}
	}
}
