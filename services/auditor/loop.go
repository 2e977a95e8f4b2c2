package auditor

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/auditor/internal/books"
	"github.com/tollkeeper/tollkeeper/services/auditor/internal/findings"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// auditor owns books, rounds and findings; they belong to its loop.
type auditor struct {
	o       Options
	nc      *nats.Conn
	js      jetstream.JetStream
	metrics *metrics
	ready   *telemetry.Component
	log     zerolog.Logger
	store   store
	checker *checker // nil: the history is not audited

	ledgerID        string
	anew            bool              // what was stored is of no use
	newer           *quota.NewerError // the books go no further
	entries, claims chan ledger.Message
	ends            chan ends
	ledgerEar       ear
	claimsEar       ear

	books    *books.Books
	findings *findings.Book
	rounds   []*round // cut, oldest first
	behind   uint64   // entries of the ledger that are not folded yet
	frame    ledger.Frame

	pending    map[uint32]answer // of counters that are ahead of the books
	compared   time.Time         // when counters of every shard were last compared
	unanswered int
	committed  uint64 // of the history
	historyErr error
	historyAt  time.Time // when ClickHouse answered last
	busy       bool      // the checker is at work
	healing    []string
	healAt     time.Time
	turn       bool
}

// round is a stretch on its way to be compared with the history.
type round struct {
	*books.Round
	cut, checked time.Time
}

// answer of a shard's counters.
type answer struct {
	asked []string
	reply *ledger.UsageReply
}

const (
	// maxRounds bounds those that wait for the history, or for being looked at
	// again; when there are more they grow instead.
	maxRounds = 128
	// askLimit bounds how long the books stand still for the counters.
	askLimit = 500 * time.Millisecond
	// healEvery is how often the history is asked whether a finding is healed.
	healEvery = 15 * time.Second
)

func (a *auditor) loop(ctx context.Context) error {
	tick := time.NewTicker(min(time.Second, a.o.Every))
	defer tick.Stop()
	every := time.NewTicker(a.o.Every)
	defer every.Stop()
	save := time.NewTicker(a.o.SaveEvery)
	defer save.Stop()
	var results <-chan result
	if a.checker != nil {
		results = a.checker.results
	}
	defer a.last(context.WithoutCancel(ctx))
	_ = a.publish(ctx) // again at the next tick
	for {
		// Claims first: what a frame is held against should be there before it,
		// unless the ledger is far behind.
		claims, entries := a.claims, a.entries
		if a.books.Full() {
			claims = nil
		}
		if a.newer != nil {
			// Without the ledger claims would be taken for gaps.
			claims, entries = nil, nil
		}
		select {
		case m := <-claims:
			a.claim(m)
			continue
		default:
		}
		select {
		case m := <-claims:
			a.claim(m)
		case m := <-entries:
			a.fold(m)
		case e := <-a.ends:
			a.ledgerEar.ends(e.at, e.ledger)
			a.claimsEar.ends(e.at, e.claims)
		case r := <-results:
			a.hear(r)
		case <-tick.C:
			a.tick(ctx)
		case <-every.C:
			a.cut()
			a.counters(ctx)
		case <-save.C:
			a.save(ctx)
		case <-ctx.Done():
			return ctx.Err()
		}
		a.conclude()
	}
}

func (a *auditor) claim(m ledger.Message) {
	if err := a.books.Claims(m.Sequence, m.Data, time.Now()); err != nil {
		a.log.Warn().Err(err).Uint64("sequence", m.Sequence).Msg("a claim is left out: what it says is unclaimed")
	}
	a.conclude()
}

// fold folds an entry of the ledger.
func (a *auditor) fold(m ledger.Message) {
	a.behind = m.Pending
	kind, shard, err := ledger.ParseSubject(m.Subject)
	at := usage.At(m.Time)
	if err != nil {
		return
	}
	if p, ok := a.pending[shard]; ok && m.Sequence > p.reply.Sequence {
		a.compare(p) // all up to there is folded
	}
	switch kind {
	case ledger.KindCalls:
		if err := ledger.DecodeCalls(&a.frame, m.Subject, m.Header, m.Data); err != nil {
			a.books.Undecodable(shard, m.Sequence, at)
			return
		}
		a.books.Calls(m.Sequence, at, &a.frame, time.Now())
	case ledger.KindControl, ledger.KindClosing:
		e, err := ledger.DecodeAct(kind, m.Header, m.Data)
		if err != nil {
			a.books.Undecodable(shard, m.Sequence, at)
			return
		}
		if newer := a.books.Control(shard, m.Sequence, at, e, time.Now()); newer != nil {
			a.halt(newer)
		}
	default:
		a.books.Other(shard, m.Sequence, at)
	}
}

// halt ends the reading where a newer program has to go on: by other rules other calls
// may count, and what this one compared would be found to differ, or to agree, without
// reason. What it has read is compared to the end.
func (a *auditor) halt(newer *quota.NewerError) {
	a.newer = newer
	clear(a.pending)
	a.ready.NotReady("nothing more is audited: " + newer.Error())
	a.log.Error().Err(newer).Msg("the audit ends here until a newer version of the auditor goes on: run one")
}

// conclude turns outcomes into findings.
func (a *auditor) conclude() {
	out := a.books.Out()
	if len(out) == 0 {
		return
	}
	now := usage.At(time.Now())
	for i := range out {
		a.findings.Hear(&out[i], now)
	}
}

// cut ends the open round, so that it can be compared with the history.
func (a *auditor) cut() {
	if a.checker == nil {
		a.books.Cut()
		return
	}
	// Memory first: a second look at what agreed is given up before a first one.
	cells := 0
	for _, r := range a.rounds {
		cells += r.Cells.Len()
	}
	for i := 0; i < len(a.rounds) && (cells > a.o.Cells || len(a.rounds) >= maxRounds); {
		if a.rounds[i].checked.IsZero() {
			i++
			continue
		}
		cells -= a.rounds[i].Cells.Len()
		a.rounds = slices.Delete(a.rounds, i, i+1)
	}
	if cells > a.o.Cells || len(a.rounds) >= maxRounds || a.historyErr != nil && len(a.rounds) > 0 {
		return // the open one grows instead, within its bounds
	}
	if r := a.books.Cut(); r != nil {
		a.rounds = append(a.rounds, &round{Round: r, cut: time.Now()})
	}
}

// tick does what time brings.
func (a *auditor) tick(ctx context.Context) {
	now := time.Now()
	for _, p := range a.pending {
		if behind, _ := a.books.Comparable(p.reply); !behind {
			a.compare(p)
		}
	}
	if a.newer == nil {
		a.books.Tick(now, books.Heard{Ledger: a.ledgerEar.reach(a.books.Position), Claims: a.claimsEar.reach(a.books.ClaimsPosition)})
	}
	a.conclude()
	a.findings.Expire(usage.At(now), a.o.Keep)
	a.check(now, true)
	_ = a.publish(ctx) // again at the next tick
}

// check gives the checker its next piece of work; when there is none, it only
// asks how far the history is.
func (a *auditor) check(now time.Time, idle bool) {
	if a.checker == nil || a.busy {
		return
	}
	j, ok := a.next(now)
	if !ok && !idle {
		return
	}
	a.busy = true
	a.checker.jobs <- j // never blocks: one place, and it is idle
}

func (a *auditor) next(now time.Time) (job, bool) {
	if len(a.healing) == 0 && now.Sub(a.healAt) >= min(healEvery, 5*a.o.Every) {
		a.healAt = now
		for _, f := range a.findings.List() {
			if f.Open() && f.Pair == books.LedgerHistory && !f.Others {
				a.healing = append(a.healing, f.ID)
			}
		}
	}
	// In turns: neither keeps the other waiting.
	a.turn = !a.turn
	for a.turn && len(a.healing) > 0 {
		id := a.healing[0]
		a.healing = a.healing[1:]
		if f := a.findings.Get(id); f != nil && f.Open() {
			return job{finding: f.Clone()}, true
		}
	}
	for _, r := range a.rounds {
		if r.checked.IsZero() && r.To <= a.committed || !r.checked.IsZero() && now.Sub(r.cut) > a.o.Again {
			return job{round: r}, true
		}
	}
	return job{}, len(a.healing) > 0
}

// hear takes note of what the checker found.
func (a *auditor) hear(r result) {
	a.busy = false
	a.historyErr = r.err
	if r.err != nil {
		return
	}
	a.historyAt = time.Now()
	a.committed = max(a.committed, r.committed)
	if r.floor > a.books.Floor {
		a.books.Floor = r.floor
		a.log.Info().Uint64("sequence", r.floor).Msg("calls up to here are from before the history kept their frames' minutes: they are not compared with it")
		if from, _ := a.books.OpenFrom(); from <= r.floor {
			a.books.Cut()
		}
		a.rounds = slices.DeleteFunc(a.rounds, func(x *round) bool { return x.From <= r.floor })
	}
	now := usage.At(time.Now())
	for i := range r.outcomes {
		a.findings.Hear(&r.outcomes[i], now)
	}
	if x := r.job.round; x != nil && r.done {
		again := !x.checked.IsZero()
		x.checked = time.Now()
		if !again {
			a.metrics.checked(x.Cells.Len(), x.Cells.Minutes())
		} else {
			a.rounds = slices.DeleteFunc(a.rounds, func(y *round) bool { return y == x })
		}
	}
	a.check(time.Now(), false)
}

// counters asks the owners of all shards and compares. The books stand still
// meanwhile, so that counters that are a little behind catch up.
func (a *auditor) counters(ctx context.Context) {
	if a.newer != nil || !a.nc.IsConnected() || !a.books.Whole && a.books.Position > 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	clear(a.pending)
	shards := a.books.Shards()
	a.unanswered = 0
	for len(shards) > 0 && ctx.Err() == nil {
		got := make([]answer, len(shards))
		var wg sync.WaitGroup
		for i, n := range shards {
			got[i].asked = a.books.Ask(n, ledger.MaxUsageAccounts)
			wg.Go(func() {
				reply, err := ask(ctx, a.nc, n, got[i].asked)
				if err == nil {
					got[i].reply = reply
				}
			})
		}
		wg.Wait()
		var again []uint32
		for i, n := range shards {
			if got[i].reply == nil {
				a.unanswered++
				continue
			}
			switch behind, beyond := a.books.Comparable(got[i].reply); {
			case beyond:
				again = append(again, n)
			case behind:
				a.pending[n] = got[i]
			default:
				a.compare(got[i])
			}
		}
		if shards = again; len(shards) > 0 {
			_ = pause(ctx, 0) // that time is up shows in the condition
		}
	}
	if a.unanswered += len(shards); a.unanswered == 0 {
		a.compared = time.Now()
	}
}

func (a *auditor) compare(p answer) {
	delete(a.pending, p.reply.Shard)
	if _, beyond := a.books.Comparable(p.reply); beyond {
		return
	}
	a.books.Counters(p.asked, p.reply)
	a.conclude()
}

// askUsage asks the owner of a shard.
func askUsage(ctx context.Context, nc *nats.Conn, shard uint32, q ledger.UsageRequest) (*ledger.UsageReply, error) {
	if len(q.Accounts) == 0 {
		q.Accounts = []string{""} // none: an empty list would be the top ones
	}
	data, err := json.Marshal(q)
	if err != nil {
		return nil, fmt.Errorf("ask the counters: %w", err)
	}
	m, err := nc.RequestWithContext(ctx, ledger.UsageSubject(shard), data)
	if err != nil {
		return nil, fmt.Errorf("ask the counters of shard %d: %w", shard, err)
	}
	if why := m.Header.Get(ledger.ErrorHeader); why != "" {
		return nil, fmt.Errorf("ask the counters of shard %d: %s", shard, why)
	}
	var r ledger.UsageReply
	if err := json.Unmarshal(m.Data, &r); err != nil {
		return nil, fmt.Errorf("the counters of shard %d answer with what is not JSON: %w", shard, err)
	}
	if r.Shard != shard {
		return nil, fmt.Errorf("shard %d answers for shard %d", r.Shard, shard)
	}
	return &r, nil
}

// save stores books and rounds.
func (a *auditor) save(ctx context.Context) {
	if a.begunBeyond() {
		return // what is stored knows more
	}
	if a.publish(ctx) != nil {
		return // books that have told what no finding says would not tell it again
	}
	var rounds []*books.Round
	for _, r := range a.rounds {
		if r.checked.IsZero() {
			rounds = append(rounds, r.Round)
		}
	}
	data, err := a.books.Marshal(a.ledgerID, rounds)
	if err == nil {
		bounded, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		err = a.store.books.Save(bounded, data)
		if err == nil {
			if err := a.store.sweep(bounded); err != nil {
				a.log.Warn().Err(err).Msg("what was left behind in the books' bucket could not be removed yet")
			}
		}
	}
	if err != nil {
		// Without it a restart only has more to read again.
		a.log.Warn().Err(err).Msg("the books could not be stored")
	}
}

// begunBeyond reports whether the stored books are a newer program's: there are none
// of ours.
func (a *auditor) begunBeyond() bool { return a.newer != nil && a.newer.Sequence == 0 }

// last stores everything at the end.
func (a *auditor) last(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	a.conclude()
	if a.begunBeyond() {
		_ = a.publish(ctx) // as far as it comes: it is the last word
	}
	a.save(ctx)
}

// publish makes findings durable and says how far the audit is.
func (a *auditor) publish(ctx context.Context) error {
	bounded, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	s := a.status(time.Now())
	a.metrics.set(s, a.findings)
	err := a.store.publish(bounded, s, a.findings)
	if err != nil && ctx.Err() == nil {
		a.log.Debug().Err(err).Msg("findings can't be stored yet")
	}
	return err
}
