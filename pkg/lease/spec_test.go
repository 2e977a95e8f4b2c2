package lease

import (
	"bytes"
	"reflect"
	"testing"
)

// desk is an escrow and what it last said to whom.
type desk struct {
	t        *testing.T
	e        *Escrow
	sequence uint64
	now      Micros
	said     map[Gateway]Answer
}

func newDesk(t *testing.T, amount int64, change func(*Terms)) *desk {
	terms := Terms{Term: second, Patience: 100 * ms, Horizon: 5 * second, MaxLeases: 8}
	if change != nil {
		change(&terms)
	}
	return &desk{t: t, e: NewEscrow(amount, terms), said: map[Gateway]Answer{}}
}

func (d *desk) apply(en Entry) Effects {
	d.t.Helper()
	d.sequence++
	en.Sequence, en.Time = d.sequence, d.now
	fx := d.e.Apply(en)
	for _, a := range fx.Answers {
		d.said[a.Gateway] = a
	}
	// A snapshot in between changes nothing.
	read, rest, err := Read(append(d.e.Append(nil), "rest"...), d.e.terms)
	if err != nil || string(rest) != "rest" || !bytes.Equal(read.Append(nil), d.e.Append(nil)) {
		d.t.Fatalf("a snapshot is read as something else: %v\n%+v\n%+v", err, d.e, read)
	}
	d.e = read
	return fx
}

func (d *desk) ask(m Ask) (Answer, Effects) {
	d.t.Helper()
	m.Sent = d.now
	fx := d.apply(Entry{Ask: &m})
	return d.said[m.Gateway], fx
}

func (d *desk) is(what string, got, want any) {
	d.t.Helper()
	if !reflect.DeepEqual(got, want) {
		d.t.Errorf("%s: %v, want %v (%+v)", what, got, want, d.e.State())
	}
}

var (
	anna = Gateway{1}
	bert = Gateway{2}
	cleo = Gateway{3}
)

func TestLeasesShrinkAsTheAllowanceRunsOut(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 1000, nil)
	last := int64(1001)
	for n := uint64(1); ; n++ {
		a := d.said[anna]
		next, _ := d.ask(Ask{Gateway: anna, Seq: n, Known: a.Granted, Used: a.Granted, Need: 1, Want: 600})
		got := next.Granted - a.Granted
		if got == 0 {
			d.is("the verdict after all", next.Verdict, DeniedFinal)
			d.is("granted", next.Granted, int64(1000))
			break
		}
		if got > last || got > 500 {
			t.Fatalf("a lease of %d after one of %d", got, last)
		}
		last = got
	}
	d.is("the last lease", last, int64(1))
}

func TestACopyIsAnsweredAgainAndGrantsNothing(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 1000, nil)
	m := Ask{Gateway: anna, Seq: 1, Need: 5, Want: 100}
	first, _ := d.ask(m)
	again, fx := d.ask(m)
	d.is("duplicate", fx.Duplicate, true)
	d.is("granted", again.Granted, first.Granted)
	// A newer ask that has not heard of the grant does not double it either.
	m.Seq = 2
	third, _ := d.ask(m)
	d.is("granted to one that has not heard", third.Granted, first.Granted)
	d.is("outstanding", d.e.State().Outstanding, first.Granted)
}

func TestUnusedUnitsAreRecalledBeforeAnybodyIsDenied(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 10, nil)
	d.ask(Ask{Gateway: anna, Seq: 1, Need: 10})
	b, _ := d.ask(Ask{Gateway: bert, Seq: 1, Need: 4})
	d.is("bert", b.Verdict, Waiting)
	d.is("anna's recall", d.said[anna].Recall, d.sequence)
	// Anna has used 3 and holds 2.
	d.ask(Ask{Gateway: anna, Seq: 2, Seen: d.sequence, Known: 10, Used: 3, Held: 2, Returned: 5})
	d.is("bert", d.said[bert].Granted, int64(4))
	// What is held may come back: a denial is early, and says how much could be had.
	c, _ := d.ask(Ask{Gateway: cleo, Seq: 1, Need: 3})
	d.is("cleo", c.Verdict, Waiting)
	d.is("bert's recall", d.said[bert].Recall, d.sequence)
	d.ask(Ask{Gateway: bert, Seq: 2, Seen: d.sequence, Known: 4, Used: 3, Held: 1})
	d.is("anna's recall, who has only what is held", d.said[anna].Recall, d.sequence)
	d.ask(Ask{Gateway: anna, Seq: 3, Seen: d.sequence, Known: 10, Used: 3, Held: 2, Returned: 5})
	d.is("cleo", d.said[cleo].Verdict, DeniedEarly)
	d.is("cleo's room", d.said[cleo].Room, int64(1))
	// A call that would not fit even if all came back is denied for good at once.
	b, _ = d.ask(Ask{Gateway: bert, Seq: 3, Seen: d.sequence, Known: 4, Used: 4, Need: 4})
	d.is("bert", b.Verdict, DeniedFinal)
	// Anna's hold turns out to be free: who was denied early hears of it.
	d.ask(Ask{Gateway: anna, Seq: 4, Seen: d.sequence, Known: 10, Used: 3, Returned: 7})
	d.is("cleo", d.said[cleo].Verdict, Open)
	c, _ = d.ask(Ask{Gateway: cleo, Seq: 2, Need: 3})
	d.is("cleo", c.Granted, int64(3))
	s := d.e.State()
	d.is("early", s.Counts.DeniedEarly, int64(1))
	d.is("final", s.Counts.DeniedFinal, int64(1))
}

func TestASilentGatewayIsWaitedForOnce(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 10, nil)
	d.ask(Ask{Gateway: anna, Seq: 1, Need: 10})
	d.ask(Ask{Gateway: bert, Seq: 1, Need: 1})
	at, _ := d.e.Due()
	d.is("patience ends", at, 100*ms)
	d.now = at
	d.apply(Entry{})
	d.is("bert", d.said[bert].Verdict, DeniedEarly)
	b, _ := d.ask(Ask{Gateway: bert, Seq: 2, Need: 1})
	d.is("bert, at once", b.Verdict, DeniedEarly)
}

func TestWhoDoesNotWaitAnyMoreIsGrantedNothing(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 10, nil)
	d.ask(Ask{Gateway: anna, Seq: 1, Need: 10})
	d.ask(Ask{Gateway: bert, Seq: 1, Need: 1})
	d.now = 90 * ms
	d.ask(Ask{Gateway: cleo, Seq: 1, Need: 1})
	d.ask(Ask{Gateway: bert, Seq: 2}) // its call has given up
	d.ask(Ask{Gateway: anna, Seq: 2, Seen: d.sequence, Known: 10, Used: 9, Returned: 1})
	d.is("bert", d.said[bert].Granted, int64(0))
	d.is("cleo", d.said[cleo].Granted, int64(1))
	// And one that died in the queue.
	d = newDesk(t, 10, func(t *Terms) { t.Start = second })
	d.ask(Ask{Gateway: anna, Seq: 1, Need: 1})
	d.now = 200 * ms
	d.apply(Entry{})
	d.is("waiting", d.e.State().Waits, 0)
	d.now = second
	d.apply(Entry{})
	d.is("outstanding", d.e.State().Outstanding, int64(0))
}

func TestWhatADeadGatewayHeldStaysSpentUntilItsSpoolSpeaks(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 10, nil)
	d.ask(Ask{Gateway: anna, Seq: 1, Need: 6})
	d.ask(Ask{Gateway: anna, Seq: 2, Known: 6, Used: 2})
	d.now = 100 * second
	d.apply(Entry{})
	d.is("dead", d.e.State().Dead, int64(4))
	b, _ := d.ask(Ask{Gateway: bert, Seq: 1, Need: 5})
	d.is("bert", b.Verdict, Waiting)
	d.now += 100 * ms
	d.apply(Entry{})
	d.is("bert", d.said[bert].Verdict, DeniedEarly)
	d.ask(LastWord(anna, d.now, 3, 0))
	d.is("bert", d.said[bert].Verdict, Open)
	b, _ = d.ask(Ask{Gateway: bert, Seq: 2, Need: 5})
	d.is("bert", b.Granted, int64(5))
	s := d.e.State()
	d.is("settled", s.Settled, int64(3))
	d.is("dead", s.Dead, int64(0))
	// Whatever of it comes late changes nothing.
	a, fx := d.ask(Ask{Gateway: anna, Seq: 3, Known: 6, Used: 2, Need: 1})
	d.is("a late message", [2]bool{fx.Duplicate, a.Verdict == Ended}, [2]bool{true, true})
}

func TestAPolicyReleasesWhatTheDeadHeldUpToItsExposure(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 10, func(t *Terms) { t.ReleaseAfter, t.MaxExposure = second, 5 })
	d.ask(Ask{Gateway: anna, Seq: 1, Need: 4})
	d.ask(Ask{Gateway: bert, Seq: 1, Need: 6})
	d.now = 2 * second
	d.apply(Entry{})
	s := d.e.State()
	d.is("exposure", s.Exposure, int64(4))
	d.is("what does not fit stays dead", s.Dead, int64(6))
	c, _ := d.ask(Ask{Gateway: cleo, Seq: 1, Need: 4})
	d.is("cleo", c.Granted, int64(4))
	// Anna had used 3 of them: a measured overdraft.
	d.ask(LastWord(anna, d.now, 3, 0))
	d.ask(Ask{Gateway: cleo, Seq: 2, Known: 4, Used: 4})
	d.ask(LastWord(bert, d.now, 6, 0))
	s = d.e.State()
	d.is("late", s.Counts.Late, int64(3))
	d.is("overdraft", s.Overdraft, int64(3))
	d.is("settled", s.Settled, int64(13))
	d.is("exposure", s.Exposure, int64(0))
}

func TestALoweredAllowanceCallsBackAndARaisedOneUnblocks(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 100, nil)
	d.ask(Ask{Gateway: anna, Seq: 1, Need: 80})
	d.ask(Ask{Gateway: anna, Seq: 2, Known: 80, Used: 20})
	lower := int64(30)
	d.apply(Entry{Amount: &lower})
	d.is("lowered", d.e.State().Counts.Lowered, int64(50))
	d.is("anna's recall", d.said[anna].Recall, d.sequence)
	d.ask(Ask{Gateway: anna, Seq: 3, Seen: d.sequence, Known: 80, Used: 25, Returned: 55})
	d.is("excess", d.e.State().Excess, int64(0))
	b, _ := d.ask(Ask{Gateway: bert, Seq: 1, Need: 10})
	d.is("bert", b.Verdict, DeniedFinal)
	d.is("bert's room", b.Room, int64(5))
	higher := int64(35)
	d.apply(Entry{Amount: &higher})
	d.is("bert", d.said[bert].Verdict, Open)
	b, _ = d.ask(Ask{Gateway: bert, Seq: 2, Need: 10})
	d.is("bert", b.Granted, int64(10))
}

func TestUseWithoutALeaseTakesOfTheAllowanceAndACorrectionGivesBack(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 10, nil)
	d.ask(Ask{Gateway: anna, Seq: 1, Need: 8})
	d.apply(Entry{Outside: 5})
	d.is("excess", d.e.State().Excess, int64(3))
	d.is("anna's recall", d.said[anna].Recall, d.sequence)
	d.ask(Ask{Gateway: anna, Seq: 2, Seen: d.sequence, Known: 8, Used: 5, Returned: 3})
	b, _ := d.ask(Ask{Gateway: bert, Seq: 1, Need: 1})
	d.is("bert", b.Verdict, DeniedFinal)
	d.apply(Entry{Outside: -2})
	d.is("bert", d.said[bert].Verdict, Open)
	b, _ = d.ask(Ask{Gateway: bert, Seq: 2, Need: 2})
	d.is("bert", b.Granted, int64(2))
}

func TestAWindowGrantsNothingBeforeItBeginsAndAfterItEnds(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 100, func(t *Terms) { t.Start, t.End = second, 2*second })
	d.now = second - ms
	a, _ := d.ask(Ask{Gateway: anna, Seq: 1, Need: 1})
	d.is("before", a.Verdict, Waiting)
	d.now, _ = d.e.Due()
	d.is("due", d.now, second)
	d.apply(Entry{})
	d.is("granted", d.said[anna].Granted, int64(1))
	d.is("no lease outlives the window", d.said[anna].Expiry, 2*second)
	d.now = 2 * second
	b, _ := d.ask(Ask{Gateway: bert, Seq: 1, Need: 1})
	d.is("after", b.Verdict, Ended)
	// What was used in it is settled late.
	d.ask(Ask{Gateway: anna, Seq: 2, Known: 1, Used: 1, Closing: true})
	d.is("settled", d.e.State().Settled, int64(1))
}

func TestMessagesOfAForgottenLeaseBeginNoNewOne(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 100, nil)
	first := Ask{Gateway: anna, Seq: 1, Need: 10}
	last := Ask{Gateway: anna, Seq: 2, Known: 10, Used: 7, Closing: true}
	d.ask(first)
	d.ask(last)
	d.now = 6 * second
	d.apply(Entry{})
	d.is("leases while calls are still to be counted", d.e.State().Leases, 1)
	d.apply(Entry{Counted: []Counted{{anna, 7}}})
	d.apply(Entry{})
	d.is("leases", d.e.State().Leases, 0)
	before := d.e.State()
	for _, m := range []Ask{first, last} {
		fx := d.apply(Entry{Ask: &m}) // as it was sent, at time 0
		d.is("unknown", fx.Unknown, true)
	}
	before.Counts.Unknown = 2
	d.is("the state", d.e.State(), before)
	// A last word that overtakes all others leaves no room for them either.
	d.ask(Ask{Gateway: bert, Seq: 2, Closing: true})
	a, _ := d.ask(Ask{Gateway: bert, Seq: 1, Need: 10})
	d.is("granted", a.Granted, int64(0))
}

func TestWhatNoGatewayCanMeanIsRefused(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 100, nil)
	d.ask(Ask{Gateway: anna, Seq: 1, Need: 10})
	before := d.e.State()
	for name, m := range map[string]Ask{
		"no number":                 {Need: 1},
		"a negative amount":         {Seq: 2, Need: -1},
		"too large an amount":       {Seq: 2, Need: MaxUnits + 1},
		"more used than granted":    {Seq: 2, Known: 10, Used: 11},
		"a grant that never was":    {Seq: 2, Known: 11, Used: 11},
		"a last word that holds":    {Seq: 2, Known: 10, Held: 1, Closing: true},
		"a spool with more than is": LastWord(anna, 0, 11, 0),
	} {
		m.Gateway = anna
		if _, fx := d.ask(m); fx.Invalid == "" {
			t.Errorf("%s is accepted", name)
		}
	}
	d.is("the state", d.e.State(), before)
}

func TestACallTakesEveryLimitOrNone(t *testing.T) {
	t.Parallel()
	p := filled(3, 10)
	if out, at := Take([]Part{{p[0], 4}, {p[1], 11}, {p[2], 4}}, 1); out != Fetch || at != 1 {
		t.Errorf("outcome %d at %d", out, at)
	}
	for i := range p {
		if p[i].free.Load() != 10 || p[i].used.Load() != 0 {
			t.Errorf("purse %d has %d free, %d used", i, p[i].free.Load(), p[i].used.Load())
		}
	}
	// A refusal anywhere is told rather than what would have to be fetched.
	p[2].Receive(Answer{Gateway: Gateway{1}, Epoch: 1, Revision: 2, Granted: 10, Verdict: DeniedFinal, Room: 2}, 1)
	p[2].denial.Load().until = never
	if out, at := Take([]Part{{p[0], 4}, {p[1], 11}, {p[2], 14}}, 1); out != Refused || at != 2 {
		t.Errorf("outcome %d at %d", out, at)
	}
	if out, _ := Take([]Part{{p[0], 4}, {p[1], 4}, {p[2], -4}}, 1); out.OK() {
		t.Error("a negative amount is taken")
	}
}

func TestUseStopsBeforeTheLeaseEndsAndABlockEndsInAQuestion(t *testing.T) {
	t.Parallel()
	h := Habits{Skew: 10 * ms, Term: second, ReportEvery: ms, RetryAfter: ms, Recheck: 10 * second, FirstWant: 1, MaxWant: 1}
	p := NewPurse(anna, 2*second, h)
	p.Receive(Answer{Gateway: anna, Epoch: 2, Revision: 5, Granted: 3, Expiry: second}, 0)
	one := []Part{{p, 1}}
	out := func(now Micros) Outcome { o, _ := Take(one, now); return o }
	if o := out(second - 10*ms - 1); !o.OK() {
		t.Errorf("before the end: %d", o)
	}
	if o := out(second - 10*ms); o != Fetch {
		t.Errorf("less than the skew before the end: %d", o)
	}
	m, ok := p.Next(second - 10*ms)
	if !ok || m.Used != 1 || m.Returned != 2 {
		t.Errorf("what is left goes back: %+v", m)
	}
	// An owner of the past has no say.
	p.Receive(Answer{Gateway: anna, Epoch: 1, Revision: 9, Seq: 1, Granted: 9, Expiry: 2 * second}, second)
	if o := out(second); o != Fetch {
		t.Errorf("after an answer of a former owner: %d", o)
	}
	p.Receive(Answer{Gateway: anna, Epoch: 2, Revision: 6, Seq: 1, Granted: 3, Expiry: second, Verdict: DeniedFinal}, second)
	if o := out(2*second - 10*ms - 1); o != Refused {
		t.Errorf("in the window: %d", o)
	}
	if o := out(2*second - 10*ms); o != Over {
		t.Errorf("when nobody can tell the window: %d", o)
	}
	// The ledger's word on it is better than our clock's.
	p.Receive(Answer{Gateway: anna, Epoch: 2, Revision: 7, Seq: 1, Granted: 3, Expiry: second, Verdict: Ended}, second)
	if o := out(second); o != Over {
		t.Errorf("after the ledger has said so: %d", o)
	}
}

func TestAnOlderAnswerChangesNoVerdict(t *testing.T) {
	t.Parallel()
	h := Habits{Term: second, ReportEvery: ms, RetryAfter: ms, Recheck: second, FirstWant: 1, MaxWant: 1}
	p := NewPurse(anna, 0, h)
	p.Need(1, second)
	m, _ := p.Next(0)
	denied := Answer{Gateway: anna, Epoch: 1, Revision: 5, Seq: m.Seq, Verdict: DeniedFinal}
	p.Receive(denied, 0)
	if o := p.Outcome(1, 0); o != Refused {
		t.Errorf("denied: %d", o)
	}
	p.Receive(Answer{Gateway: anna, Epoch: 1, Revision: 7, Seq: m.Seq, Verdict: Open}, 0)
	p.Receive(denied, 0)
	if o := p.Outcome(1, 0); o != Fetch {
		t.Errorf("unblocked, and the denial once more: %d", o)
	}
	// A denial of what was asked before is none of what is asked now.
	p.Need(2, second)
	p.Next(0)
	p.Receive(Answer{Gateway: anna, Epoch: 1, Revision: 8, Seq: m.Seq, Verdict: DeniedFinal}, 0)
	if o := p.Outcome(1, 0); o != Fetch {
		t.Errorf("asked again, and denied for the ask before: %d", o)
	}
}

func TestARecallTakesAlsoWhatIsTooLittleForACallThatWaits(t *testing.T) {
	t.Parallel()
	p := filled(1, 3)[0]
	p.Need(5, second)
	if m, ok := p.Next(1); !ok || m.Need != 2 || m.Returned != 0 {
		t.Errorf("before: %+v", m)
	}
	p.Receive(Answer{Gateway: Gateway{1}, Epoch: 1, Revision: 2, Seq: 1, Granted: 3, Verdict: Waiting, Recall: 2}, 2)
	if m, ok := p.Next(2); !ok || m.Need != 5 || m.Returned != 3 || m.Seen != 2 {
		t.Errorf("after: %+v", m)
	}
	// With nothing to give back the recall is answered too, once.
	p.Receive(Answer{Gateway: Gateway{1}, Epoch: 1, Revision: 3, Seq: 2, Granted: 3, Verdict: Waiting, Recall: 3}, 3)
	if m, ok := p.Next(3); !ok || m.Seen != 3 {
		t.Errorf("another: %+v, %v", m, ok)
	}
	if m, ok := p.Next(3); ok {
		t.Errorf("and again: %+v", m)
	}
}

func TestALastWordWaitsForWhoeverIsBetweenTakingAndUsing(t *testing.T) {
	t.Parallel()
	p := filled(1, 10)[0]
	p.seq, p.answered = 1, 1
	p.free.Add(-3) // a call that has taken them and is not yet counted as used
	p.Close()
	if m, _ := p.Next(1); m.Closing || m.Returned != 7 {
		t.Errorf("before it is counted: %+v", m)
	}
	p.used.Add(3)
	if m, ok := p.Next(2); !ok || !m.Closing || m.Used != 3 || m.Returned != 7 {
		t.Errorf("after: %+v", m)
	}
	if p.Done() {
		t.Error("it is done before anybody has heard of it")
	}
	p.Receive(Answer{Gateway: Gateway{1}, Epoch: 1, Revision: 9, Seq: p.seq, Granted: 10, Verdict: Ended}, 3)
	if !p.Done() {
		t.Error("it is not done")
	}
}

func TestAReservationIsResolvedOnceAndNothingIsDropped(t *testing.T) {
	t.Parallel()
	// What is free, used, held and beyond of a lease of 100 of which 10 + 20 were
	// reserved until 50 and 20 was the rest of what was not returned.
	type left struct{ free, used, held, over int64 }
	for name, c := range map[string]struct {
		release int64
		do      func(h *Hold, hs *Holds) Resolution
		want    Resolution
		left    left
	}{
		"settled below":            {0, func(h *Hold, _ *Holds) Resolution { r, _ := h.Settle([]int64{4}, 10); return r }, Settled, left{26, 4, 0, 0}},
		"nothing said":             {0, func(h *Hold, _ *Holds) Resolution { r, _ := h.Settle(nil, 10); return r }, Settled, left{20, 10, 0, 0}},
		"settled above, into free": {0, func(h *Hold, _ *Holds) Resolution { r, _ := h.Settle([]int64{25}, 10); return r }, Settled, left{5, 25, 0, 0}},
		"settled above all":        {0, func(h *Hold, _ *Holds) Resolution { r, _ := h.Settle([]int64{37}, 10); return r }, Settled, left{0, 30, 0, 7}},
		"voided":                   {0, func(h *Hold, _ *Holds) Resolution { return h.Void(10) }, Voided, left{30, 0, 0, 0}},
		"late, not swept":          {0, func(h *Hold, _ *Holds) Resolution { r, _ := h.Settle([]int64{4}, 50); return r }, Late, left{26, 4, 0, 0}},
		"late, swept":              {0, func(h *Hold, hs *Holds) Resolution { hs.Sweep(50); r, _ := h.Settle([]int64{4}, 60); return r }, Late, left{26, 4, 0, 0}},
		"late, released":           {10, func(h *Hold, hs *Holds) Resolution { hs.Sweep(50); r, _ := h.Settle([]int64{34}, 60); return r }, Late, left{0, 30, 0, 4}},
		"late, no room to release": {9, func(h *Hold, hs *Holds) Resolution { r, _ := h.Settle([]int64{4}, 50); return r }, Late, left{26, 4, 0, 0}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := filled(1, 30)[0]
			p.habits.ReleaseHolds = c.release
			hs := NewHolds(4)
			h, out, _ := hs.Reserve([]Part{{p, 10}}, 1, 50)
			if !out.OK() || p.free.Load() != 20 || p.held.Load() != 10 {
				t.Fatalf("outcome %d", out)
			}
			if r := c.do(h, hs); r != c.want {
				t.Errorf("resolved as %d, want %d", r, c.want)
			}
			if r, _ := h.Settle([]int64{9}, 100); r != Already {
				t.Errorf("a second time: %d", r)
			}
			if r := h.Void(100); r != Already {
				t.Errorf("a third time: %d", r)
			}
			if got := (left{p.free.Load(), p.used.Load(), p.held.Load(), p.over.Load()}); got != c.left {
				t.Errorf("left is %+v, want %+v", got, c.left)
			}
			if p.exposed.Load() != 0 {
				t.Errorf("%d units are exposed", p.exposed.Load())
			}
		})
	}
}

func TestReservationsAreBounded(t *testing.T) {
	t.Parallel()
	p := filled(1, 100)[0]
	hs := NewHolds(2)
	first, _, _ := hs.Reserve([]Part{{p, 10}}, 1, 50)
	hs.Reserve([]Part{{p, 10}}, 1, 60)
	if _, out, _ := hs.Reserve([]Part{{p, 10}}, 1, 70); out != Full || p.free.Load() != 80 {
		t.Errorf("a third: %d, %d free", out, p.free.Load())
	}
	hs.Sweep(60)
	if _, out, _ := hs.Reserve([]Part{{p, 10}}, 61, 70); !out.OK() {
		t.Errorf("in the place of one that expired: %d", out)
	}
	if r, _ := first.Settle([]int64{1}, 61); r != Forgotten {
		t.Errorf("the one that was forgotten: %d", r)
	}
	if r := first.Void(61); r != Already {
		t.Errorf("the one that was forgotten, again: %d", r)
	}
	if p.held.Load() != 30 || p.free.Load() != 70 {
		t.Errorf("%d held, %d free: what was forgotten must stay held", p.held.Load(), p.free.Load())
	}
}

func TestBrokenSnapshotsAreRefused(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 100, nil)
	d.ask(Ask{Gateway: anna, Seq: 1, Need: 10})
	whole := d.e.Append(nil)
	for n := range whole {
		if _, _, err := Read(whole[:n], d.e.terms); err == nil {
			t.Errorf("the first %d of %d bytes are read", n, len(whole))
		}
	}
	whole[0]++
	if _, _, err := Read(whole, d.e.terms); err == nil {
		t.Error("another version is read")
	}
}

func TestTheLargerOfTwoTotalsOfTheSameUseHolds(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 100, nil)
	d.ask(Ask{Gateway: anna, Seq: 1, Need: 10})
	d.apply(Entry{Counted: []Counted{{anna, 4}}})
	d.is("settled by the count", d.e.State().Settled, int64(4))
	d.is("outstanding", d.e.State().Outstanding, int64(6))
	d.ask(Ask{Gateway: anna, Seq: 2, Known: 10, Used: 3})
	d.is("an older word", d.e.State().Settled, int64(4))
	d.ask(Ask{Gateway: anna, Seq: 3, Known: 10, Used: 7})
	d.is("a newer word", d.e.State().Settled, int64(7))
	d.apply(Entry{Counted: []Counted{{anna, 3}}})
	d.is("counted after it was said", d.e.State().Settled, int64(7))
	d.ask(Ask{Gateway: anna, Seq: 4, Known: 10, Used: 7, Returned: 3, Closing: true})
	d.is("in the end", d.e.State().Settled+d.e.State().Outstanding, int64(7))
}

// What was counted may have cost more than was reserved: that is not known
// before the gateway says so.
func TestCountedUseThatWasBeyondTheLeaseIsFoundToBeSo(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 100, nil)
	d.ask(Ask{Gateway: anna, Seq: 1, Need: 10})
	d.apply(Entry{Counted: []Counted{{anna, 12}}})
	d.is("above what was out", d.e.State().Counts.Above, int64(2))
	d.is("outstanding", d.e.State().Outstanding, int64(0))
	d.ask(Ask{Gateway: anna, Seq: 2, Known: 10, Used: 7, Over: 5})
	s := d.e.State()
	d.is("settled", s.Settled, int64(12))
	d.is("above", s.Counts.Above, int64(5))
	d.is("outstanding: what may yet be used", s.Outstanding, int64(3))
	d.ask(Ask{Gateway: anna, Seq: 3, Known: 10, Used: 7, Over: 5, Returned: 3})
	d.is("outstanding", d.e.State().Outstanding, int64(0))
	d.is("settled", d.e.State().Settled, int64(12))
}

func TestUseOfALeaseThatIsNoMoreIsSettledAllTheSame(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 10, func(terms *Terms) { terms.ReleaseAfter, terms.MaxExposure = second, 10 })
	d.apply(Entry{Counted: []Counted{{bert, 2}}})
	d.is("of a lease that nobody knows", d.e.State().Counts.Outside, int64(2))
	d.ask(Ask{Gateway: anna, Seq: 1, Need: 5})
	d.apply(Entry{Ended: &End{Gateway: anna}})
	d.is("outstanding after the end", d.e.State().Outstanding, int64(0))
	d.apply(Entry{Counted: []Counted{{anna, 1}}})
	d.is("after its end", d.e.State().Counts.Late, int64(1))
	d.ask(Ask{Gateway: cleo, Seq: 1, Need: 5})
	d.now = 2*second + 1
	d.apply(Entry{})
	d.is("given up", d.e.State().Exposure, int64(5))
	d.apply(Entry{Counted: []Counted{{cleo, 3}}})
	s := d.e.State()
	d.is("given up still", s.Exposure, int64(2))
	d.is("late", s.Counts.Late, int64(4))
	d.is("settled", s.Settled, int64(6))
	d.apply(Entry{Ended: &End{Gateway: cleo}})
	d.is("given up after its end", d.e.State().Exposure, int64(0))
}

func TestAnEndByTheLogClosesTheLease(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 10, nil)
	d.ask(Ask{Gateway: anna, Seq: 1, Need: 10})
	d.ask(Ask{Gateway: bert, Seq: 1, Need: 4})
	d.apply(Entry{Counted: []Counted{{anna, 6}}})
	d.apply(Entry{Ended: &End{Gateway: anna}})
	d.is("bert, who waited", d.said[bert].Granted, int64(4))
	a, _ := d.ask(Ask{Gateway: anna, Seq: 2, Known: 10, Used: 6, Need: 1})
	d.is("anna", a.Verdict, Ended)
	d.is("settled", d.e.State().Settled, int64(6))
	// Its last word may come after the log's.
	_, fx := d.ask(Ask{Gateway: anna, Seq: 3, Known: 10, Used: 6, Returned: 4, Closing: true})
	d.is("invalid", fx.Invalid, "")
	d.is("settled", d.e.State().Settled, int64(6))
	d.apply(Entry{Ended: &End{Gateway: cleo}})
	d.is("leases", d.e.State().Leases, 2)
}

func TestTermsChangeWhileTheWindowGoesOn(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 10, nil)
	d.ask(Ask{Gateway: anna, Seq: 1, Need: 1})
	d.apply(Entry{Terms: &Terms{Start: 5, End: 7, Term: 3 * second, Patience: second, Horizon: second, MaxLeases: 1}})
	d.is("the window", d.e.terms.End, Micros(0))
	a, _ := d.ask(Ask{Gateway: anna, Seq: 2, Known: 1, Need: 1})
	d.is("expiry", a.Expiry, 3*second)
}

func TestAKilledGatewaysMarkGivesBackWhatIsBeyondIt(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 100, func(terms *Terms) { terms.End = 1000 * second })
	d.ask(Ask{Gateway: anna, Seq: 1, Need: 60})
	d.apply(Entry{Counted: []Counted{{anna, 10}}})
	d.apply(Entry{Ended: &End{anna, 25}})
	s := d.e.State()
	d.is("settled", s.Settled, int64(10))
	d.is("outstanding: calls that were under way may have used it", s.Outstanding, int64(15))
	d.is("dead", s.Dead, int64(15))
	a, _ := d.ask(Ask{Gateway: anna, Seq: 2, Known: 60, Used: 12, Need: 5})
	d.is("its word from before", [2]bool{a.Verdict == Ended, a.Granted == 0}, [2]bool{true, true})
	d.is("what it says it used", d.e.State().Settled, int64(12))
	d.apply(Entry{Counted: []Counted{{anna, 4}}})
	d.is("calls that come all the same", d.e.State().Settled, int64(14))
	d.is("outstanding", d.e.State().Outstanding, int64(11))
	d.apply(Entry{Ended: &End{anna, 0}})
	d.is("an end that comes twice", d.e.State().Outstanding, int64(11))
	b, _ := d.ask(Ask{Gateway: bert, Seq: 1, Need: 75})
	d.is("bert", b.Granted, int64(75))
	b, _ = d.ask(Ask{Gateway: bert, Seq: 2, Known: 75, Need: 1})
	d.is("bert, who asks for more", [2]any{b.Verdict, b.Granted}, [2]any{DeniedEarly, int64(75)})
	// It is remembered as long as some of it is out.
	d.now += 900 * second
	d.apply(Entry{})
	d.is("leases after a long time", d.e.State().Leases, 2)
	read, _, err := Read(d.e.Append(nil), d.e.terms)
	if err != nil || read.State() != d.e.State() {
		t.Errorf("a snapshot: %+v, %v", read.State(), err)
	}
}

func TestWhatAMarkKeepsIsGivenUpInTheLeasedTier(t *testing.T) {
	t.Parallel()
	d := newDesk(t, 10, func(terms *Terms) { terms.ReleaseAfter, terms.MaxExposure = second, 10 })
	d.ask(Ask{Gateway: anna, Seq: 1, Need: 10})
	d.apply(Entry{Ended: &End{anna, 4}})
	d.is("outstanding", d.e.State().Outstanding, int64(4))
	due, _ := d.e.Due()
	d.now = due
	d.apply(Entry{})
	s := d.e.State()
	d.is("given up", [3]int64{s.Outstanding, s.Exposure, s.Counts.Released}, [3]int64{0, 4, 4})
	d.apply(Entry{Counted: []Counted{{anna, 3}}})
	d.is("late", d.e.State().Counts.Late, int64(3))
}

func TestUnitsAreUsedUpToTheMarkThatIsNoted(t *testing.T) {
	t.Parallel()
	h := Habits{Skew: ms, Term: second, ReportEvery: ms, RetryAfter: ms, Recheck: second, FirstWant: 1, MaxWant: 1, Sealed: true}
	p := NewPurse(anna, 0, h)
	mark := func(what string, now Micros, want int64) {
		t.Helper()
		if m, ok := p.Mark(now); ok != (want > 0) || ok && m != want {
			t.Errorf("%s: mark %d, %v, want %d", what, m, ok, want)
		}
	}
	take := func(n int64) Outcome { o, _ := Take([]Part{{p, n}}, 1); return o }
	mark("nobody wants anything", 0, 0)
	p.Need(2, second)
	mark("a call waits: before its units are there", 0, 16)
	m, _ := p.Next(0)
	p.Unlocked(16)
	p.Receive(Answer{Gateway: anna, Epoch: 1, Revision: 1, Seq: m.Seq, Granted: 400, Expiry: second}, 0)
	if p.free.Load() != 16 || p.sealed != 384 {
		t.Fatalf("%d free, %d sealed", p.free.Load(), p.sealed)
	}
	mark("ahead of who comes: little is free beside what is sealed", 1, 66)
	if o := take(17); o != Fetch {
		t.Errorf("beyond the mark: %d", o)
	}
	p.Need(17, second)
	mark("a call that needs more than is free", 1, 66)
	if m, ok := p.Next(1); ok {
		t.Errorf("what is sealed has not to be asked for: %+v", m)
	}
	p.Unlocked(66)
	if o := take(17); o != Admitted {
		t.Errorf("then: %d", o)
	}
	mark("nobody waits any more", 1, 0)
	if o := take(25); o != AdmittedLow {
		t.Errorf("when half of a step is left: %d", o)
	}
	mark("ahead of who comes", 1, 116)
	p.Unlocked(116)
	// What goes back was free or sealed; the mark stays, as what was used.
	p.Close()
	m, _ = p.Next(2)
	if m.Used != 42 || m.Returned != 358 || !m.Closing || p.sealed != 0 {
		t.Errorf("the last word: %+v", m)
	}
	mark("at the end", 2, 0)
}

func TestAMarkThatIsFartherThanWhatIsOpenUnlocksTheNextGrant(t *testing.T) {
	t.Parallel()
	h := Habits{Term: second, ReportEvery: ms, RetryAfter: ms, Recheck: second, FirstWant: 1, MaxWant: 1, Sealed: true}
	p := NewPurse(anna, 0, h)
	p.Need(10, second)
	m, _ := p.Next(0)
	p.Receive(Answer{Gateway: anna, Epoch: 1, Revision: 1, Seq: m.Seq, Granted: 20, Expiry: second}, 0)
	p.Unlocked(20)
	p.Receive(Answer{Gateway: anna, Epoch: 1, Revision: 2, Seq: m.Seq, Granted: 20, Expiry: second, Recall: 2}, 0)
	if m, _ = p.Next(0); m.Returned != 20 {
		t.Fatalf("a recall: %+v", m)
	}
	p.Receive(Answer{Gateway: anna, Epoch: 1, Revision: 3, Seq: m.Seq, Granted: 50, Expiry: second}, 0)
	if p.free.Load() != 20 || p.sealed != 10 {
		t.Errorf("%d free, %d sealed: 20 can have been used by what is noted, and none was", p.free.Load(), p.sealed)
	}
}
