package wallet

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// However many accounts call in a window that does not end, there is room for the purses
// of those that call now; and one that comes back has what is left for it, no more.
func TestAccountsThatDoNotCallAnyMoreLeaveRoomForOthers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newShard()
		go s.tick(t.Context())
		w := newWorld(t, s, func(o *Options) { o.MaxPurses = 20 })
		life := exact("life", usage.Lifetime, 3)
		accounts := make([][]Part, 100)
		for i := range accounts {
			accounts[i] = w.parts(fmt.Sprint("account-", i), 1, life)
		}
		admitted := make([]int, len(accounts))
		for range 4 {
			for i, parts := range accounts {
				switch s := w.take(t, parts); s {
				case Taken:
					admitted[i]++
				case Denied:
				default:
					t.Fatalf("account %d, admitted %d times: %d", i, admitted[i], s)
				}
				time.Sleep(time.Second)
			}
		}
		for i, n := range admitted {
			if n != 3 {
				t.Errorf("account %d: %d of 3 are admitted", i, n)
			}
		}
		time.Sleep(2 * time.Minute)
		if open, shelved := w.purses.Load(), w.shelved.Load(); open != 0 || shelved != int64(len(accounts)) {
			t.Errorf("%d purses, %d are shelved", open, shelved)
		}
		within, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := w.Close(within); err != nil {
			t.Error(err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		for k, e := range s.escrows {
			h := e.Holdings()
			if st := e.State(); st.Settled != 3 || st.Outstanding != 0 || len(h) != 1 || !h[0].Closed {
				t.Errorf("%+v: %+v %+v", k, st, h)
			}
		}
	})
}

// What an account has in hand and does not use goes back, and its purse is shelved.
func TestAPurseThatIsNotUsedGivesBackWhatItHas(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newShard()
		w, other := newWorld(t, s, nil), newWorld(t, s, nil)
		life := exact("life", usage.Lifetime, 30)
		parts := w.parts("acme", 1, life)
		if s := w.take(t, parts); s != Taken {
			t.Fatal(s)
		}
		time.Sleep(10 * time.Second)
		if st := s.state(parts[0]); st.Outstanding != 0 || st.Settled != 1 {
			t.Errorf("%+v", st)
		}
		time.Sleep(time.Minute)
		if open, shelved := w.purses.Load(), w.shelved.Load(); open != 0 || shelved != 1 {
			t.Errorf("%d purses, %d are shelved", open, shelved)
		}
		for range 29 {
			if s := other.take(t, other.parts("acme", 1, life)); s != Taken {
				t.Errorf("elsewhere: %d", s)
			}
		}
		if s := w.take(t, parts); s != Denied {
			t.Errorf("when all is used: %d", s)
		}
	})
}

// state of a lifetime's allowance.
func (s *shard) state(p Part) lease.State {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.escrows[key{p.Account(), p.LimitID(), 0}].State()
}

// A reservation that is open keeps its purse, also if it is of nothing: what the call
// costs is to be counted.
func TestAPurseWithAReservationIsNotShelved(t *testing.T) {
	t.Parallel()
	for _, units := range []int64{0, 2} {
		synctest.Test(t, func(t *testing.T) {
			s := newShard()
			w := newWorld(t, s, nil)
			tokens := exact("tokens", usage.Lifetime, 10)
			tokens.Meter = usage.OutputTokens
			parts := w.parts("acme", 1, tokens)
			if s := w.take(t, parts); s != Taken {
				t.Fatal(s)
			}
			parts[0].Units = units
			r := w.Take(t.Context(), parts, true, 10*time.Minute)
			if r.Standing != Taken {
				t.Fatal(r.Standing)
			}
			time.Sleep(5 * time.Minute)
			if n := w.purses.Load(); n != 1 {
				t.Errorf("%d purses", n)
			}
			r.Hold.Settle([]int64{3})
			r.Hold.Settle([]int64{3})
			time.Sleep(5 * time.Minute)
			if n := w.purses.Load(); n != 0 {
				t.Errorf("%d purses after that", n)
			}
			if st := s.state(parts[0]); st.Settled != 4 || st.Outstanding != 0 {
				t.Errorf("%+v", st)
			}
		})
	}
}

// What is remembered is bounded. Where the bound is reached purses stay open, and where
// no more may be calls are refused, which is counted by the bound; whoever is remembered
// goes on, and the end of windows makes room.
func TestWhatIsShelvedIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := prometheus.NewRegistry()
		s := newShard()
		w := newWorld(t, s, func(o *Options) { o.MaxPurses, o.MaxShelved, o.Registerer = 2, 3, r })
		hour := exact("hour", usage.Hour, 100)
		call := func(account int) Result {
			res := w.Take(t.Context(), w.parts(fmt.Sprint("account-", account), 1, hour), false, time.Minute)
			time.Sleep(20 * time.Second)
			return res
		}
		for i := range 5 {
			if res := call(i); res.Standing != Taken {
				t.Fatalf("account %d: %+v", i, res)
			}
		}
		if res := call(5); res.Standing != Busy || res.Bound != Purses {
			t.Errorf("one too many: %+v", res)
		}
		if n := metric(t, r, "tollkeeper_gate_lease_bound_refusals_total", "purses"); n != 1 {
			t.Errorf("%v refusals are counted", n)
		}
		if open, shelved := metric(t, r, "tollkeeper_gate_lease_purses", ""), metric(t, r, "tollkeeper_gate_lease_shelved_purses", ""); open != 2 || shelved != 3 {
			t.Errorf("%v purses, %v shelved", open, shelved)
		}
		for i := 3; i < 5; i++ { // theirs stayed open
			if res := call(i); res.Standing != Taken {
				t.Errorf("account %d again: %+v", i, res)
			}
		}
		time.Sleep(time.Hour)
		if open, shelved := w.purses.Load(), w.shelved.Load(); open != 0 || shelved != 0 {
			t.Errorf("%d purses and %d shelved in the next hour", open, shelved)
		}
		if res := call(5); res.Standing != Taken {
			t.Errorf("in the next hour: %+v", res)
		}
	})
}

// A purse of a limit that the ledger does not know is dropped too, and asks again when
// it does.
func TestAPurseThatTheLedgerDoesNotKnowIsDropped(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newShard()
		w := newWorld(t, s, nil)
		life := exact("life", usage.Lifetime, 10)
		parts := w.parts("acme", 1, life)
		s.mu.Lock()
		delete(s.limits, "plan/life")
		s.mu.Unlock()
		if s := w.take(t, parts); s != NoAnswer && s != Turning {
			t.Fatal(s)
		}
		time.Sleep(2 * time.Minute)
		if open, shelved := w.purses.Load(), w.shelved.Load(); open != 0 || shelved != 0 {
			t.Errorf("%d purses, %d shelved", open, shelved)
		}
		s.change("plan/life", life)
		for range 3 {
			if s := w.take(t, parts); s != Taken {
				t.Errorf("when it is known: %d", s)
			}
		}
	})
}

// Last words of purses that rest are said until they are in the ledger.
func TestLastWordsOfWhatIsShelvedAreRepeated(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newShard()
		w := newWorld(t, s, nil)
		for i := range 1000 {
			w.desks[0].mu.Lock()
			w.desks[0].shelf[key{fmt.Sprint("account-", i), "plan/life", 0}] = shelved{Record: lease.Record{Seq: 1}}
			w.desks[0].mu.Unlock()
			w.shelved.Add(1)
		}
		s.limits["plan/life"] = exact("life", usage.Lifetime, 3)
		n := 0
		s.losing(func() bool { n++; return n%2 == 1 })
		within, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err := w.Close(within); err != nil {
			t.Error(err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if len(s.escrows) != 1000 || w.shelved.Load() != 0 {
			t.Errorf("%d were closed, %d are left", len(s.escrows), w.shelved.Load())
		}
	})
}

func metric(t *testing.T, r *prometheus.Registry, name, label string) float64 {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && (label == "" || m.GetLabel()[0].GetValue() == label) {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	t.Fatalf("no metric %s %s", name, label)
	return 0
}
