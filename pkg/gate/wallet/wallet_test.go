package wallet

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/gate/table"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// shard is the ledger and the owner of the only shard there is, with the limits that
// it knows.
type shard struct {
	jetstream.JetStream
	ack     func() time.Duration // until an entry is in the ledger
	owner   func() time.Duration // until it is answered after that
	wallets map[lease.Gateway]*Wallet
	now     func() lease.Micros // its time

	mu       sync.Mutex
	sequence uint64
	lose     func() bool                  // this entry
	again    func() (time.Duration, bool) // it comes a second time
	limits   map[string]usage.Limit
	escrows  map[key]*lease.Escrow
}

func newShard() *shard {
	soon := func() time.Duration { return time.Millisecond }
	return &shard{
		ack: soon, owner: soon, lose: func() bool { return false }, again: func() (time.Duration, bool) { return 0, false },
		wallets: map[lease.Gateway]*Wallet{}, now: func() lease.Micros { return lease.Micros(time.Now().UnixMicro()) }, limits: map[string]usage.Limit{}, escrows: map[key]*lease.Escrow{},
	}
}

// losing makes it lose entries, or not any more.
func (s *shard) losing(lose func() bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lose = lose
}

var errLost = errors.New("lost")

func (s *shard) PublishMsg(ctx context.Context, msg *nats.Msg, _ ...jetstream.PublishOpt) (*jetstream.PubAck, error) {
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(s.ack()):
	}
	entry, err := ledger.DecodeLease(msg.Header, msg.Data)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lose() {
		return nil, errLost
	}
	s.fold(entry)
	if pause, again := s.again(); again {
		time.AfterFunc(pause, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.fold(entry)
		})
	}
	return &jetstream.PubAck{}, nil
}

func (s *shard) fold(entry *tollkeeperv1.LeaseEntry) {
	s.sequence++
	now := s.now()
	for _, a := range entry.GetAsks() {
		k, answers := s.ask(lease.Gateway(entry.GetGateway()), a, now)
		s.answer(k, answers)
	}
}

// ask is what the core does: an allowance is there from the first ask on, as long as its
// window is.
func (s *shard) ask(g lease.Gateway, a *tollkeeperv1.LeaseAsk, now lease.Micros) (key, []lease.Answer) {
	k := key{a.GetAccount(), a.GetLimit(), lease.Micros(a.GetWindowStartUnixMicros())}
	ended := []lease.Answer{{Gateway: g, Revision: s.sequence, Seq: a.GetSeq(), Verdict: lease.Ended}}
	l, ok := s.limits[a.GetLimit()]
	if !ok {
		return k, ended
	}
	start, end := window.Bounds(l.Window, usage.Micros(now))
	if k.start != lease.Micros(start) {
		return k, ended
	}
	e := s.escrows[k]
	if e == nil {
		if a.GetKnown() != 0 {
			return k, ended
		}
		e = lease.NewEscrow(l.Amount, lease.Terms{
			Start: lease.Micros(start), End: lease.Micros(end), Term: lease.Micros(l.Lease.Term), Patience: lease.Micros(l.Lease.Patience), Horizon: 120_000_000, MaxLeases: 64,
		})
		s.escrows[k] = e
	}
	fx := e.Apply(lease.Entry{Sequence: s.sequence, Time: now, Ask: &lease.Ask{
		Gateway: g, Seq: a.GetSeq(), Sent: lease.Micros(a.GetSentUnixMicros()), Seen: a.GetSeen(), Known: a.GetKnown(), Used: a.GetUsed(),
		Returned: a.GetReturned(), Over: a.GetOver(), Held: a.GetHeld(), Need: a.GetNeed(), Want: a.GetWant(), Renew: a.GetRenew(), Closing: a.GetClosing(),
	}})
	return k, slices.Clone(fx.Answers)
}

// answer tells gateways, in a while.
func (s *shard) answer(k key, answers []lease.Answer) {
	for _, x := range answers {
		w := s.wallets[x.Gateway]
		time.AfterFunc(s.owner(), func() {
			w.desks[0].hear(&tollkeeperv1.LeaseAnswers{Epoch: 1, Answers: []*tollkeeperv1.LeaseAnswer{{
				Account: k.account, Limit: k.limit, WindowStartUnixMicros: int64(k.start), Revision: x.Revision, Seq: x.Seq,
				Granted: x.Granted, ExpiryUnixMicros: int64(x.Expiry), Standing: tollkeeperv1.LeaseAnswer_Standing(x.Verdict), Room: x.Room, Soon: &x.Soon, Recall: x.Recall,
			}}})
		})
	}
}

// tick lets time pass in the ledger.
func (s *shard) tick(ctx context.Context) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		s.mu.Lock()
		now := s.now()
		for k, e := range s.escrows {
			if at, ok := e.Due(); ok && at <= now {
				s.sequence++
				s.answer(k, slices.Clone(e.Apply(lease.Entry{Sequence: s.sequence, Time: now}).Answers))
			}
		}
		s.mu.Unlock()
	}
}

// change replaces a limit, which forgets its allowances.
func (s *shard) change(id string, l usage.Limit) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limits[id] = l
	for k := range s.escrows {
		if k.limit == id {
			delete(s.escrows, k)
		}
	}
}

// world is a wallet that runs, its shard and the table of accounts.
type world struct {
	*Wallet
	shard *shard
	table *table.Table
	seq   uint64
}

func exact(id string, w usage.WindowKind, amount int64) usage.Limit {
	return usage.Limit{ID: id, Meter: usage.Calls, Window: w, Amount: amount, Tier: usage.TierExact, Lease: usage.LeaseTerms{Term: 5_000_000, Patience: 400_000}}
}

// newWorld runs a wallet in the bubble until the test is over.
func newWorld(t *testing.T, s *shard, edit func(*Options)) *world {
	t.Helper()
	o := Options{Conn: &nats.Conn{}, JS: s, Gateway: ksuid.New(), Shards: 1, Now: func() usage.Micros { return usage.At(time.Now()) }}
	if edit != nil {
		edit(&o)
	}
	w, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	s.wallets[w.gateway] = w
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	all.Go(func() { w.desks[0].run(ctx) })
	if w.notary != nil {
		all.Go(func() { w.notary.run(ctx) })
	}
	t.Cleanup(func() {
		cancel()
		all.Wait()
	})
	return &world{Wallet: w, shard: s, table: table.New(1, func(string, uint32) uint32 { return 0 }, table.Policy{StaleAfter: 1})}
}

// parts that a call of the account needs.
func (w *world) parts(account string, units int64, limits ...usage.Limit) []Part {
	w.seq++
	r := table.AccountRecord{ID: account, Path: []string{account}, Seq: w.seq}
	for _, l := range limits {
		id := "plan/" + l.ID
		if _, ok := w.shard.limits[id]; !ok {
			w.shard.limits[id] = l
		}
		r.Leased = append(r.Leased, table.LeasedLimit{Account: account, LimitID: id, Limit: l})
	}
	w.table.SetAccount(r)
	a, _ := w.table.ByID(account)
	var parts []Part
	for _, d := range a.Leased() {
		parts = append(parts, Part{d, units})
	}
	return parts
}

func (w *world) take(t *testing.T, parts []Part) Standing {
	t.Helper()
	return w.Take(t.Context(), parts, false, time.Minute).Standing
}

// busy wakes the desk all the time, as calls that settle do.
func (w *world) busy(ctx context.Context) {
	tick := time.NewTicker(beat / 2)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			w.desks[0].resolved(nil, lease.Settled)
		}
	}
}

// However often other calls wake it, a desk says again what was not answered.
func TestADeskThatIsBusyRepeatsWhatWasLost(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newShard(), nil)
		parts := w.parts("acme", 1, exact("month", usage.Month, 100))
		go w.busy(t.Context())
		first := true
		w.shard.losing(func() bool { was := first; first = false; return was })
		if s := w.take(t, parts); s != Taken {
			t.Errorf("after an ask that was lost: %d", s)
		}
	})
}

// A call that never ends keeps what it reserved, but not the purse of a window that is
// long over.
func TestAPurseWhoseWindowIsOverIsForgottenWhateverIsStillReserved(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newShard(), nil)
		parts := w.parts("acme", 2, exact("minute", usage.Minute, 10))
		r := w.Take(t.Context(), parts, true, time.Second)
		if r.Standing != Taken {
			t.Fatal(r.Standing)
		}
		time.Sleep(30 * time.Second)
		if n := w.purses.Load(); n != 1 {
			t.Errorf("%d purses in the window", n)
		}
		time.Sleep(time.Minute)
		if n := w.purses.Load(); n != 0 {
			t.Errorf("%d purses after the window", n)
		}
		r.Hold.Settle([]int64{1})
		if s := w.take(t, parts); s != Taken {
			t.Errorf("in the window after: %d", s)
		}
	})
}

// Who waits for units when the window ends waits for those of the next one, however many
// they are.
func TestAllThatWaitWhenAWindowEndsGoOnInTheNext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newShard(), func(o *Options) { o.Wait = 3 * time.Second })
		parts := w.parts("acme", 1, exact("minute", usage.Minute, 10_000))
		time.Sleep(59 * time.Second)
		w.shard.losing(func() bool { return true })
		const calls = 1000
		var all sync.WaitGroup
		var mu sync.Mutex
		standings := map[Standing]int{}
		for range calls {
			all.Go(func() {
				s := w.take(t, parts)
				mu.Lock()
				standings[s]++
				mu.Unlock()
			})
		}
		time.Sleep(740 * time.Millisecond)
		w.shard.losing(func() bool { return false })
		all.Wait()
		if standings[Taken] != calls {
			t.Errorf("%v", standings)
		}
	})
}

// A limit may get another window that began when the old one did: its purse must not end
// when the old window does, nor go on after the new one has ended.
func TestALimitThatGetsAnotherWindowIsAskedForInThatOne(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ before, after usage.WindowKind }{
		"a longer one":  {usage.Minute, usage.Hour},
		"a shorter one": {usage.Hour, usage.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, newShard(), nil)
				if s := w.take(t, w.parts("acme", 1, exact("calls", c.before, 1000))); s != Taken {
					t.Fatal(s)
				}
				time.Sleep(30 * time.Second)
				changed := exact("calls", c.after, 100_000)
				w.shard.change("plan/calls", changed)
				parts := w.parts("acme", 1, changed)
				w.take(t, parts) // until the shard has told that the old allowance is over
				time.Sleep(time.Second)
				for at := range 50 {
					if s := w.take(t, parts); s != Taken {
						t.Fatalf("%d s after the change: %d", 2*at+1, s)
					}
					time.Sleep(2 * time.Second)
				}
				if n := w.purses.Load(); n != 1 {
					t.Errorf("%d purses", n)
				}
			})
		})
	}
}

// A clock that is wrong by more than a lease lasts makes every lease useless. The ledger
// is not to pay for that with as many asks as it can answer.
func TestLeasesThatAreOverWhenTheyComeAreNotAskedForAllTheTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, newShard(), func(o *Options) {
			o.Now = func() usage.Micros { return usage.At(time.Now().Add(6 * time.Second)) }
		})
		parts := w.parts("acme", 1, exact("month", usage.Month, 1000))
		for range 10 {
			if s := w.take(t, parts); s != NoAnswer {
				t.Errorf("from a lease that is over: %d", s)
			}
		}
		if w.shard.sequence > 150 {
			t.Errorf("%d entries within 10 s", w.shard.sequence)
		}
	})
}

// However many wait for more than there is, a call that needs less has what came for it.
func TestASmallCallDoesNotWaitBehindLargeOnes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newShard()
		w, other := newWorld(t, s, nil), newWorld(t, s, nil)
		go s.tick(t.Context())
		tokens := exact("tokens", usage.Month, 100)
		tokens.Meter = usage.OutputTokens
		// Elsewhere a call has reserved almost all.
		if r := other.Take(t.Context(), other.parts("acme", 90, tokens), true, time.Minute); r.Standing != Taken {
			t.Fatal(r.Standing)
		}
		large, small := w.parts("acme", 50, tokens), w.parts("acme", 5, tokens)
		var all sync.WaitGroup
		for range 200 {
			all.Go(func() {
				if r := w.Take(t.Context(), large, true, time.Minute); r.Standing != DeniedEarly {
					t.Errorf("a large call: %d", r.Standing)
				}
			})
		}
		time.Sleep(600 * time.Millisecond) // until they are denied, and wait for what may come back
		began := time.Now()
		if r := w.Take(t.Context(), small, true, time.Minute); r.Standing != Taken {
			t.Errorf("a small call: %d", r.Standing)
		}
		if waited := time.Since(began); waited > 100*time.Millisecond {
			t.Errorf("it waited for %v", waited)
		}
		all.Wait()
	})
}

// mute is a ledger that one gateway is cut off from.
type mute struct {
	*shard
	off atomic.Bool
}

func (m *mute) PublishMsg(ctx context.Context, msg *nats.Msg, opts ...jetstream.PublishOpt) (*jetstream.PubAck, error) {
	if m.off.Load() {
		return nil, errLost
	}
	return m.shard.PublishMsg(ctx, msg, opts...)
}

// While another gateway that lives has what is left, who is denied early waits a little
// for it to come back. When that one is lost, with what it had, nobody waits for it; and
// if it comes back after all, what it had is there for everybody.
func TestNobodyWaitsForWhatALostGatewayHas(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newShard()
		go s.tick(t.Context())
		cut := &mute{shard: s}
		w, lost := newWorld(t, s, nil), newWorld(t, s, func(o *Options) { o.JS = cut })
		life := exact("life", usage.Lifetime, 100)
		if s := lost.take(t, lost.parts("acme", 1, life)); s != Taken {
			t.Fatal(s)
		}
		cut.off.Store(true)
		parts := w.parts("acme", 1, life)
		admitted, early, waited := 0, 0, time.Duration(0)
		for range 200 {
			began := time.Now()
			switch s := w.take(t, parts); s {
			case Taken:
				admitted++
			case DeniedEarly:
				early++
				waited = max(waited, time.Since(began))
			default:
				t.Fatal(s)
			}
			if early == 3 {
				break
			}
		}
		if admitted < 80 || early != 3 || waited < 200*time.Millisecond {
			t.Fatalf("while it may live: %d admitted, %d denied early within %v", admitted, early, waited)
		}
		time.Sleep(10 * time.Second)
		for range 100 {
			began := time.Now()
			if s := w.take(t, parts); s != DeniedEarly || time.Since(began) > 5*time.Millisecond {
				t.Fatalf("when it is lost: %d after %v", s, time.Since(began))
			}
			time.Sleep(17 * time.Millisecond)
		}
		cut.off.Store(false)
		time.Sleep(2 * time.Second)
		for ; admitted < 99; admitted++ {
			if s := w.take(t, parts); s != Taken {
				t.Fatalf("when it is back: %d after %d", s, admitted)
			}
		}
		if s := w.take(t, parts); s != Denied {
			t.Errorf("when all is used: %d", s)
		}
	})
}

// A wallet that can't begin leaves nothing behind that is in the way of the next.
func TestAWalletThatCannotListenLeavesNoMetrics(t *testing.T) {
	t.Parallel()
	r := prometheus.NewRegistry()
	for range 2 {
		w, err := New(Options{Conn: &nats.Conn{}, JS: newShard(), Gateway: ksuid.New(), Shards: 1, Now: func() usage.Micros { return 1 }, Registerer: r})
		if err != nil {
			t.Fatal(err)
		}
		w.o.Conn = nil // on which nothing can be subscribed to
		if err := w.Run(t.Context()); err == nil {
			t.Fatal("it listens")
		}
	}
}
