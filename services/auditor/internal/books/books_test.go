package books

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/segmentio/ksuid"
	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/audit"
	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/fold"
)

const begin = usage.Micros(1_700_000_040_000_000) // a minute's beginning

var clock = begin.Time()

// gateway seals frames, and claims them.
type gateway struct {
	id      ksuid.KSUID
	lanes   map[uint32]*audit.Lane
	number  map[uint32]uint64
	message uint64
}

func newGateway(n byte) *gateway {
	g := &gateway{lanes: map[uint32]*audit.Lane{}, number: map[uint32]uint64{}}
	g.id[0], g.id[19] = 1, n
	return g
}

func (g *gateway) seal(shard uint32, at usage.Micros, calls ...usage.Call) []byte {
	l := g.lanes[shard]
	if l == nil {
		l = audit.NewLane(g.id.String(), shard, 1000)
		g.lanes[shard] = l
	}
	g.number[shard]++
	var b ledger.Builder
	for i := range calls {
		l.Add(g.number[shard], &calls[i])
		b.Add(&calls[i])
	}
	l.Seal(at)
	return b.Seal(ledger.Header{Producer: g.id, Shard: shard, Number: g.number[shard], SealedAt: at})
}

func (g *gateway) claim() [][]byte {
	var all []audit.Claim
	for shard := range uint32(4) {
		if l := g.lanes[shard]; l != nil {
			all = append(all, l.Take()...)
		}
	}
	out := audit.Encode(dedup.Producer(g.id), g.message+1, all)
	g.message += uint64(len(out))
	return out
}

// world is a ledger and the books of it.
type world struct {
	t        interface{ Fatal(...any) }
	b        *Books
	sequence uint64
	claims   uint64
	now      time.Time
	outcomes []Outcome
}

func (w *world) frame(data []byte) {
	var f ledger.Frame
	if err := f.Decode(data); err != nil {
		w.t.Fatal(err)
	}
	w.sequence++
	w.b.Calls(w.sequence, begin+usage.Micros(w.sequence), &f, w.now)
	w.hear()
}

func (w *world) claim(messages ...[]byte) {
	for _, data := range messages {
		w.claims++
		if err := w.b.Claims(w.claims, data, w.now); err != nil {
			w.t.Fatal(err)
		}
	}
	w.hear()
}

func (w *world) pass(d time.Duration) {
	w.now = w.now.Add(d)
	w.b.Tick(w.now, Heard{d, d})
	w.hear()
}

// away is that time passes in which nothing is heard.
func (w *world) away(d time.Duration) {
	w.now = w.now.Add(d)
	w.b.Tick(w.now, Heard{})
	w.hear()
}

func (w *world) hear() {
	for _, o := range w.b.Out() {
		if o.Pair == GatewayLedger {
			w.outcomes = append(w.outcomes, o)
		}
	}
}

func call(account string, tokens int64) usage.Call {
	c := usage.Call{Time: begin, Account: account, Status: 200}
	c.Quantities.Set(usage.InputTokens, tokens)
	return c
}

// TestHealthyTrafficGivesNothing: frames and claims of several gateways, in any
// interleaving that keeps each one's order, with copies of frames and of
// messages, foreign events that come twice, and restarts from a snapshot.
func TestHealthyTrafficGivesNothing(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w := &world{t: t, b: New(Options{}), now: clock}
		gateways := []*gateway{newGateway(1), newGateway(2)}
		var frames, claims [][][]byte // on their way, by gateway
		frames, claims = make([][][]byte, len(gateways)), make([][][]byte, len(gateways))
		var sent [][]byte
		for step := range rapid.IntRange(1, 60).Draw(t, "steps") {
			g := rapid.IntRange(0, len(gateways)-1).Draw(t, "gateway")
			switch rapid.IntRange(0, 7).Draw(t, "what") {
			case 0, 1:
				var calls []usage.Call
				for range rapid.IntRange(1, 4).Draw(t, "calls") {
					c := call(rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "account"), int64(step))
					switch rapid.IntRange(0, 3).Draw(t, "kind") {
					case 0:
						c.Code = usage.QuotaExceeded
					case 1:
						c.Source, c.EventID = "s", fmt.Sprint(rapid.IntRange(0, 5).Draw(t, "event"))
					}
					calls = append(calls, c)
				}
				at := begin + usage.Micros(rapid.IntRange(0, 3).Draw(t, "minute"))*60_000_000
				frames[g] = append(frames[g], gateways[g].seal(uint32(rapid.IntRange(0, 1).Draw(t, "shard")), at, calls...))
			case 2, 3:
				if len(frames[g]) > 0 {
					w.frame(frames[g][0])
					sent = append(sent, frames[g][0])
					frames[g] = frames[g][1:]
				}
			case 4:
				claims[g] = append(claims[g], gateways[g].claim()...)
			case 5:
				if len(claims[g]) > 0 {
					w.claim(claims[g][0])
					if rapid.Bool().Draw(t, "twice") {
						w.claim(claims[g][0])
					}
					claims[g] = claims[g][1:]
				}
			case 6:
				if len(sent) > 0 {
					w.frame(rapid.SampledFrom(sent).Draw(t, "copy"))
				}
			case 7:
				w.restart(t)
			}
		}
		for g := range gateways {
			for _, f := range frames[g] {
				w.frame(f)
			}
			w.claim(claims[g]...)
			w.claim(gateways[g].claim()...)
		}
		w.pass(time.Hour)
		if len(w.outcomes) > 0 {
			t.Fatalf("found: %+v", w.outcomes)
		}
		if s := w.b.Stats(); s.Unclaimed != 0 || s.Held != 0 || s.Waiting != 0 || s.LateClaims != 0 {
			t.Fatalf("left over: %+v", s)
		}
	})
}

// restart goes on with books that were stored, in the middle of an open round.
func (w *world) restart(t *rapid.T) {
	data, err := w.b.Marshal("ledger", nil)
	if err != nil {
		t.Fatal(err)
	}
	before := w.b.Stats()
	if w.b, _, err = Unmarshal(Options{}, "ledger", data); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, w.b.Stats()); diff != "" {
		t.Fatalf("after a restart: %s", diff)
	}
}

// TestOneFrameThatIsLostOnItsWayIsFound, by what was in it, whether a later frame
// shows it or only time does.
func TestOneFrameThatIsLostOnItsWayIsFound(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w := &world{t: t, b: New(Options{Overdue: time.Minute}), now: clock}
		g := newGateway(1)
		n := rapid.IntRange(1, 6).Draw(t, "frames")
		lost := rapid.IntRange(0, n-1).Draw(t, "lost")
		claimedFirst := rapid.Bool().Draw(t, "claimed first")
		var frames [][]byte
		for i := range n {
			frames = append(frames, g.seal(1, begin+usage.Micros(i)*60_000_000, call(fmt.Sprint("account-", i), 7)))
		}
		if claimedFirst {
			w.claim(g.claim()...)
		}
		for i, f := range frames {
			if i != lost {
				w.frame(f)
			}
		}
		if !claimedFirst {
			w.claim(g.claim()...)
		}
		w.pass(2 * time.Minute)
		if len(w.outcomes) != 1 || len(w.outcomes[0].Differences) != 1 {
			t.Fatalf("found: %+v", w.outcomes)
		}
		d := w.outcomes[0].Differences[0]
		if d.Kind != audit.Gap || d.Account != fmt.Sprint("account-", lost) || d.Minute != audit.MinuteOf(begin)+audit.Minute(lost) || d.Want.Sums[usage.InputTokensIndex] != 7 {
			t.Fatalf("found: %+v", d)
		}
		if lost == n-1 {
			// The last one was only late.
			w.frame(frames[lost])
			if last := w.outcomes[len(w.outcomes)-1]; len(w.outcomes) != 2 || last.Differences != nil || last.Origin != w.outcomes[0].Origin {
				t.Fatalf("it came, and was not healed: %+v", w.outcomes)
			}
		}
	})
}

// An auditor that was away, or whose NATS was, has not had the time to hear of frames
// and of claims: they are overdue by what was heard, not by the clock.
func TestWhatThereWasNoTimeToHearIsNotOverdue(t *testing.T) {
	t.Parallel()
	w := &world{t: t, b: New(Options{Overdue: time.Minute, Unclaimed: time.Minute}), now: clock}
	g, other := newGateway(1), newGateway(2)
	late := g.seal(1, begin, call("a", 7))
	w.claim(g.claim()...)
	w.frame(other.seal(2, begin, call("b", 7)))
	w.away(40 * time.Second)
	w.pass(30 * time.Second)
	data, err := w.b.Marshal("ledger", nil)
	if err != nil {
		t.Fatal(err)
	}
	if w.b, _, err = Unmarshal(Options{Overdue: time.Minute, Unclaimed: time.Minute}, "ledger", data); err != nil {
		t.Fatal(err)
	}
	w.away(time.Hour)
	w.pass(20 * time.Second)
	if s := w.b.Stats(); len(w.outcomes) != 0 || s.Unclaimed != 0 {
		t.Fatalf("it was told before it was heard for a minute: %+v, %+v", w.outcomes, s)
	}
	w.claim(other.claim()...)
	if s := w.b.Stats(); s.Claimed != 1 || s.LateClaims != 0 {
		t.Errorf("the claim came in time: %+v", s)
	}
	w.pass(20 * time.Second)
	if len(w.outcomes) != 1 || w.outcomes[0].Differences == nil {
		t.Fatalf("heard for 70 s, before the restart and after it, and it is no gap: %+v", w.outcomes)
	}
	w.frame(late)
	if len(w.outcomes) != 2 || w.outcomes[1].Differences != nil {
		t.Errorf("it came, and was not healed: %+v", w.outcomes)
	}
}

// A killed auditor goes on with books from before it told a gap: that the gap has healed
// meanwhile is told by the ones that read on.
func TestAGapThatOlderBooksDoNotKnowOfHeals(t *testing.T) {
	t.Parallel()
	w := &world{t: t, b: New(Options{Overdue: time.Minute}), now: clock}
	g := newGateway(1)
	late := g.seal(1, begin, call("a", 7))
	claim := g.claim()
	w.claim(claim...)
	w.pass(2 * time.Minute)
	if len(w.outcomes) != 1 {
		t.Fatalf("found: %+v", w.outcomes)
	}
	w.b = New(Options{Overdue: time.Minute})
	w.b.Told(w.outcomes[0].Origin)
	w.frame(late)
	w.claim(claim...)
	w.frame(g.seal(1, begin, call("a", 7)))
	w.claim(g.claim()...)
	if len(w.outcomes) != 2 || w.outcomes[1].Differences != nil || w.outcomes[1].Origin != w.outcomes[0].Origin {
		t.Errorf("not healed, or told twice: %+v", w.outcomes)
	}
}

func TestWhatAKilledGatewayNeverClaimedIsUnclaimedAndNoGap(t *testing.T) {
	t.Parallel()
	w := &world{t: t, b: New(Options{Unclaimed: time.Minute}), now: clock}
	g := newGateway(1)
	w.frame(g.seal(1, begin, call("a", 1)))
	w.claim(g.claim()...)
	w.frame(g.seal(1, begin, call("a", 1), call("b", 1)))
	// Killed. Its spool has the third frame, and the next gateway sends and claims it.
	third := g.seal(1, begin, call("c", 1))
	again := audit.NewLaneAgain(g.id.String(), 1, 100)
	c := call("c", 1)
	again.Add(3, &c)
	again.Seal(begin)
	w.claim(audit.Encode(dedup.Producer(g.id), 1, again.Take())...)
	w.frame(third)
	w.pass(2 * time.Minute)
	if s := w.b.Stats(); len(w.outcomes) != 0 || s.Unclaimed != 2 || s.Claimed != 2 || s.Held != 0 {
		t.Errorf("found %+v, %+v", w.outcomes, s)
	}
	// The claim that comes after that can't be compared any more.
	w.claim(g.claim()...)
	if len(w.outcomes) != 0 {
		t.Errorf("found %+v", w.outcomes)
	}
}

func TestClosedProducersAreForgotten(t *testing.T) {
	t.Parallel()
	w := &world{t: t, b: New(Options{Unclaimed: time.Minute}), now: clock}
	g := newGateway(1)
	w.frame(g.seal(1, begin, call("a", 1)))
	w.sequence++
	w.b.Control(1, w.sequence, begin, &tollkeeperv1.ControlEntry{Id: "x", Body: &tollkeeperv1.ControlEntry_ProducerClosed{ProducerClosed: &tollkeeperv1.ProducerClosed{Producer: g.id.Bytes(), LastNumber: 1}}}, w.now)
	w.pass(30 * time.Second)
	w.claim(g.claim()...) // its last word comes after its end
	if s := w.b.Stats(); s.Claimed != 1 || len(w.b.lanes) != 1 {
		t.Errorf("%+v", s)
	}
	w.pass(2 * time.Minute)
	if len(w.b.lanes) != 0 || len(w.outcomes) != 0 {
		t.Errorf("%d lanes are remembered", len(w.b.lanes))
	}
}

// By other rules other calls count twice: what an older program compared would differ,
// or agree, without reason.
func TestTheBooksEndWhereNewerRulesBegin(t *testing.T) {
	t.Parallel()
	w := &world{t: t, b: New(Options{}), now: clock}
	g := newGateway(1)
	w.frame(g.seal(1, begin, call("a", 1)))
	rules := func(v uint32) *tollkeeperv1.ControlEntry {
		return &tollkeeperv1.ControlEntry{Id: "x", Body: &tollkeeperv1.ControlEntry_CoreVersion{CoreVersion: &tollkeeperv1.CoreVersion{Version: v, ForeignHorizonMicros: 1}}}
	}
	at := w.b.Position
	if newer := w.b.Control(1, at+1, begin, rules(quota.CoreVersion+1), w.now); newer == nil || newer.Sequence != at+1 || newer.Shard != 1 || w.b.Position != at {
		t.Errorf("%v, and the books are at %d", newer, w.b.Position)
	}
	if newer := w.b.Control(1, at+1, begin, rules(quota.CoreVersion), w.now); newer != nil || w.b.Position != at+1 {
		t.Errorf("known rules are %v, and the books are at %d", newer, w.b.Position)
	}
	w.b.shards[1].version = quota.CoreVersion + 1 // as a newer program would write it
	data, err := w.b.Marshal("x", nil)
	if err != nil {
		t.Fatal(err)
	}
	var newer *quota.NewerError
	if _, _, err := Unmarshal(Options{}, "x", data); !errors.As(err, &newer) {
		t.Errorf("a newer program's books gave %v", err)
	}
}

func TestMemoryIsBounded(t *testing.T) {
	t.Parallel()
	w := &world{t: t, b: New(Options{Cells: 10, Accounts: 5}), now: clock}
	g := newGateway(1)
	for i := range 100 {
		w.frame(g.seal(1, begin, call(fmt.Sprint("account-", i), 1)))
	}
	s := w.b.Stats()
	if s.Held > 10 || s.Open > 10 || s.Accounts != 5 || s.Unclaimed < 80 || s.Beyond != 95 {
		t.Errorf("%+v", s)
	}
	round := w.b.Cut()
	total := audit.Tally{}
	for x := range round.Cells.All() {
		total.Plus(&x.Tally)
	}
	if total.Count != 100 || round.From != 1 || round.To != 100 {
		t.Errorf("the round has %d calls from %d to %d", total.Count, round.From, round.To)
	}
}

func reply(sequence uint64, total ledger.Totals, accounts map[string]ledger.Totals) *ledger.UsageReply {
	r := &ledger.UsageReply{Shard: 1, Sequence: sequence, Total: total}
	for id, t := range accounts {
		r.Accounts = append(r.Accounts, ledger.AccountUsage{ID: id, Own: t})
	}
	return r
}

func totals(admitted, refused, tokens int64, calls ...uint64) ledger.Totals {
	t := ledger.Totals{Admitted: admitted, Refused: refused, Meters: map[usage.Meter]int64{usage.InputTokens: tokens}}
	for _, hash := range calls {
		t.Hash += hash
	}
	return t
}

// row is the hash of a call of the gateway.
func (g *gateway) row(shard uint32, number uint64, index int) uint64 {
	return audit.RowHash(audit.FrameHash(audit.ProducerHash(g.id.String()), shard, number), index)
}

// TestAnAccountThatIsCountedWithOthersIsNoGap: a shard with too many unknown
// accounts counts the calls of some together, and lacks none of them.
func TestAnAccountThatIsCountedWithOthersIsNoGap(t *testing.T) {
	t.Parallel()
	for name, lost := range map[string]bool{"counted with others": false, "lost": true} {
		w := &world{t: t, b: New(Options{}), now: clock}
		g := newGateway(1)
		w.frame(g.seal(1, begin, call("a", 3), call("b", 4)))
		w.b.Out()
		a, b := g.row(1, 1, 0), g.row(1, 1, 1)
		total := totals(2, 0, 7, a, b)
		if lost {
			total = totals(1, 0, 3, a)
		}
		w.b.Counters(w.b.Ask(1, 1000), reply(1, total, map[string]ledger.Totals{"a": totals(1, 0, 3, a)}))
		var found []audit.Difference
		for _, o := range w.b.Out() {
			found = append(found, o.Differences...)
		}
		if lost != (len(found) == 1 && found[0].Account == "b" && found[0].Kind == audit.Gap) || !lost && len(found) > 0 || len(w.b.Ask(1, 1000)) != 0 {
			t.Errorf("%s: %+v", name, found)
		}
	}
}

// Counters may be right again, when an owner has started anew, before anybody looks at
// the whole a second time: the account is asked for until it agrees, without a call.
func TestAnAccountThatWasWrongIsAskedForUntilItAgrees(t *testing.T) {
	t.Parallel()
	w := &world{t: t, b: New(Options{}), now: clock}
	g := newGateway(1)
	w.frame(g.seal(1, begin, call("a", 3)))
	w.b.Out()
	hash := g.row(1, 1, 0)
	differences := func(said ledger.Totals) (asked, found int) {
		list := w.b.Ask(1, 1000)
		w.b.Counters(list, reply(1, said, map[string]ledger.Totals{"a": said}))
		for _, o := range w.b.Out() {
			found += len(o.Differences)
		}
		return len(list), found
	}
	right, wrong := totals(1, 0, 3, hash), totals(0, 0, 3, hash)
	if _, found := differences(wrong); found != 1 {
		t.Fatalf("%d differences", found)
	}
	if asked, _ := differences(right); asked != 0 {
		t.Errorf("%d accounts are asked for at once", asked)
	}
	if asked, found := differences(right); asked != 1 || found != 0 {
		t.Errorf("%d accounts are asked for, %d differ", asked, found)
	}
	differences(right)
	if asked, _ := differences(right); asked != 0 {
		t.Errorf("%d accounts are asked for that agree", asked)
	}
}

// TestCountersAreComparedAtTheirOwnPosition, account by account, and a difference
// has the minute since which they may differ.
func TestCountersAreComparedAtTheirOwnPosition(t *testing.T) {
	t.Parallel()
	w := &world{t: t, b: New(Options{}), now: clock}
	g := newGateway(1)
	w.frame(g.seal(1, begin, call("a", 3), call("b", 4)))
	a1, b1, a2 := g.row(1, 1, 0), g.row(1, 1, 1), g.row(1, 2, 0)
	counters := func(r *ledger.UsageReply) []Outcome {
		w.b.Counters(w.b.Ask(1, 1000), r)
		return w.b.Out()
	}
	if behind, _ := w.b.Comparable(reply(2, ledger.Totals{}, nil)); !behind {
		t.Error("the books are behind an answer of entry 2")
	}
	for _, o := range counters(reply(1, totals(2, 0, 7, a1, b1), map[string]ledger.Totals{"a": totals(1, 0, 3, a1), "b": totals(1, 0, 4, b1)})) {
		if o.Differences != nil {
			t.Errorf("they agree: %+v", o)
		}
	}
	if asked := w.b.Ask(1, 1000); len(asked) != 0 {
		t.Errorf("nothing has changed, and asked for are %v", asked)
	}
	later := begin + 120_000_000
	w.frame(g.seal(1, later, call("a", 5)))
	if _, beyond := w.b.Comparable(reply(1, ledger.Totals{}, nil)); !beyond {
		t.Error("the books are beyond an answer of entry 1")
	}
	// The frame was counted twice.
	got := counters(reply(2, totals(4, 0, 17, a1, b1, a2, a2), map[string]ledger.Totals{"a": totals(3, 0, 13, a1, a2, a2)}))
	if len(got) != 1 || len(got[0].Differences) != 1 {
		t.Fatalf("found: %+v", got)
	}
	if d := got[0].Differences[0]; d.Account != "a" || d.Kind != audit.Double || d.Minute != audit.MinuteOf(later) || audit.Describe(&d.Want, &d.Got) != "+1 calls, input_tokens +5" {
		t.Errorf("found: %+v: %s", d, audit.Describe(&d.Want, &d.Got))
	}
	// What changed in counters of an account that did not call is found by the
	// shard's total, then by asking for all.
	if got := counters(reply(2, totals(3, 0, 99, a1, b1, a2), nil)); len(got) != 0 {
		t.Errorf("found: %+v", got)
	}
	if asked := w.b.Ask(1, 1000); len(asked) != 2 {
		t.Fatalf("asked for are %v", asked)
	}
	got = counters(reply(2, totals(3, 0, 99, a1, b1, a2), map[string]ledger.Totals{"a": totals(2, 0, 8, a1, a2), "b": totals(1, 0, 91, b1)}))
	found := map[string]int{}
	for _, o := range got {
		for _, d := range o.Differences {
			found[d.Account]++
		}
	}
	if diff := cmp.Diff(map[string]int{"b": 1}, found); diff != "" {
		t.Error(diff)
	}
	// Corrections are no calls.
	fine := totals(2, 0, 8-6, a1, a2)
	fine.Adjusted = map[usage.Meter]int64{usage.InputTokens: -6, usage.Calls: -1}
	w.b.shards[1].dirty = []string{"a"}
	for _, o := range counters(reply(2, totals(3, 0, 12, a1, b1, a2), map[string]ledger.Totals{"a": fine})) {
		if o.Differences != nil {
			t.Errorf("a corrected account: %+v", o.Differences)
		}
	}
	// As many calls of the same sums, and not these.
	w.b.shards[1].dirty = []string{"a"}
	got = counters(reply(2, totals(3, 0, 12, a1, b1, b1), map[string]ledger.Totals{"a": totals(2, 0, 8, a1, b1)}))
	if len(got) != 1 || len(got[0].Differences) != 1 || got[0].Differences[0].Kind != audit.Other {
		t.Fatalf("found: %+v", got)
	}
	if d := got[0].Differences[0]; d.Account != "a" || audit.Describe(&d.Want, &d.Got) != "the same number and sums of other calls" {
		t.Errorf("found: %+v: %s", d, audit.Describe(&d.Want, &d.Got))
	}
}

// TestTheBooksAgreeWithTheCore: both fold the same ledger on their own, and every
// account of it has the same calls, sums and hash; copies, refused calls, events
// without a producer and corrections included.
func TestTheBooksAgreeWithTheCore(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w := &world{t: t, b: New(Options{}), now: clock}
		core := quota.New(quota.Options{Shard: 1})
		var decoder fold.Decoder
		var frame ledger.Frame
		put := func(m *nats.Msg) {
			w.sequence++
			at := begin + usage.Micros(w.sequence)
			e, kind, err := decoder.Decode(&ledger.Message{Subject: m.Subject, Header: m.Header, Data: m.Data, Sequence: w.sequence, Time: at.Time()})
			if err != nil {
				t.Fatal(err)
			}
			if fx := core.Apply(e); fx.Invalid != nil {
				t.Fatal(fx.Invalid)
			}
			switch kind {
			case ledger.KindCalls:
				if err := ledger.DecodeCalls(&frame, m.Subject, m.Header, m.Data); err != nil {
					t.Fatal(err)
				}
				w.b.Calls(w.sequence, at, &frame, w.now)
			case ledger.KindControl:
				w.b.Control(1, w.sequence, at, decoder.Control, w.now)
			}
		}
		gateways := []*gateway{newGateway(1), newGateway(2)}
		accounts := []string{"a", "b", "c"}
		var sent []*nats.Msg
		for step := range rapid.IntRange(1, 30).Draw(t, "steps") {
			account := rapid.SampledFrom(accounts).Draw(t, "account")
			switch rapid.SampledFrom([]string{"frame", "frame", "event", "copy", "correction"}).Draw(t, "what") {
			case "frame":
				var calls []usage.Call
				for range rapid.IntRange(1, 5).Draw(t, "calls") {
					c := call(rapid.SampledFrom(accounts).Draw(t, "account"), int64(step))
					switch rapid.SampledFrom([]string{"plain", "refused", "foreign", "many", "own"}).Draw(t, "kind") {
					case "refused":
						c.Code = usage.QuotaExceeded
					case "foreign":
						c.Source, c.EventID = "s", rapid.SampledFrom([]string{"1", "2", "3"}).Draw(t, "event")
					case "many":
						c.Quantities.Set(usage.Calls, 3)
					case "own":
						c.Quantities.Set("images", 4)
					}
					calls = append(calls, c)
				}
				m := ledger.FrameMessage(1, rapid.SampledFrom(gateways).Draw(t, "gateway").seal(1, begin, calls...))
				sent = append(sent, m)
				put(m)
			case "event":
				text := fmt.Sprintf(`{"specversion":"1.0","type":%q,"source":"s","id":%q,"subject":%q,"time":"2026-01-02T03:04:05Z","data":{"status":200,"meters":{"input_tokens":2}}}`,
					ledger.CloudEventType, rapid.SampledFrom([]string{"1", "2", "3"}).Draw(t, "event"), account)
				put(&nats.Msg{Subject: ledger.CallsSubject(1), Header: nats.Header{ledger.CodecHeader: {ledger.CodecCloudEvent}}, Data: []byte(text)})
			case "copy":
				if len(sent) > 0 {
					put(rapid.SampledFrom(sent).Draw(t, "copy"))
				}
			case "correction":
				m, err := ledger.ControlMessage(1, &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_Correction{Correction: &tollkeeperv1.Correction{
					Account: account, Adjustments: []*tollkeeperv1.Quantity{{Meter: "input_tokens", Value: -1}, {Meter: "calls", Value: 2}},
				}}})
				if err != nil {
					t.Fatal(err)
				}
				put(m)
			}
		}
		told := func(x quota.Totals) ledger.Totals {
			return ledger.Totals{Admitted: x.Admitted, Refused: x.Refused, Meters: x.Meters, Adjusted: x.Adjusted, Hash: x.Hash}
		}
		own := map[string]ledger.Totals{}
		for _, id := range accounts {
			u, _ := core.Account(id)
			own[id] = told(u.Own)
		}
		w.b.Counters(w.b.Ask(1, 10), reply(w.sequence, told(core.Total()), own))
		for _, o := range w.b.Out() {
			if o.Differences != nil {
				t.Fatalf("found: %+v", o)
			}
		}
		if asked := w.b.Ask(1, 10); len(asked) > 0 {
			t.Fatalf("the shard's totals differ: asked for are %v", asked)
		}
	})
}

// BenchmarkACallInTheBooks is what the audit of ledger and claims costs: frames
// of some calls an account, and of one.
func BenchmarkACallInTheBooks(b *testing.B) {
	for name, c := range map[string]struct{ size, accounts, step int }{
		"500 calls a frame of 50 accounts":  {500, 50, 1},
		"200 calls a frame of 200 accounts": {200, 1000, 7},
	} {
		b.Run(name, func(b *testing.B) { benchmark(b, c.size, c.accounts, c.step) })
	}
}

func benchmark(b *testing.B, size, accounts, step int) {
	g := newGateway(1)
	var frames []*ledger.Frame
	for i := range 200 {
		calls := make([]usage.Call, size)
		for k := range calls {
			calls[k] = call(fmt.Sprint("account-", (i*31+k*step)%accounts), 5)
			calls[k].Quantities.Set(usage.OutputTokens, 9)
		}
		var f ledger.Frame
		if err := f.Decode(g.seal(1, begin, calls...)); err != nil {
			b.Fatal(err)
		}
		frames = append(frames, &f)
	}
	claims := g.claim()
	var books *Books
	number := 0
	b.ReportAllocs()
	for i := range b.N {
		if i%size > 0 {
			continue // a frame is that many calls
		}
		if number%200 == 0 {
			number, books = 0, New(Options{})
			for _, c := range claims {
				if err := books.Claims(1, c, clock); err != nil {
					b.Fatal(err)
				}
			}
		}
		books.Calls(uint64(number+1), begin, frames[number], clock)
		number++
	}
}
