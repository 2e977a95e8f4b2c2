package alerter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/alert"
	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/seen"
)

// detector is a fold of the ledger's calls that says when an episode of its
// rule and scope begins and ends. *alert.Ratio is one.
type detector interface {
	Rule() string
	Scope() string
	// Observe takes note of a call at its counting time and reports whether it
	// still mattered; the id is only valid during the call.
	Observe(account []byte, code usage.Code, at usage.Micros) bool
	// Advance takes stream time forward and returns the transitions due.
	Advance(stream, now usage.Micros) []usage.Alert
	// Adopt takes over the newest transition, which another alerter may have made;
	// nil: there was none.
	Adopt(newest *usage.Alert)
	Restore(alert.Memory)
	Memory() alert.Memory
	Stats() alert.Stats
}

// readinessSink is what readiness is told; *telemetry.Component is one.
type readinessSink interface {
	OK()
	NotReady(reason string)
}

// position is the value of the position's key: where to go on after a restart.
type position struct {
	// From is the first entry that the windows still need.
	From uint64 `json:"from_sequence"`
	// Next is the first entry that was not read.
	Next      uint64                  `json:"next_sequence"`
	Detectors map[string]alert.Memory `json:"detectors"`
	// Rules are the newest that the ledger has stated, by shard: the entries that say so
	// are not read again.
	Rules map[uint32]rules `json:"rules,omitempty"`
}

// rules by which a shard is folded, as the ledger states them.
type rules struct {
	Version uint32       `json:"core_version"`
	Horizon usage.Micros `json:"foreign_horizon_micros"`
}

func (r rules) entry() *tollkeeperv1.ControlEntry {
	return &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_CoreVersion{
		CoreVersion: &tollkeeperv1.CoreVersion{Version: r.Version, ForeignHorizonMicros: int64(r.Horizon)},
	}}
}

const positionKey = "position"

// maxCatchUp is how long ago an alerter may have stopped for its steps to be
// evaluated one by one; what was before is only read to fill the windows.
const maxCatchUp = time.Hour

// evaluator folds the ledger into detectors and makes their transitions
// durable. Its methods are called from two goroutines, the reader's and the
// ticker's, and lock.
type evaluator struct {
	js       jetstream.JetStream
	kv       jetstream.KeyValue
	journal  *journal
	log      zerolog.Logger
	ready    readinessSink
	metrics  *metrics
	links    Links
	step     time.Duration
	lookback time.Duration
	maxLag   time.Duration
	every    time.Duration // between two saved positions
	now      func() time.Time
	test     bool // the ledger has a test clock

	mu        sync.Mutex
	detectors []detector
	known     []episodeState // of each detector, as last seen in KV
	seen      *seen.Fold
	rules     map[uint32]rules
	stopped   map[uint32]*quota.NewerError // shards whose rules only a newer program knows
	fresh     []uint32                     // rows of a frame, reused
	frame     ledger.Frame
	next      uint64       // first entry not read
	stream    usage.Micros // highest stream time
	marks     []mark       // oldest first: which entry was the first at a stream time
	// aborted: a transition could not be made durable, so that the detectors'
	// memory is ahead of it and must not be saved.
	aborted bool

	lastEntry, lastSync, lastSave time.Time
}

// mark says which entry was the first one at or after a stream time.
type mark struct {
	at       usage.Micros
	sequence uint64
}

func detectorKey(d detector) string { return d.Rule() + "/" + d.Scope() }

// prepare restores what was saved and returns where to read from.
func (e *evaluator) prepare(ctx context.Context) (uint64, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	var pos position
	entry, err := e.kv.Get(ctx, positionKey)
	switch {
	case errors.Is(err, jetstream.ErrKeyNotFound):
	case err != nil:
		return 0, fmt.Errorf("read the position: %w", err)
	default:
		if err := json.Unmarshal(entry.Value(), &pos); err != nil {
			// Only a hint: the windows are rebuilt from the ledger either way.
			e.log.Error().Err(err).Msg("the saved position can't be read: beginning anew")
			pos = position{}
		}
	}
	stream, err := e.js.Stream(ctx, ledger.Stream)
	if err != nil {
		return 0, fmt.Errorf("stream %s: %w", ledger.Stream, err)
	}
	if end := stream.CachedInfo().State.LastSeq + 1; pos.From > end {
		e.log.Error().Uint64("position", pos.From).Uint64("end", end).Msg("the saved position is behind the ledger's end: it is another ledger, beginning anew")
		pos = position{}
	}
	now := usage.At(e.now())
	if clock, err := ledger.ReadTestClock(ctx, e.js); err == nil {
		e.test, e.stream = true, clock
		now = e.stream
	} else if !errors.Is(err, ledger.ErrRealClock) {
		return 0, fmt.Errorf("read which clock the ledger has: %w", err)
	}
	oldest := now - usage.Micros(maxCatchUp.Microseconds())
	begin, stale := now, false
	for i, d := range e.detectors {
		m, saved := pos.Detectors[detectorKey(d)]
		switch {
		case !saved:
			m = alert.Memory{EvaluatedTo: now, Blind: true}
		case m.EvaluatedTo < oldest:
			e.log.Warn().Time("stopped", m.EvaluatedTo.Time()).Str("rule", d.Rule()).
				Msgf("the alerter stood still for longer than %s: what began and ended before is not evaluated", maxCatchUp)
			m.EvaluatedTo, m.Pending, m.Clear, m.Settled, m.Blind = oldest, 0, 0, 0, !m.Firing
			stale = true
		}
		begin = min(begin, m.EvaluatedTo)
		d.Restore(m)
		s, err := e.journal.recover(ctx, d.Rule(), d.Scope())
		if err != nil {
			return 0, err
		}
		e.adopt(i, s)
	}
	from := pos.From
	if from == 0 || stale {
		at, err := e.seek(ctx, stream, (begin - usage.Micros(e.lookback.Microseconds())).Time())
		if err != nil {
			return 0, err
		}
		from = max(from, at)
	}
	for shard, r := range pos.Rules {
		e.foldAct(shard, 0, e.seen.Pass(shard, 0), r.entry())
	}
	e.next = max(from, 1)
	e.lastSave, e.lastSync = e.now(), e.now()
	return e.next, nil
}

// seek returns the first entry of the ledger at or after t, or the one that
// will come next.
func (e *evaluator) seek(ctx context.Context, stream jetstream.Stream, t time.Time) (uint64, error) {
	end := stream.CachedInfo().State.LastSeq + 1
	c, err := stream.CreateConsumer(ctx, jetstream.ConsumerConfig{
		DeliverPolicy: jetstream.DeliverByStartTimePolicy, OptStartTime: &t, AckPolicy: jetstream.AckNonePolicy,
		HeadersOnly: true, MemoryStorage: true, InactiveThreshold: 10 * time.Second,
	})
	if err != nil {
		return 0, fmt.Errorf("look for %s in %s: %w", t.Format(time.RFC3339), ledger.Stream, err)
	}
	if c.CachedInfo().NumPending == 0 {
		return end, nil
	}
	wait, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	m, err := c.Next(jetstream.FetchContext(wait))
	if err != nil {
		return 0, fmt.Errorf("look for %s in %s: %w", t.Format(time.RFC3339), ledger.Stream, err)
	}
	meta, err := m.Metadata()
	if err != nil {
		return 0, fmt.Errorf("look for %s in %s: %w", t.Format(time.RFC3339), ledger.Stream, err)
	}
	return meta.Sequence.Stream, nil
}

// adopt makes detector i go on from the state in KV.
func (e *evaluator) adopt(i int, s episodeState) {
	d := e.detectors[i]
	e.known[i] = s
	if s.revision == 0 {
		d.Adopt(nil)
	} else {
		d.Adopt(&s.Alert)
	}
	e.metrics.open(d.Rule(), d.Scope(), s.firing())
}

// handle folds one entry of the ledger.
func (e *evaluator) handle(ctx context.Context, m ledger.Message) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	at := usage.At(m.Time)
	if err := e.advance(ctx, at); err != nil {
		return err
	}
	if n := len(e.marks); n == 0 || e.stream-e.marks[n-1].at >= 1_000_000 {
		e.marks = append(e.marks, mark{e.stream, m.Sequence})
	}
	e.fold(m)
	e.next = m.Sequence + 1
	e.lastEntry = e.now()
	return nil
}

func (e *evaluator) fold(m ledger.Message) {
	kind, number, err := ledger.ParseSubject(m.Subject)
	if err != nil {
		return // not ours to judge: the aggregator's
	}
	shard := e.seen.Pass(number, usage.At(m.Time))
	if e.stopped[number] != nil {
		return
	}
	switch kind {
	case ledger.KindCalls:
		e.foldCalls(shard, m)
	case ledger.KindControl, ledger.KindClosing:
		entry, err := ledger.DecodeAct(kind, m.Header, m.Data)
		if err != nil {
			return // dead-lettered by the aggregator
		}
		e.foldAct(number, m.Sequence, shard, entry)
	}
}

// foldAct folds a control entry, by the rules that the ledger itself states.
func (e *evaluator) foldAct(number uint32, sequence uint64, shard *seen.Shard, entry *tollkeeperv1.ControlEntry) {
	if c := entry.GetCoreVersion(); c != nil {
		e.rules[number] = rules{c.GetVersion(), usage.Micros(c.GetForeignHorizonMicros())}
	}
	if newer := seen.Beyond(number, sequence, entry); newer != nil {
		e.stopped[number] = newer
		e.log.Error().Err(newer).Uint32("shard", number).Msg("the alerter is older than the ledger's rules; it watches the shard no more; upgrade it")
		return
	}
	shard.Control(entry)
}

func (e *evaluator) foldCalls(shard *seen.Shard, m ledger.Message) {
	f := &e.frame
	if err := ledger.DecodeCalls(f, m.Subject, m.Header, m.Data); err != nil {
		e.metrics.frames.WithLabelValues("undecodable").Inc() // dead-lettered by the aggregator
		return
	}
	// A gap is the aggregator's to alarm; after a restart every producer seems to
	// have one.
	fresh := shard.Calls(f, e.fresh)
	switch {
	case fresh.Verdict == dedup.Duplicate:
		e.metrics.frames.WithLabelValues("duplicate").Inc()
		return
	case fresh.Invalid:
		e.metrics.frames.WithLabelValues("undecodable").Inc() // dead-lettered by the aggregator
		return
	}
	e.metrics.frames.WithLabelValues("counted").Inc()
	if fresh.Keep == nil {
		for i := range f.N {
			e.observe(i)
		}
		return
	}
	e.fresh = fresh.Keep[:0]
	for _, i := range fresh.Keep {
		e.observe(int(i))
	}
}

// observe shows a call of the frame to the detectors.
func (e *evaluator) observe(i int) {
	f := &e.frame
	account, code := f.Account.At(i), usage.Code(f.Code.At(i))
	at := min(usage.Micros(f.Time.At(i)), e.stream)
	inTime := false
	for _, d := range e.detectors {
		if d.Observe(account, code, at) {
			inTime = true
		}
	}
	if !inTime {
		e.metrics.late.Inc()
	}
}

// advance takes stream time forward; every entry before it has been folded.
func (e *evaluator) advance(ctx context.Context, stream usage.Micros) error {
	e.stream = max(e.stream, stream)
	now := e.ledgerNow()
	e.lag(now)
	for i, d := range e.detectors {
		var s episodeState
		due := d.Advance(e.stream, now)
		for _, a := range due {
			var err error
			if s, err = e.commit(ctx, i, a); err != nil {
				e.aborted = true // ctx is done
				return err
			}
		}
		if len(due) > 0 {
			// All of them are stored, or others of another alerter are.
			e.adopt(i, s)
		}
	}
	return nil
}

// ledgerNow is our clock's time, or where a test clock stands, which nothing but
// entries advances. With e.mu.
func (e *evaluator) ledgerNow() usage.Micros {
	if e.test {
		return e.stream
	}
	return usage.At(e.now())
}

func (e *evaluator) lag(now usage.Micros) time.Duration {
	lag := time.Duration(max(now-e.stream, 0)) * time.Microsecond
	e.metrics.lag.Set(lag.Seconds())
	return lag
}

// commit makes a transition durable, trying until ctx is done: nothing that
// comes later in the ledger may be evaluated before.
func (e *evaluator) commit(ctx context.Context, i int, a usage.Alert) (episodeState, error) {
	a.RunbookURL, a.DashboardURL = e.links.Runbook, e.links.Dashboard
	made, pauses := false, newPauses()
	for try := 0; ; try++ {
		attempt, cancel := context.WithTimeout(ctx, 5*time.Second)
		s, mine, err := e.journal.commit(attempt, a)
		cancel()
		made = made || mine
		if err == nil {
			if made && s.Alert.StartedAt == a.StartedAt && s.Alert.Transition == a.Transition {
				e.metrics.transition(&s.Alert)
				e.log.Warn().Str("episode", s.Alert.EpisodeID).Str("transition", string(s.Alert.Transition)).Str("rule", a.Rule).
					Str("scope", a.Scope).Float64("value", a.Value).Float64("lag_s", a.LagSeconds).Msg(a.Summary)
			}
			return s, nil
		}
		if ctx.Err() != nil {
			return s, ctx.Err()
		}
		if !errors.Is(err, errConflict) {
			e.ready.NotReady("a transition of an episode can't be stored: " + err.Error())
			e.log.Error().Err(err).Int("try", try+1).Msg("a transition of an episode can't be stored: trying again")
		}
		if err := sleep(ctx, pauses.NextBackOff()); err != nil {
			return s, err
		}
	}
}

// tick lets time pass without traffic, takes note of what other alerters did,
// and saves the position. Its errors have been told and are tried again.
func (e *evaluator) tick(ctx context.Context) {
	if err := e.pass(ctx); err != nil {
		if ctx.Err() == nil {
			e.ready.NotReady(err.Error())
		}
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.now()
	lag := e.lag(e.ledgerNow())
	if now.Sub(e.lastSync) >= syncEvery {
		if err := e.sync(ctx); err != nil {
			if ctx.Err() == nil {
				e.ready.NotReady(err.Error())
			}
			return
		}
		e.lastSync = now
	}
	if now.Sub(e.lastSave) >= e.every {
		if err := e.save(ctx); err != nil && ctx.Err() == nil {
			e.log.Warn().Err(err).Msg("trying again")
		}
	}
	for _, d := range e.detectors {
		e.metrics.detector(d.Rule(), d.Stats())
	}
	switch {
	case e.stream == 0:
		e.ready.NotReady("the ledger is being read")
	case len(e.stopped) > 0:
		for _, newer := range e.stopped {
			e.ready.NotReady(newer.Error() + ": alerts about its accounts are missing; upgrade the alerter")
			break
		}
	case lag > e.maxLag:
		e.ready.NotReady(fmt.Sprintf("the pipeline is %s behind: alerts are late, and resolves are held back", lag.Round(time.Second)))
	default:
		e.metrics.heartbeat.Set(float64(now.UnixMicro()) / 1e6)
		e.ready.OK()
	}
}

// syncEvery is how often the states in KV are compared with the detectors', in
// case another alerter has changed them.
const syncEvery = 2 * time.Second

// pass lets stream time pass without entries. Only the stream itself can say
// that there are none: silence may as well be a broken connection. What it
// stores after its answer has a later time than the answer.
func (e *evaluator) pass(ctx context.Context) error {
	e.mu.Lock()
	busy := e.test || e.now().Sub(e.lastEntry) < e.step
	e.mu.Unlock()
	if busy {
		return nil
	}
	ask, cancel := context.WithTimeout(ctx, 2*time.Second)
	stream, err := e.js.Stream(ask, ledger.Stream)
	cancel()
	if err != nil {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.lag(e.ledgerNow())
		return fmt.Errorf("the ledger can't be asked for its end: %w", err)
	}
	info := stream.CachedInfo()
	e.mu.Lock()
	defer e.mu.Unlock()
	if info.State.LastSeq >= e.next || info.TimeStamp.IsZero() {
		return nil
	}
	return e.advance(ctx, usage.At(info.TimeStamp.Add(-idleMargin)))
}

// idleMargin is how long an entry may be on its way into the stream with its
// time fixed and its sequence not.
const idleMargin = 200 * time.Millisecond

func (e *evaluator) sync(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for i, d := range e.detectors {
		// Not only read: an alerter that died between its two writes has told
		// nobody, and this one, taking over the state, never would either.
		s, err := e.journal.recover(ctx, d.Rule(), d.Scope())
		if errors.Is(err, errConflict) {
			continue // it lives, and was faster: looked at again soon
		}
		if err != nil {
			return err
		}
		k := &e.known[i]
		if s.revision != k.revision && (s.Alert.EpisodeID != k.Alert.EpisodeID || s.Alert.N != k.Alert.N || s.revision == 0) {
			e.log.Info().Str("rule", d.Rule()).Str("episode", s.Alert.EpisodeID).Str("transition", string(s.Alert.Transition)).Msg("another alerter's transition")
			e.adopt(i, s)
		}
	}
	return nil
}

// save writes the position. Everything due up to it is durable.
func (e *evaluator) save(ctx context.Context) error {
	if e.aborted || e.stream == 0 {
		return nil
	}
	pos := position{Next: e.next, From: e.next, Detectors: map[string]alert.Memory{}, Rules: e.rules}
	oldest := e.stream
	for _, d := range e.detectors {
		m := d.Memory()
		pos.Detectors[detectorKey(d)] = m
		oldest = min(oldest, m.EvaluatedTo)
	}
	oldest -= usage.Micros(e.lookback.Microseconds())
	k := 0
	for k+1 < len(e.marks) && e.marks[k+1].at <= oldest {
		k++
	}
	e.marks = append(e.marks[:0], e.marks[k:]...)
	if len(e.marks) > 0 {
		pos.From = e.marks[0].sequence
	}
	data, err := json.Marshal(&pos)
	if err != nil {
		return fmt.Errorf("save the position: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if _, err := e.kv.Put(ctx, positionKey, data); err != nil {
		return fmt.Errorf("save the position: %w", err)
	}
	e.lastSave = e.now()
	return nil
}

// run reads the ledger from an entry on until ctx is done.
func (e *evaluator) run(ctx context.Context, from uint64) error {
	ticked := make(chan struct{})
	tickCtx, stop := context.WithCancel(ctx)
	go func() {
		defer close(ticked)
		t := time.NewTicker(max(min(e.step/2, time.Second), 10*time.Millisecond))
		defer t.Stop()
		for {
			select {
			case <-t.C:
				e.tick(tickCtx)
			case <-tickCtx.Done():
				return
			}
		}
	}()
	defer func() { stop(); <-ticked }()
	for {
		err := ledger.Read(ctx, e.js, ledger.ReadOptions{
			Stream: ledger.Stream, From: from,
			OnError: func(err error) {
				e.ready.NotReady("the ledger can't be read: " + err.Error())
				e.log.Warn().Err(err).Msg("the ledger can't be read: trying again")
			},
		}, func(m ledger.Message) error { return e.handle(ctx, m) })
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ledger.ErrPurged):
			stream, serr := e.js.Stream(ctx, ledger.Stream)
			if serr != nil {
				// Away just now: asked again.
				e.ready.NotReady("the ledger can't be read: " + serr.Error())
				if sleep(ctx, time.Second) != nil {
					return nil
				}
				continue
			}
			from = stream.CachedInfo().State.FirstSeq
			e.log.Error().Err(err).Uint64("from", from).Msg("the ledger was purged beyond what the windows need: they are incomplete for as long as they reach back")
		default:
			return fmt.Errorf("read the ledger: %w", err)
		}
	}
}

// newest returns the newest transition of every detector that had one.
func (e *evaluator) newest(ctx context.Context) ([]usage.Alert, error) {
	var all []usage.Alert
	for _, d := range e.detectors {
		s, err := e.journal.load(ctx, d.Rule(), d.Scope())
		if err != nil {
			return nil, err
		}
		if s.revision != 0 {
			all = append(all, s.Alert)
		}
	}
	return e.newestConservation(ctx, all)
}

// shutdown saves the position a last time.
func (e *evaluator) shutdown(ctx context.Context) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.save(ctx)
}

// newPauses returns the growing, jittered pauses between tries that never end.
func newPauses() *backoff.ExponentialBackOff {
	p := backoff.NewExponentialBackOff()
	p.InitialInterval, p.MaxInterval = 50*time.Millisecond, 2*time.Second
	return p
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
