package leasetest

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/marks"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var request = gate.Request{Model: "m", Route: "r", Method: "POST"}

func exactly(amount int64, w usage.WindowKind) usage.Limit {
	return usage.Limit{ID: "calls", Meter: usage.Calls, Window: w, Amount: amount, Tier: usage.TierExact, ActionURL: "https://pay.example"}
}

// storm lets 64 callers of each gateway call until each was refused, and returns how
// many calls were admitted and refused for other reasons than money.
func storm(t *testing.T, nodes []*node, account string, cost *gate.Cost) (admitted, unknown int64) {
	t.Helper()
	var yes, other atomic.Int64
	var all sync.WaitGroup
	for _, n := range nodes {
		a := n.find(account)
		for range 64 {
			all.Go(func() {
				for {
					v, k := n.Take(context.Background(), a, request, cost)
					switch {
					case v.Allowed:
						yes.Add(1)
						if !k.Leased() {
							t.Error("a call was admitted without a lease")
							return
						}
						var c usage.Call
						k.Stamp(&c)
						c.Account, c.Status = account, 200
						k.Settle(&c.Quantities)
						if err := n.Settle(context.Background(), c); err != nil {
							t.Error(err)
							return
						}
					case v.Code.Status() == 402:
						return
					default:
						other.Add(1)
					}
				}
			})
		}
	}
	all.Wait()
	return yes.Load(), other.Load()
}

func TestThreeGatewaysShareALimitToTheCall(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.owner()
	const limit = 10_000
	w.account("acme", exactly(limit, usage.Lifetime))
	nodes := []*node{w.gate(), w.gate(), w.gate()}
	for _, n := range nodes {
		n.find("acme")
	}
	began := time.Now()
	admitted, unknown := storm(t, nodes, "acme", nil)
	t.Logf("%d admitted in %s, %d unknown", admitted, time.Since(began), unknown)
	if admitted > limit || admitted < limit-10 || unknown != 0 {
		t.Errorf("%d calls are admitted of %d, %d are refused as unknown", admitted, limit, unknown)
	}
	early := 0.0
	for _, n := range nodes {
		early += n.metric("tollkeeper_gate_lease_takes_total", "standing=denied_early")
	}
	t.Logf("early denials: %v; %+v", early, own.state("acme", "calls"))
	for _, n := range nodes {
		n.stop()
	}
	until(t, "what was admitted is counted, and nothing is left out", func() bool {
		l, s := own.limit("acme", "calls")
		return l.Used == admitted && s.Settled == admitted && s.Outstanding == 0 && s.Counts.Outside == 0
	})
}

// What is left is with another gateway that does not use it: it is called back before
// anybody is denied.
func TestWhatOthersDoNotUseIsRecalledBeforeADenial(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.owner()
	w.account("acme", exactly(1000, usage.Lifetime))
	first, second := w.gate(), w.gate()
	a := first.find("acme")
	second.find("acme")
	admitted := int64(0)
	for range 100 { // enough for it to fetch ahead
		if v, _ := first.Take(t.Context(), a, request, nil); !v.Allowed {
			t.Fatalf("%+v", v)
		}
		admitted++
	}
	more, unknown := storm(t, []*node{second}, "acme", nil)
	if admitted += more; admitted != 1000 || unknown != 0 {
		t.Errorf("%d admitted, %d unknown: %+v", admitted, unknown, own.state("acme", "calls"))
	}
	if s := own.state("acme", "calls"); s.Counts.Recalls == 0 {
		t.Errorf("nothing was recalled: %+v", s)
	}
	v, _ := first.Take(t.Context(), a, request, nil)
	if v.Allowed || v.Code != usage.QuotaExceeded || v.Decision == nil || v.Decision.ID == "" || v.Requested != 1 {
		t.Errorf("the refusal: %+v", v)
	}
	f := first.Refusal(a, request, v, "r1")
	if f.HTTPStatus() != 402 || f.Requested != 1 {
		t.Errorf("the answer: %+v", f)
	}
}

// The owner is away: what leases hold is used on, and after that nobody knows.
func TestLeasesOutliveTheirOwner(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.owner()
	w.account("acme", exactly(1_000_000, usage.Month))
	n := w.gate(func(o *gate.Options) {
		o.Leases.Wait, o.StaleAfter = 200*time.Millisecond, 100*time.Millisecond
		o.Leases.PassUnknown = true // which an exact limit does not heed
	})
	a := n.find("acme")
	for range 200 {
		if v, k := n.Take(t.Context(), a, request, nil); !v.Allowed || !k.Leased() {
			t.Fatalf("%+v", v)
		}
	}
	own.Leave(true)
	until(t, "the gateway finds that nobody speaks", func() bool { return n.Ready() != nil })
	held := 0
	for {
		v, k := n.Take(t.Context(), a, request, nil)
		if !v.Allowed {
			if v.Code != usage.BillingStateUnknown || !v.Unknown {
				t.Fatalf("%+v", v)
			}
			break
		}
		if v.Unknown || !k.Leased() {
			t.Fatalf("a call passed without a lease: %+v", v)
		}
		held++
	}
	if held == 0 {
		t.Error("nothing was at hand when the owner went")
	}
	own.Leave(false)
	until(t, "it goes on", func() bool { v, _ := n.Take(t.Context(), a, request, nil); return v.Allowed })
	if n.metric("tollkeeper_gate_lease_takes_total", "standing=no_answer") == 0 {
		t.Error("the metric does not tell")
	}
}

// A limit of a minute, called without a pause over the turn of the minute: no more
// than its amount in either, nobody is denied in the second for the first's sake.
func TestATurnOfTheWindowIsSharp(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.owner()
	limit := exactly(1000, usage.Minute)
	w.account("acme", limit)
	var ahead atomic.Int64
	now := func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	edit := func(o *gate.Options) {
		o.Now = now
		o.Leases.Skew = 100 * time.Millisecond
	}
	nodes := []*node{w.gate(edit), w.gate(edit)}
	for _, n := range nodes {
		n.find("acme")
	}
	// Now that all is there, time goes to shortly before a turn.
	turn := time.Now().Truncate(time.Minute).Add(time.Minute)
	shift := time.Until(turn) - 1500*time.Millisecond
	own.Shift(shift)
	ahead.Store(int64(shift))
	minute := func(t time.Time) int64 { return t.UnixMicro() / 60_000_000 }

	var mu sync.Mutex
	counts := make(map[int64]int)
	var denied, unknown atomic.Int64
	var all sync.WaitGroup
	for _, n := range nodes {
		a := n.find("acme")
		for range 16 {
			all.Go(func() {
				pace := time.NewTicker(time.Millisecond)
				defer pace.Stop()
				for now().Before(turn.Add(1500 * time.Millisecond)) {
					<-pace.C
					v, k := n.Take(context.Background(), a, request, nil)
					switch {
					case v.Allowed:
						var c usage.Call
						k.Stamp(&c)
						mu.Lock()
						counts[minute(c.Time.Time())]++
						mu.Unlock()
					case v.Code.Status() == 402:
						denied.Add(1)
						if v.Decision != nil && v.Decision.PeriodEnd == usage.At(turn) && now().After(turn.Add(500*time.Millisecond)) {
							t.Errorf("denied at %s for the window before", now())
							return
						}
					default:
						unknown.Add(1)
					}
				}
			})
		}
	}
	all.Wait()
	t.Logf("%v, %d denied, %d unknown", counts, denied.Load(), unknown.Load())
	before, after := counts[minute(turn)-1], counts[minute(turn)]
	if before > 1000 || after > 1000 || after < 990 || len(counts) != 2 || unknown.Load() != 0 {
		t.Errorf("calls by minute: %v, %d unknown", counts, unknown.Load())
	}
}

// Token reservations: three gateways never reserve more than there is, what was not
// used comes back, and at the end less than a call's bound is left.
func TestReservationsHoldTheirBound(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.owner()
	const limit, most = 100_000, 100
	w.account("acme",
		usage.Limit{ID: "tokens", Meter: usage.OutputTokens, Window: usage.Lifetime, Amount: limit, Tier: usage.TierExact},
		usage.Limit{ID: "calls", Meter: usage.Calls, Window: usage.Month, Amount: 1 << 40, Tier: usage.TierExact})
	nodes := []*node{w.gate(), w.gate(), w.gate()}
	var used, calls atomic.Int64
	var all sync.WaitGroup
	for _, n := range nodes {
		a := n.find("acme")
		for g := range 64 {
			all.Go(func() {
				for i := 0; ; i++ {
					var cost gate.Cost
					cost.Bounds.SetBuiltIn(usage.OutputTokensIndex, most)
					v, k := n.Take(context.Background(), a, request, &cost)
					if v.Code.Status() == 402 {
						return
					}
					if !v.Allowed {
						continue
					}
					if !k.Leased() {
						t.Error("a call was admitted without a lease")
						return
					}
					calls.Add(1)
					switch actual := int64((i*31 + g*7) % (most + 1)); actual {
					case 0:
						k.Void()
						calls.Add(-1)
					default:
						var q usage.Quantities
						q.SetBuiltIn(usage.OutputTokensIndex, actual)
						used.Add(actual)
						k.Settle(&q)
					}
				}
			})
		}
	}
	all.Wait()
	early := 0.0
	for _, n := range nodes {
		early += n.metric("tollkeeper_gate_lease_takes_total", "standing=denied_early")
		n.stop()
	}
	t.Logf("%d used in %d calls, %v denied early; %+v", used.Load(), calls.Load(), early, own.state("acme", "tokens"))
	if used.Load() > limit || used.Load() <= limit-most {
		t.Errorf("%d tokens are used of %d", used.Load(), limit)
	}
	until(t, "what was used is settled, and nothing is out", func() bool {
		s := own.state("acme", "tokens")
		return s.Settled == used.Load() && s.Outstanding == 0
	})
}

// What can't be bounded, or is larger than the limit, is refused before it costs
// anything.
func TestWhatIsNotBoundedIsRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.owner()
	w.account("acme", usage.Limit{ID: "tokens", Meter: usage.OutputTokens, Window: usage.Lifetime, Amount: 100, Tier: usage.TierExact, Filter: usage.Filter{Models: []string{"m"}}})
	n := w.gate()
	a := n.find("acme")
	if got := n.Measured(a, request); len(got) != 1 || got[0] != usage.OutputTokens {
		t.Errorf("what is measured: %v", got)
	}
	if v, _ := n.Take(t.Context(), a, request, nil); v.Code != usage.CostExceedsLimit || v.Detail == "" {
		t.Errorf("without a bound: %+v", v)
	}
	var cost gate.Cost
	cost.Bounds.SetBuiltIn(usage.OutputTokensIndex, 101)
	v, _ := n.Take(t.Context(), a, request, &cost)
	if f := n.Refusal(a, request, v, "r"); f.HTTPStatus() != 403 || f.Requested != 101 || v.Decision.Amount != 100 {
		t.Errorf("more than there is: %+v", v)
	}
	if v := n.Admit(a, request); v.Allowed {
		t.Error("it was admitted without taking anything")
	}
	until(t, "its shard is known", func() bool {
		v, k := n.Take(t.Context(), a, gate.Request{Model: "other"}, nil)
		return v.Allowed && !v.Unknown && !k.Leased()
	})
}

// A call takes units of every limit on its path or of none: what a team's limit
// refuses is not taken of the organisation's.
func TestACallTakesEveryLimitOnItsPathOrNone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.owner()
	w.tree(map[string][]usage.Limit{
		"org":   {exactly(1000, usage.Lifetime)},
		"red":   {exactly(100, usage.Month)},
		"green": {exactly(10_000, usage.Day)},
	}, map[string]string{"red": "org", "green": "org"})
	nodes := []*node{w.gate(), w.gate()}
	for _, n := range nodes {
		n.find("green")
	}
	red, unknown := storm(t, nodes, "red", nil)
	if red != 100 || unknown != 0 {
		t.Errorf("%d of the red team, %d unknown", red, unknown)
	}
	green, unknown := storm(t, nodes, "green", nil)
	if green != 900 || unknown != 0 {
		t.Errorf("%d of the green team, %d unknown: %+v", green, unknown, own.state("org", "calls"))
	}
	a := nodes[0].find("green")
	v, _ := nodes[0].Take(t.Context(), a, request, nil)
	if v.Allowed || v.Decision == nil || v.Decision.Account != "org" {
		t.Errorf("what refuses the green team: %+v", v)
	}
}

// The end in order: the last words of the purses are in the ledger before the
// closing entries of the outbox, which are complete.
func TestTheLastWordOfAGatewayIsBeforeItsEnd(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.owner()
	w.account("acme", exactly(1_000_000, usage.Lifetime),
		usage.Limit{ID: "tokens", Meter: usage.OutputTokens, Window: usage.Lifetime, Amount: 1000, Tier: usage.TierExact})
	n := w.gate(func(o *gate.Options) { o.CloseTimeout = 500 * time.Millisecond })
	a := n.find("acme")
	take := func() gate.Ticket {
		var cost gate.Cost
		cost.Bounds.SetBuiltIn(usage.OutputTokensIndex, 10)
		v, k := n.Take(t.Context(), a, request, &cost)
		if !v.Allowed {
			t.Fatalf("%+v", v)
		}
		return k
	}
	for range 50 {
		k := take()
		c := usage.Call{Account: "acme", Status: 200}
		c.Quantities.SetBuiltIn(usage.OutputTokensIndex, 3)
		k.Stamp(&c)
		k.Settle(&c.Quantities)
		if err := n.Settle(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	take() // and never settled
	n.stop()
	until(t, "all is counted, and what came back is free", func() bool {
		calls, c := own.limit("acme", "calls")
		_, tokens := own.limit("acme", "tokens")
		// Of the open call its bound stays out, and its own unit.
		return calls.Used == 50 && c.Settled == 50 && c.Outstanding == 0 && tokens.Settled == 150 && tokens.Outstanding == 10
	})
	closings, lastAsk, firstEnd := 0, uint64(0), uint64(0)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	err := ledger.Read(ctx, w.js, ledger.ReadOptions{Stream: ledger.Stream}, func(m ledger.Message) error {
		switch kind, _, err := ledger.ParseSubject(m.Subject); {
		case err != nil:
			return err
		case kind == ledger.KindLease:
			lastAsk = m.Sequence
		case kind == ledger.KindClosing:
			e, err := ledger.DecodeClosing(m.Header, m.Data)
			if err != nil {
				return err
			}
			if pc := e.GetProducerClosed(); pc != nil {
				closings, firstEnd = closings+1, m.Sequence
				if !pc.GetComplete() {
					t.Error("the end is not complete")
				}
				return errEnough
			}
		}
		return nil
	})
	if !errors.Is(err, errEnough) || lastAsk > firstEnd {
		t.Errorf("the last ask is entry %d, the end is %d: %v", lastAsk, firstEnd, err)
	}
}

var errEnough = errors.New("enough")

// What the middleware does with a call's reservation: settled with what the handler
// reports, whole when it reports nothing, nothing when it failed.
func TestTheMiddlewareSettles(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.owner()
	w.account("acme", usage.Limit{ID: "tokens", Meter: usage.OutputTokens, Window: usage.Lifetime, Amount: 1000, Tier: usage.TierExact})
	w.key("sk-acme", "acme")
	n := w.gate()
	n.find("acme")
	h := n.Middleware(gate.MiddlewareOptions{
		Route: "r",
		Bound: func(r *http.Request, _ string, meters []usage.Meter) (q usage.Quantities, err error) {
			if len(meters) != 1 || meters[0] != usage.OutputTokens {
				t.Errorf("bounds are asked for of %v", meters)
			}
			bound, err := strconv.ParseInt(r.Header.Get("Bound"), 10, 64)
			q.SetBuiltIn(usage.OutputTokensIndex, bound)
			return q, err
		},
	}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if reported := r.Header.Get("Reports"); reported != "" {
			v, err := strconv.ParseInt(reported, 10, 64)
			if err := errors.Join(err, gate.ReportFrom(r.Context()).Set(usage.OutputTokens, v)); err != nil {
				t.Error(err)
			}
		}
		if s := r.Header.Get("Status"); s != "" {
			status, _ := strconv.Atoi(s)
			w.WriteHeader(status)
		}
		_, _ = w.Write([]byte("x"))
	}))
	call := func(headers ...string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(http.MethodPost, "/", nil)
		r.Header.Set("X-Api-Key", "sk-acme")
		for i := 0; i < len(headers); i += 2 {
			r.Header.Set(headers[i], headers[i+1])
		}
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, r)
		return rec
	}
	until(t, "the key is known", func() bool { return call("Bound", "1", "Reports", "0").Code == 200 })
	settled := func(want int64) {
		t.Helper()
		until(t, fmt.Sprint("settled is ", want), func() bool { s := own.state("acme", "tokens"); return s.Settled == want })
	}
	settled(0)
	call("Bound", "100", "Reports", "40")
	settled(40)
	call("Bound", "100") // as when the client has hung up: nobody knows what it cost
	settled(140)
	call("Bound", "100", "Status", "500")
	call("Bound", "100", "Status", "500", "Reports", "5")
	settled(145)
	call("Bound", "100", "Reports", "130") // it cost more than it could
	settled(275)
	if r := call("Bound", "1001"); r.Code != 403 {
		t.Errorf("more than the limit: %d %s", r.Code, r.Body)
	}
	r := call("Bound", "800")
	if r.Code != 402 || !strings.Contains(r.Body.String(), `"requested":800`) || !strings.Contains(r.Body.String(), `"decision_id":"`) || !strings.Contains(r.Body.String(), `"meter":"output_tokens"`) {
		t.Errorf("more than is left: %d %s", r.Code, r.Body)
	}
	if r := call("Bound", "100", "Reports", "100"); r.Code != 200 {
		t.Errorf("less than is left: %d %s", r.Code, r.Body)
	}
	settled(375)
}

// NATS restarts under load: nobody is admitted beyond the limit, and all of it can be
// used.
func TestNATSRestartsUnderLoad(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.owner()
	const limit = 200_000
	w.account("acme", exactly(limit, usage.Lifetime))
	nodes := []*node{w.gate(), w.gate()}
	for _, n := range nodes {
		n.find("acme")
	}
	done := make(chan int64)
	go func() {
		admitted, unknown := storm(t, nodes, "acme", nil)
		t.Logf("%d unknown", unknown)
		done <- admitted
	}()
	until(t, "calls are admitted", func() bool { return own.state("acme", "calls").Settled > 1000 })
	w.restart()
	if admitted := <-done; admitted > limit || admitted < limit-10 {
		t.Errorf("%d are admitted of %d", admitted, limit)
	}
}

// The directory tells of a limit before the ledger does, or its plan takes effect
// later: calls are refused as unknown, and pass as soon as the shard knows it.
func TestALimitThatTheShardDoesNotKnowYet(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.owner()
	own.Leave(true) // so that what it says about nobody's limit comes late
	limits := map[string][]usage.Limit{"acme": {exactly(1000, usage.Lifetime)}}
	if err := tellDirectory(t.Context(), w.js, limits, nil); err != nil {
		t.Fatal(err)
	}
	n := w.gate(func(o *gate.Options) { o.Leases.Wait = 100 * time.Millisecond })
	a := n.find("acme")
	own.Leave(false)
	if v, _ := n.Take(t.Context(), a, request, nil); v.Allowed || v.Code != usage.BillingStateUnknown {
		t.Errorf("%+v", v)
	}
	if err := tellLedger(t.Context(), w.js, shards, limits, nil); err != nil {
		t.Fatal(err)
	}
	admitted := int64(0)
	until(t, "calls are admitted", func() bool {
		v, k := n.Take(t.Context(), a, request, nil)
		if v.Allowed {
			admitted++
		}
		return v.Allowed && k.Leased()
	})
	more, _ := storm(t, []*node{n}, "acme", nil)
	if admitted+more != 1000 {
		t.Errorf("%d are admitted", admitted+more)
	}
}

// What a gateway keeps is bounded, and what is beyond is refused as unknown.
func TestPursesAndReservationsAreBounded(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.owner()
	w.tree(map[string][]usage.Limit{"one": {exactly(100, usage.Lifetime)}, "two": {exactly(100, usage.Lifetime)}}, nil)
	n := w.gate(func(o *gate.Options) { o.Leases.MaxPurses, o.Leases.MaxReservations = 1, 1 })
	one, two := n.find("one"), n.find("two")
	if v, _ := n.Take(t.Context(), one, request, nil); !v.Allowed {
		t.Fatalf("%+v", v)
	}
	if v, _ := n.Take(t.Context(), two, request, nil); v.Allowed || v.Code != usage.BillingStateUnknown || !strings.Contains(v.Detail, "bound of leases") {
		t.Errorf("a purse too many: %+v", v)
	}
	var cost gate.Cost
	cost.Bounds.SetBuiltIn(usage.CallsIndex, 2)
	v, k := n.Take(t.Context(), one, request, &cost)
	if !v.Allowed {
		t.Fatalf("%+v", v)
	}
	if v, _ := n.Take(t.Context(), one, request, &cost); v.Allowed || v.Code != usage.BillingStateUnknown || !strings.Contains(v.Detail, "open reservations") {
		t.Errorf("a reservation too many: %+v", v)
	}
	k.Void()
	if v, _ := n.Take(t.Context(), one, request, &cost); !v.Allowed {
		t.Errorf("the reservation before it is void: %+v", v)
	}
	if busy := n.metric("tollkeeper_gate_lease_takes_total", "standing=busy"); busy != 2 {
		t.Errorf("%v are counted", busy)
	}
}

// In the tier leased a call may pass although nobody answers, up to a bound, if that
// is asked for; it is then no lease's.
func TestTheTierLeasedMayPassUnknown(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.owner().Leave(true)
	w.account("acme", usage.Limit{
		ID: "calls", Meter: usage.Calls, Window: usage.Lifetime, Amount: 100, Tier: usage.TierLeased, Lease: usage.LeaseTerms{ReleaseAfter: 1_000_000, MaxExposure: 10},
	})
	edit := func(o *gate.Options) {
		o.Leases.Wait = 20 * time.Millisecond
		o.Unknown = gate.Unknown{Mode: gate.PassUnknown, MaxCalls: 2}
	}
	strict, open := w.gate(edit), w.gate(edit, func(o *gate.Options) { o.Leases.PassUnknown = true })
	if v, _ := strict.Take(t.Context(), strict.find("acme"), request, nil); v.Allowed {
		t.Errorf("it was not asked for: %+v", v)
	}
	a := open.find("acme")
	for range 2 {
		if v, k := open.Take(t.Context(), a, request, nil); !v.Allowed || !v.Unknown || k.Leased() {
			t.Errorf("%+v", v)
		}
	}
	if v, _ := open.Take(t.Context(), a, request, nil); v.Allowed {
		t.Error("there is no bound")
	}
}

// spooled lets the gateway have a spool directory.
func spooled(dir string) func(*gate.Options) {
	return func(o *gate.Options) {
		o.OpenOutbox = func(nc *nats.Conn, _ jetstream.JetStream, shards uint32) (gate.Outbox, error) {
			return outbox.Open(outbox.Options{NATS: nc, Shards: shards, Gateway: "test", SpoolDir: dir, Logger: zerolog.Nop()})
		}
	}
}

// A kill is a copy of the spool directory, and a gateway that nobody hears of any more.
// Calls were under way that stand nowhere: they count against the limit; what the
// gateway can't have used is used by others.
func TestWhatAKilledGatewayCantHaveUsedIsUsedByOthers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.owner()
	const limit = 5000
	w.account("acme", exactly(limit, usage.Lifetime), usage.Limit{ID: "tokens", Meter: usage.OutputTokens, Window: usage.Lifetime, Amount: 100_000, Tier: usage.TierExact})
	bound := func(n int64) *gate.Cost {
		var cost gate.Cost
		cost.Bounds.SetBuiltIn(usage.OutputTokensIndex, n)
		return &cost
	}
	dir, left := t.TempDir(), t.TempDir()
	nc := w.connect()
	victim := w.gate(spooled(dir), func(o *gate.Options) { o.Conn = nc })
	a := victim.find("acme")
	upstream, held := int64(0), int64(0)
	for i := range 1000 {
		v, k := victim.Take(t.Context(), a, request, bound(10))
		if !v.Allowed {
			t.Fatalf("call %d: %+v", i, v)
		}
		upstream++
		if i%2 == 0 {
			held += 10
			continue // it has reached the upstream, and nobody has written it down
		}
		c := usage.Call{Account: "acme", Status: 200}
		c.Quantities.SetBuiltIn(usage.OutputTokensIndex, 3)
		held += 3
		k.Stamp(&c)
		k.Settle(&c.Quantities)
		if err := victim.Settle(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	if victim.metric("tollkeeper_gate_lease_marks_total") == 0 {
		t.Error("nothing was noted")
	}
	nc.Close()
	if err := os.CopyFS(left, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	before, beforeTokens := own.state("acme", "calls"), own.state("acme", "tokens")
	next := w.gate(spooled(left))
	a = next.find("acme")
	until(t, "the ledger has heard of the marks", func() bool {
		return own.state("acme", "calls").Counts.Returned > before.Counts.Returned && own.state("acme", "tokens").Counts.Returned > beforeTokens.Counts.Returned
	})
	calls, tokens := own.state("acme", "calls"), own.state("acme", "tokens")
	t.Logf("after the kill: %+v, then %+v; tokens %+v, then %+v", before, calls, beforeTokens, tokens)
	// The marks are ahead of use by three halves of an eighth of a grant at most.
	ahead := func(s lease.State) int64 { return s.Counts.Granted*3/16 + 32 }
	if kept := calls.Settled + calls.Outstanding; kept < upstream || kept > upstream+ahead(before) {
		t.Errorf("%d calls are kept, %d reached the upstream", kept, upstream)
	}
	if kept := tokens.Settled + tokens.Outstanding; kept < held || kept > held+ahead(beforeTokens) {
		t.Errorf("%d tokens are kept, %d can have been used", kept, held)
	}
	for ctx := t.Context(); ; upstream++ {
		if v, k := next.Take(ctx, a, request, bound(1)); !v.Allowed {
			break
		} else {
			var q usage.Quantities
			k.Settle(&q)
		}
	}
	if s := own.state("acme", "calls"); upstream > limit || upstream < limit-(calls.Settled+calls.Outstanding-1000)-32 {
		t.Errorf("%d calls reached the upstream of %d: %+v", upstream, limit, s)
	}
}

// elsewhere is an outbox whose marks are noted in another directory.
type elsewhere struct {
	*outbox.Outbox
	journal *marks.Journal
}

func (o elsewhere) Marks() *marks.Journal { return o.journal }

// What can't be noted is not used: the calls that need it are refused as unknown, and
// go on when it can be.
func TestADiskThatTakesNoMarks(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.owner()
	w.account("acme", exactly(100, usage.Lifetime))
	dir := filepath.Join(t.TempDir(), "not there yet")
	n := w.gate(func(o *gate.Options) {
		o.Leases.Wait, o.Logger = 300*time.Millisecond, zerolog.Nop()
		o.OpenOutbox = func(nc *nats.Conn, _ jetstream.JetStream, shards uint32) (gate.Outbox, error) {
			out, err := outbox.Open(outbox.Options{NATS: nc, Shards: shards, Gateway: "test", SpoolDir: t.TempDir(), Logger: zerolog.Nop()})
			if err != nil {
				return nil, err
			}
			return elsewhere{out, marks.New(dir, out.Producer())}, nil
		}
	})
	a := n.find("acme")
	if v, _ := n.Take(t.Context(), a, request, nil); v.Allowed || v.Code != usage.BillingStateUnknown {
		t.Errorf("%+v", v)
	}
	if n.metric("tollkeeper_gate_lease_unnoted_marks_total") == 0 || n.metric("tollkeeper_gate_lease_marks_total") != 0 {
		t.Error("it is not counted")
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	admitted, _ := storm(t, []*node{n}, "acme", nil)
	if admitted != 100 || own.state("acme", "calls").Amount != 100 {
		t.Errorf("%d admitted", admitted)
	}
}
