package lease

import "testing"

// A purse rests when all that it was granted is used or returned, and the ledger knows: not
// while anything is in hand, reserved, waited for, unsaid or unheard.
func TestWhenAPurseRests(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 100, nil)
	h := Habits{Term: second, ReportEvery: ms, RetryAfter: ms, Recheck: second, FirstWant: 10, MaxWant: 10, Sealed: true}
	p := NewPurse(anna, 0, h)
	rests := func(when string, want bool) Record {
		t.Helper()
		r, ok := p.Rest()
		d.is("rests "+when, ok, want)
		return r
	}
	speak := func(when string) {
		t.Helper()
		m, ok := p.Next(d.now)
		if !ok {
			t.Fatalf("%s: it says nothing", when)
		}
		rests("when it has spoken and not heard: "+when, false)
		a, _ := d.ask(m)
		p.Receive(a, d.now)
		if m, ok := p.Mark(d.now); ok {
			rests("with what is not unlocked: "+when, false)
			p.Unlocked(m)
		}
	}
	d.now = 1
	p.Need(5, second)
	rests("while a call waits", false)
	speak("an ask")
	holds := NewHolds(1)
	hold, _, _ := holds.Reserve([]Part{{p, 3}}, d.now, 5*second)
	if o, _ := Take([]Part{{p, 2}}, d.now); !o.OK() {
		t.Fatal(o)
	}
	rests("with units in hand", false)
	d.now += 2 * second // its lease is over
	speak("what it did not use")
	rests("with a reservation", false)
	hold.Settle([]int64{4}, d.now)
	rests("with a cost that it has not told", false)
	d.now += second
	speak("what that cost")
	r := rests("after that", true)
	if want := (Record{Seq: 3, Granted: d.said[anna].Granted, Used: 5, Over: 1}); r != want {
		t.Errorf("%+v, want %+v", r, want)
	}
	if o, _ := Take([]Part{{p, 1}}, d.now); o != Fetch {
		t.Errorf("of one that rests: %d", o)
	}

	p = NewPurse(anna, 0, h)
	p.Resume(r)
	if m, ok := p.Next(d.now); ok {
		t.Errorf("it speaks unasked: %+v", m)
	}
	p.Receive(d.said[anna], d.now) // late
	if o, _ := Take([]Part{{p, 1}}, d.now); o != Fetch {
		t.Errorf("of what it had before: %d", o)
	}
	p.Need(7, d.now+second)
	speak("an ask, again")
	if o, _ := Take([]Part{{p, 7}}, d.now); !o.OK() {
		t.Errorf("what it asked for: %d", o)
	}
	d.is("settled", d.e.State().Settled, int64(6))
	d.now += 2 * second
	speak("what it used")
	r = rests("again", true)
	m := r.LastWord(anna, d.now)
	a, fx := d.ask(m)
	if fx.Invalid != "" || a.Verdict != Ended || !d.e.Resting() {
		t.Errorf("its last word: %q, %+v", fx.Invalid, a)
	}
	d.is("settled", d.e.State().Settled, int64(13))
	d.is("outstanding", d.e.State().Outstanding, int64(0))
}

// A denial says what may come back in a while: what the living have, not what the lost had.
func TestADenialTellsWhatMayComeBackInAWhile(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 20, nil)
	d.ask(Ask{Gateway: anna, Seq: 1, Need: 6})
	d.ask(Ask{Gateway: bert, Seq: 1, Need: 4})
	d.ask(Ask{Gateway: cleo, Seq: 1, Need: 10})
	cleos := func(seq uint64) Answer {
		d.ask(Ask{Gateway: cleo, Seq: seq, Known: 10, Used: 8, Held: 2, Need: 3})
		return d.said[cleo]
	}
	for seq := uint64(2); seq < 4; seq++ {
		d.is("while others are asked", cleos(seq).Verdict, Waiting)
		d.now += 150 * ms // and are silent
	}
	a := cleos(4)
	d.is("denied", a.Verdict, DeniedEarly)
	d.is("while they may live", a.Soon, int64(6+4+2))
	d.now += second / 2
	d.ask(Ask{Gateway: bert, Seq: 2, Known: 4, Held: 4, Renew: true})
	d.now += second / 2
	a = cleos(5)
	d.is("denied", a.Verdict, DeniedEarly)
	d.is("when anna is lost", a.Soon, int64(4+2))

	p := NewPurse(cleo, 0, Habits{Term: second, RetryAfter: ms, Recheck: second})
	p.Need(3, d.now+second)
	m, _ := p.Next(d.now)
	a.Seq, a.Granted = m.Seq, 0
	p.Receive(a, d.now)
	for n, hopeless := range map[int64]bool{1: false, 6: false, 7: true} {
		if o := p.Outcome(n, d.now); o != RefusedEarly || p.Hopeless(n) != hopeless {
			t.Errorf("%d units: %d, hopeless: %v", n, o, !hopeless)
		}
	}
}
