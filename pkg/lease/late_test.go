package lease

import "testing"

// What an earlier purse of the same allowance was answered is none of this one's: its
// lease is over, and units of it may have been used.
func TestAnAnswerToAnEarlierPurseIsNotTaken(t *testing.T) {
	t.Parallel()
	h := Habits{Term: second, ReportEvery: ms, RetryAfter: ms, Recheck: second, FirstWant: 1, MaxWant: 1}
	for name, late := range map[string]Answer{
		"units of the lease that is over": {Seq: 5, Granted: 100, Expiry: second, Verdict: Open},
		"that it is over":                 {Seq: 5, Verdict: Ended},
	} {
		p := NewPurse(anna, 0, h)
		p.After(5)
		p.Need(1, second)
		m, _ := p.Next(0)
		late.Gateway, late.Epoch, late.Revision = anna, 1, 9
		p.Receive(late, 0)
		if o, _ := Take([]Part{{p, 1}}, 0); o != Fetch {
			t.Errorf("%s: %d", name, o)
		}
		p.Receive(Answer{Gateway: anna, Epoch: 1, Revision: 10, Seq: m.Seq, Granted: 1, Expiry: second}, 0)
		if o, _ := Take([]Part{{p, 1}}, 0); !o.OK() {
			t.Errorf("%s, then its own: %d", name, o)
		}
	}
}

// A purse that waits says again and again what it needs. An answer that takes longer than
// that is one all the same: else who waits is never refused, but not answered at all.
func TestADenialThatComesAfterItsAskWasRepeatedHolds(t *testing.T) {
	t.Parallel()
	h := Habits{Term: second, ReportEvery: ms, RetryAfter: 10 * ms, Recheck: second, FirstWant: 1, MaxWant: 1}
	for _, verdict := range []Verdict{DeniedEarly, DeniedFinal} {
		p := NewPurse(anna, 0, h)
		p.Need(3, second)
		first, _ := p.Next(0)
		if again, ok := p.Next(10 * ms); !ok || again.Seq != first.Seq+1 || again.Need != 3 {
			t.Fatalf("it does not say again what it needs: %+v", again)
		}
		p.Receive(Answer{Gateway: anna, Epoch: 1, Revision: 1, Seq: first.Seq, Verdict: verdict, Room: 2}, 11*ms)
		want := map[Verdict]Outcome{DeniedEarly: RefusedEarly, DeniedFinal: Refused}[verdict]
		if o := p.Outcome(3, 11*ms); o != want {
			t.Errorf("what was needed: %d, want %d", o, want)
		}
		if o := p.Outcome(2, 11*ms); o != Fetch {
			t.Errorf("less: %d", o)
		}
	}
}

// Units that come back are granted again: the totals of a lease grow beyond any allowance,
// and it goes on.
func TestALeaseMayBeGrantedMoreInAllThanAnAllowanceHas(t *testing.T) {
	t.Parallel()
	d := newDesk(t, MaxUnits, nil)
	p := NewPurse(anna, 0, Habits{Term: second, ReportEvery: ms, RetryAfter: ms, Recheck: second, FirstWant: 1, MaxWant: MaxUnits})
	for n := range 5 {
		p.Need(MaxUnits/2, d.now+second)
		m, ok := p.Next(d.now)
		if !ok {
			t.Fatal("it does not ask")
		}
		a, fx := d.ask(m)
		p.Receive(a, d.now)
		if o, _ := Take([]Part{{p, 1}}, d.now); o != Admitted && o != AdmittedLow {
			t.Fatalf("the %d. time: %d, %q, %+v", n+1, o, fx.Invalid, a)
		}
		d.now += 2 * second // nobody uses it any more
		if m, ok = p.Next(d.now); ok {
			a, _ = d.ask(m)
			p.Receive(a, d.now)
		}
	}
	d.is("settled", d.e.State().Settled, int64(5))
	d.is("outstanding", d.e.State().Outstanding, int64(0))
}

// What calls cost beyond their leases may be absurd: it is said as far as it can be, and
// the purse is heard.
func TestAPurseIsHeardWhateverItsCallsCost(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 10, nil)
	p := NewPurse(anna, 0, Habits{Term: second, ReportEvery: ms, RetryAfter: ms, Recheck: second, FirstWant: 1, MaxWant: 1})
	p.Need(2, second)
	m, _ := p.Next(0)
	a, _ := d.ask(m)
	p.Receive(a, 0)
	hs := NewHolds(2)
	var open []*Hold
	for range 2 {
		h, o, _ := hs.Reserve([]Part{{p, 1}}, 0, second)
		if !o.OK() {
			t.Fatal(o)
		}
		open = append(open, h)
	}
	for _, h := range open {
		h.Settle([]int64{MaxUnits}, 0)
	}
	if m, _ = p.Next(0); m.Used != 2 {
		t.Fatalf("%+v", m)
	}
	_, fx := d.ask(m)
	d.is("invalid", fx.Invalid, "")
	d.is("settled", d.e.State().Settled, MaxUnits+2)
}

// Whoever holds something when the window ends asks until it hears that it is over, also
// where the ledger's clock is behind, and then says nothing any more.
func TestAPurseThatStillHoldsHearsThatItsWindowIsOver(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 10, func(terms *Terms) { terms.End = 2 * second })
	h := Habits{Skew: 10 * ms, Term: second, ReportEvery: 100 * ms, RetryAfter: 50 * ms, Recheck: second, FirstWant: 1, MaxWant: 1}
	p := NewPurse(anna, 2*second, h)
	p.Need(2, second)
	hs := NewHolds(1)
	asks, since := 0, 0
	for now := Micros(0); now < 10*second; now += 10 * ms {
		d.now = max(0, now-second)
		if m, ok := p.Next(now); ok {
			asks++
			if p.Ended() {
				since++
			}
			a, _ := d.ask(m)
			p.Receive(a, now)
		}
		if now == 0 {
			if _, o, _ := hs.Reserve([]Part{{p, 2}}, 0, 20*second); !o.OK() {
				t.Fatal(o)
			}
		}
	}
	if !p.Ended() || p.Done() || p.held.Load() != 2 {
		t.Errorf("ended %v, done %v, held %d", p.Ended(), p.Done(), p.held.Load())
	}
	if asks > 40 || since > 1 {
		t.Errorf("%d asks, %d since the window is over", asks, since)
	}
}

// A clock that is set back makes nobody silent until it is where it was.
func TestAPurseSpeaksOnAfterItsClockWasSetBack(t *testing.T) {
	t.Parallel()
	h := Habits{Term: second, ReportEvery: 100 * ms, RetryAfter: 10 * ms, Recheck: 100 * ms, FirstWant: 1, MaxWant: 1}
	const before, after = 10_000 * second, 5_000 * second
	wait := func() (*Purse, Ask) {
		p := NewPurse(anna, 0, h)
		p.Need(1, before+second)
		m, _ := p.Next(before)
		return p, m
	}
	said := func(p *Purse) (asks int) {
		for now := Micros(after); now < after+second; now += ms {
			if p.Outcome(1, now) == Fetch {
				p.Need(1, now+second)
			}
			if _, ok := p.Next(now); ok {
				asks++
			}
		}
		return asks
	}
	p, _ := wait()
	if n := said(p); n < 10 || n > 200 {
		t.Errorf("after an ask that was not answered: %d asks in a second", n)
	}
	p, m := wait()
	p.Receive(Answer{Gateway: anna, Epoch: 1, Revision: 1, Seq: m.Seq, Verdict: Waiting, Expiry: before + second}, before)
	if n := said(p); n < 10 || n > 200 {
		t.Errorf("in the queue: %d asks in a second", n)
	}
	for _, v := range []Verdict{DeniedEarly, DeniedFinal} {
		p, m = wait()
		p.Receive(Answer{Gateway: anna, Epoch: 1, Revision: 1, Seq: m.Seq, Verdict: v, Expiry: before + second}, before)
		if n := said(p); n == 0 || n > 200 {
			t.Errorf("after verdict %d: %d asks in a second", v, n)
		}
	}
}

// From the moment that a purse is closed nothing is taken of it: what is given back by
// calls that were under way, what comes late, and also where nobody calls Next any more.
func TestNothingIsTakenOfAPurseThatIsClosed(t *testing.T) {
	t.Parallel()
	p := filled(1, 10)[0]
	h, _, _ := NewHolds(1).Reserve([]Part{{p, 4}}, 1, second)
	refused := func(when string) {
		t.Helper()
		if o, _ := Take([]Part{{p, 1}}, 1); o.OK() {
			t.Errorf("%s: %d", when, o)
		}
		if taken, _ := p.TakeOne(1); taken {
			t.Errorf("%s: one is taken", when)
		}
	}
	if _, ok := p.Next(1); !ok {
		t.Error("it does not say what is held")
	}
	p.Close()
	refused("at once")
	h.Settle([]int64{1}, 1)
	refused("after a reservation has given back")
	p.Receive(Answer{Gateway: Gateway{1}, Epoch: 1, Revision: 2, Granted: 15, Expiry: never - 1}, 1)
	refused("after a grant that came late")
	if m, ok := p.Next(1); !ok || !m.Closing || m.Used != 1 || m.Returned != 14 {
		t.Errorf("the last word: %+v", m)
	}
}
