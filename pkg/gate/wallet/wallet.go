// Package wallet is the set of a gateway's purses: it opens one for every
// allowance (account × limit × window) that calls draw on, brings their asks to the
// ledger and the owners' answers to them, and lets calls wait for units that have
// to be fetched.
//
// What an idle purse held goes back by itself when its lease ends. The purse itself
// can't just be forgotten before its window is over, since a gateway's identity can
// begin a lease once: it is shelved, which leaves a record of its totals.
package wallet

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/marks"
	"github.com/tollkeeper/tollkeeper/pkg/gate/table"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// Defaults of Options.
const (
	// DefaultSkew is how far the estimate of the ledger's time is wrong at most.
	// Where clocks are kept by NTP it is a few milliseconds.
	DefaultSkew = 250 * time.Millisecond
	// DefaultWait is how long a call waits for units at most.
	DefaultWait = time.Second
	// DefaultMaxPurses are open at a time, which bounds memory: a purse is about a
	// kilobyte. It stays open while it is used, and a minute longer; where room gets
	// scarce, some seconds.
	DefaultMaxPurses = 200_000
	// DefaultMaxShelved are remembered of those that are not used any more but whose
	// window is not over: 80 bytes each, up to 200 with the room of the map, and what
	// it is called. Beyond, purses stay open.
	DefaultMaxShelved = 2_000_000
	// DefaultMaxWaiting calls wait at a time, over all purses.
	DefaultMaxWaiting = 16_384
	// DefaultMaxHolds reservations are open at a time.
	DefaultMaxHolds = 65_536
)

// Options of a wallet. Conn, JS, Gateway, Shards and Now are needed.
type Options struct {
	// Conn and JS are the connection to NATS; it stays the caller's.
	Conn *nats.Conn
	JS   jetstream.JetStream
	// Gateway is the producer of this gateway's frames, new at each start.
	Gateway ksuid.KSUID
	// Name of the gateway, for people.
	Name string
	// Shards of the ledger.
	Shards uint32
	// Now is the ledger's time as the gateway estimates it.
	Now func() usage.Micros
	// TestClock: Now jumps and stands still, so that a reading of a few milliseconds
	// ago may be of another window, and pauses pass by the time of this process.
	TestClock bool
	// Skew, Wait, MaxPurses, MaxShelved, MaxWaiting and MaxHolds have defaults. A call that is
	// denied early, because others hold what is left, waits a quarter of Wait for it
	// to come back, and all of Wait where calls reserve: what others have reserved
	// and do not use comes back when their calls are through.
	Skew, Wait                      time.Duration
	MaxPurses, MaxWaiting, MaxHolds int
	MaxShelved                      int
	// Journal, where there is one, notes how much of its leases the gateway can have
	// used, before it does: what is beyond comes back when it was killed. While it
	// fails, calls go on with what is noted, and those that need more wait in vain.
	Journal Journal

	Logger     zerolog.Logger
	Registerer prometheus.Registerer // nil: no metrics
}

// Journal keeps marks where a kill leaves them.
type Journal interface {
	// Write returns nil once the marks, at most marks.MaxBatch, are safe. now is the
	// ledger's time.
	Write(now usage.Micros, batch []marks.Mark) error
}

// Wallet is described at the package. Its methods are safe for concurrent use.
type Wallet struct {
	o       Options
	gateway lease.Gateway
	skew    lease.Micros
	grace   lease.Micros // that calls wait after an early denial
	clock   atomic.Int64 // a recent reading of Now
	born    time.Time
	desks   []desk
	holds   *lease.Holds
	metrics *metrics
	purses  atomic.Int64
	shelved atomic.Int64
	waiting atomic.Int64
	closing atomic.Bool
	gone    chan struct{} // a last word was heard or is out
	trouble trouble
	scarce  trouble
	notary  *notary // nil: there is no journal
}

// New returns a wallet without purses; nothing is fetched before Run.
func New(o Options) (*Wallet, error) {
	if o.Conn == nil || o.JS == nil || o.Now == nil || o.Shards == 0 || o.Gateway.IsNil() {
		return nil, errors.New("wallet: a connection, the gateway's identity, the number of shards or the clock is missing")
	}
	if o.Skew < 0 || o.Wait < 0 || o.MaxPurses < 0 || o.MaxShelved < 0 || o.MaxWaiting < 0 || o.MaxHolds < 0 {
		return nil, errors.New("wallet: bounds and times must not be negative")
	}
	orDuration(&o.Skew, DefaultSkew)
	orDuration(&o.Wait, DefaultWait)
	orInt(&o.MaxPurses, DefaultMaxPurses)
	orInt(&o.MaxShelved, DefaultMaxShelved)
	orInt(&o.MaxWaiting, DefaultMaxWaiting)
	orInt(&o.MaxHolds, DefaultMaxHolds)
	w := &Wallet{
		o: o, gateway: lease.Gateway(o.Gateway), skew: lease.Micros(o.Skew.Microseconds()), grace: lease.Micros(o.Wait.Microseconds() / 4), born: time.Now(), desks: make([]desk, o.Shards),
		holds: lease.NewHolds(o.MaxHolds), gone: make(chan struct{}, 1), trouble: trouble{
			log:    o.Logger,
			failed: "asks for leases do not get into the ledger: calls go on with what leases hold, and are refused after that; trying again",
			works:  "asks for leases get into the ledger again",
		},
		scarce: trouble{
			log:    o.Logger,
			failed: "there is little room left for leases: soon calls of accounts that have none here are refused; allow more, or spread accounts over more gateways",
			works:  "there is room for leases again",
		},
	}
	for i := range w.desks {
		w.desks[i].init(w, uint32(i))
	}
	w.tell()
	if o.Journal != nil {
		w.notary = newNotary(w)
	}
	var err error
	if w.metrics, err = newMetrics(w, o.Registerer); err != nil {
		return nil, fmt.Errorf("wallet: %w", err)
	}
	return w, nil
}

func orDuration(d *time.Duration, otherwise time.Duration) {
	if *d == 0 {
		*d = otherwise
	}
}

func orInt(n *int, otherwise int) {
	if *n == 0 {
		*n = otherwise
	}
}

// tell reads the clock.
func (w *Wallet) tell() lease.Micros {
	now := int64(w.o.Now())
	w.clock.Store(now)
	return lease.Micros(now)
}

// pace is the time by which pauses pass (until an ask is repeated, until a call gives
// up) when the ledger's is now. The two are the same, but for a test clock: while that
// stands still messages get lost all the same, and its jumps let no call wait longer.
func (w *Wallet) pace(now lease.Micros) lease.Micros {
	if !w.o.TestClock {
		return now
	}
	return lease.Micros(time.Since(w.born).Microseconds())
}

// Clock is the ledger's time as it was read a few milliseconds ago, for those who
// have no time to read a clock: Skew has room for it.
func (w *Wallet) Clock() lease.Micros {
	if w.o.TestClock {
		return w.tell()
	}
	return lease.Micros(w.clock.Load())
}

// How often the clock is read and, when nobody has a purse, looked at.
const (
	clockEvery = 5 * time.Millisecond
	idleEvery  = 250 * time.Millisecond
)

// Run brings asks and answers until ctx is done; then it returns nil. Close wants it
// to be running.
func (w *Wallet) Run(ctx context.Context) error {
	defer w.metrics.unregister()
	sub, err := w.o.Conn.Subscribe(ledger.AnswersSubject(w.o.Gateway), w.hear)
	if err != nil {
		return fmt.Errorf("wallet: listen for answers: %w", err)
	}
	var all sync.WaitGroup
	for i := range w.desks {
		all.Go(func() { w.desks[i].run(ctx) })
	}
	if w.notary != nil {
		all.Go(func() { w.notary.run(ctx) })
	}
	timer := time.NewTimer(clockEvery)
	defer timer.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-timer.C:
			w.holds.Sweep(w.tell())
			w.watch()
			if w.purses.Load() > 0 {
				timer.Reset(clockEvery)
			} else {
				timer.Reset(idleEvery)
			}
		}
	}
	// The connection may be gone, and with it the subscription.
	_ = sub.Unsubscribe()
	all.Wait()
	for i := range w.desks {
		w.desks[i].dismiss()
	}
	return nil
}

// watch warns before calls have to be refused for want of room.
func (w *Wallet) watch() {
	open, shelved := w.purses.Load(), w.shelved.Load()
	used := max(float64(open)/float64(w.o.MaxPurses), float64(shelved)/float64(w.o.MaxShelved))
	switch {
	case used > .9:
		w.scarce.begins(fmt.Errorf("%d of %d purses are open, %d of %d shelved", open, w.o.MaxPurses, shelved, w.o.MaxShelved))
	case used < .8:
		w.scarce.ends()
	}
}

// hear takes the answers of a shard's owner.
func (w *Wallet) hear(m *nats.Msg) {
	var p tollkeeperv1.LeaseAnswers
	if err := proto.Unmarshal(m.Data, &p); err != nil || p.GetShard() >= uint32(len(w.desks)) {
		w.metrics.undecodable.Inc()
		return
	}
	w.desks[p.GetShard()].hear(&p)
}

// Low tells that a call has left little in one of these purses.
func (w *Wallet) Low(draws []table.Draw) {
	for i := range draws {
		if p := draws[i].Purse(); p != nil && draws[i].TellLow() {
			d := &w.desks[draws[i].Shard()]
			select {
			case d.low <- p:
				d.wake()
			default: // it is looked at within a second anyway
			}
		}
	}
}

// Close lets every purse say its last word, and waits until those are in the
// ledger or ctx is done; the error says how many are not. Those with reservations
// that are open keep what is reserved out.
func (w *Wallet) Close(ctx context.Context) error {
	w.closing.Store(true)
	for i := range w.desks {
		w.desks[i].close()
	}
	for {
		left := 0
		for i := range w.desks {
			left += w.desks[i].unsaid()
		}
		if left == 0 {
			return nil
		}
		select {
		case <-w.gone:
		case <-ctx.Done():
			return fmt.Errorf("%d leases could not be closed: what was unused of them stays spent until the gateway's calls are known or the window ends: %w", left, ctx.Err())
		}
	}
}

// trouble tells once that something fails, and once that it works again.
type trouble struct {
	log           zerolog.Logger
	failed, works string
	mu            sync.Mutex
	is            bool
}

func (t *trouble) begins(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.is {
		t.is = true
		t.log.Warn().Err(err).Msg(t.failed)
	}
}

func (t *trouble) ends() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.is {
		t.is = false
		t.log.Info().Msg(t.works)
	}
}
