package ownership

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/ownership/fleet"
)

// ErrLost is the cause of a claim's context that ended before its callback did,
// and what Check returns from then on.
var ErrLost = errors.New("the shard's ownership cannot be proved any more")

// ErrUnfit is what a callback returns, wrapped, that can't own its shard as long as
// this process lives: it is not claimed again.
var ErrUnfit = errors.New("this member can't own the shard")

// Claim is one shard for as long as this member owns it. Safe for concurrent use.
type Claim struct {
	// Shard is what is owned.
	Shard uint32
	// Token is greater than that of every claim of the shard before: the
	// fencing token.
	Token uint64

	proof  *proof
	ctx    context.Context
	cancel context.CancelCauseFunc
	drain  chan struct{}
	heir   string // set before drain is closed
}

// Check returns nil if the shard is owned at this moment, by a clock that
// nobody sets, and ErrLost if that cannot be proved. It is to be called before
// each act on the shard; it takes well under a microsecond. A process can be
// stopped between the check and the act: the act itself must carry something
// that a newer owner has made invalid (the checkpoint's revision).
func (c *Claim) Check() error {
	if c.ctx.Err() != nil || c.Left() <= 0 {
		return ErrLost
	}
	return nil
}

// Left is for how long the shard is certainly owned if nothing is renewed;
// 0 or less: not any more.
func (c *Claim) Left() time.Duration {
	return time.Duration(c.proof.until.Load()) - c.proof.clock()
}

// Drain is closed when the shard should be handed over: stop applying, store
// what is owed, and return.
func (c *Claim) Drain() <-chan struct{} { return c.drain }

// Heir is the member that is to take the shard over, once Drain is closed; empty:
// nobody is there.
func (c *Claim) Heir() string { return c.heir }

// proof is until when a member may act. It cancels the claims' contexts at that
// moment by itself: whoever extends it may be the one that hangs.
type proof struct {
	clock func() time.Duration
	until atomic.Int64

	mu     sync.Mutex
	claims map[uint32]*Claim
	timer  *time.Timer
}

func newProof(clock func() time.Duration) *proof {
	p := &proof{clock: clock, claims: map[uint32]*Claim{}}
	p.until.Store(int64(clock()))
	p.timer = time.AfterFunc(time.Hour, p.expire)
	return p
}

func (p *proof) set(until time.Duration) {
	if p.until.Swap(int64(until)) == int64(until) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.timer.Reset(max(until-p.clock(), 0))
}

func (p *proof) expire() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if left := time.Duration(p.until.Load()) - p.clock(); left > 0 {
		p.timer.Reset(left)
		return
	}
	for _, c := range p.claims {
		c.cancel(ErrLost)
	}
}

func (p *proof) stop() { p.timer.Stop() }

// claim begins a claim.
func (p *proof) claim(ctx context.Context, t fleet.Tenure) *Claim {
	c := &Claim{Shard: t.Shard, Token: t.Token, proof: p, drain: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.claims[t.Shard] = c
	if time.Duration(p.until.Load()) <= p.clock() {
		c.cancel(ErrLost)
	}
	return c
}

func (p *proof) get(shard uint32) *Claim {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.claims[shard]
}

func (p *proof) remove(shard uint32) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.claims[shard]; c != nil {
		c.cancel(context.Canceled)
		delete(p.claims, shard)
	}
}
