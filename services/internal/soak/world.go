// Package soak proves that Tollkeeper's laws hold whatever dies: it runs every
// part as a process of its own under load, lets a seeded schedule of faults loose
// on them, and compares what the clients themselves saw with the ledger, the
// counters and the history, call by call.
package soak

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/faults"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/fleet"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/points"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/report"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/traffic"
)

// Options of a scenario's run.
type Options struct {
	// Programs is the folder of the built programs.
	Programs string
	// Dir holds data and logs; each scenario makes its own folder in it.
	Dir string
	// Seed of everything random.
	Seed uint64
	// Rounds; 0 is the scenario's own number.
	Rounds int
	// Short is for tests: few rounds, little load.
	Short bool
	// Rate bounds the load in calls a second; 0 is the scenario's own.
	Rate float64
	// Say gets a line for people now and then.
	Say func(format string, args ...any)
}

// world is a running fleet with traffic around it.
type world struct {
	o        Options
	out      *report.Outcome
	r        *rand.Rand
	fleet    *fleet.Fleet
	net      *fleet.Namespaces
	upstream *traffic.Upstream
	traffic  *traffic.Traffic
	nc       *nats.Conn
	js       jetstream.JetStream
	shards   uint32
	ledger   *points.Ledger
	accounts []traffic.Account
	safe     bool
	load     int // accounts of the load; those after are probes
	probe    int // the next one

	mu   sync.Mutex
	ends map[string][]int64 // when gateways were killed, microseconds of the traffic
}

// begin starts a fleet with plans applied. The world must be closed.
// probing is how many crossings there will be at most.
func begin(ctx context.Context, o Options, out *report.Outcome, f fleet.Options, probing int, doc *plans.Document, accounts []traffic.Account) (w *world, err error) {
	load := len(accounts)
	if probing > 0 {
		doc, accounts = probes(probing, doc, accounts)
	}
	w = &world{o: o, load: load, probe: load, out: out, r: rand.New(rand.NewPCG(o.Seed, 1)), net: f.Net, accounts: accounts, safe: f.SpoolBeforeAnswer, ends: map[string][]int64{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	host := "127.0.0.1"
	if f.Net != nil {
		host = f.Net.Harness()
	}
	if w.upstream, err = traffic.StartUpstream(host); err != nil {
		return w, err
	}
	f.Dir, f.Programs, f.Upstream = o.Dir, o.Programs, w.upstream.URL()
	began := time.Now()
	if w.fleet, err = fleet.Start(ctx, f); err != nil {
		return w, err
	}
	if w.nc, err = natsconn.Connect(ctx, w.fleet.NATSOptions()); err != nil {
		return w, err
	}
	if w.js, err = jetstream.New(w.nc); err != nil {
		return w, fmt.Errorf("jetstream: %w", err)
	}
	geometry, err := ledger.ReadGeometry(ctx, w.js)
	if err != nil {
		return w, err
	}
	w.shards = geometry.Shards
	w.traffic = traffic.New("s"+ksuid.New().String(), accounts, w.fleet.GatewayURLs())
	w.ledger = points.NewLedger(w.traffic.Number)
	if err := w.apply(ctx, doc); err != nil {
		return w, err
	}
	if err := w.known(ctx); err != nil {
		return w, err
	}
	o.Say("%s: %d processes run after %.1f s", out.Scenario, len(w.fleet.Processes()), time.Since(began).Seconds())
	return w, nil
}

// apply makes a document hold, beside what holds.
func (w *world) apply(ctx context.Context, doc *plans.Document) error {
	applier := &plans.Applier{JS: w.js, NC: w.nc}
	if _, err := applier.Change(ctx, "soak", func(now *plans.Document) *plans.Document { return plans.Merge(now, doc) }); err != nil {
		return fmt.Errorf("apply the plans: %w", err)
	}
	return nil
}

// known waits until every gateway answers for the last of the accounts: with its
// key, its account and its shard.
func (w *world) known(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	last := w.load - 1
	for g := range w.fleet.GatewayURLs() {
		for {
			a := w.traffic.Call(ctx, traffic.Shape{Account: last, Gateway: g})
			if a.Outcome == traffic.Passed {
				break
			}
			if err := pause(ctx, 20*time.Millisecond); err != nil {
				return fmt.Errorf("gateway-%d does not serve: status %d: %s: %w", g+1, a.Status, a.Body, err)
			}
		}
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// close ends everything.
func (w *world) close() error {
	var errs []error
	if w.traffic != nil {
		w.traffic.Close()
	}
	if w.nc != nil {
		w.nc.Close()
	}
	if w.fleet != nil {
		if err := w.fleet.Close(); err != nil {
			// How long a clean stop may take is a promise, not a law.
			w.out.Missed = append(w.out.Missed, err.Error())
		}
		for _, p := range w.fleet.Processes() {
			for _, line := range p.Complaints(3) {
				w.out.Breaks("%s", line)
			}
			if n := p.EndedByItself(); n > 0 {
				if w.out.ByItself == nil {
					w.out.ByItself = map[string]int{}
				}
				w.out.ByItself[p.Name] = n
			}
		}
	}
	if w.upstream != nil {
		errs = append(errs, w.upstream.Close())
	}
	if w.net != nil {
		errs = append(errs, w.net.Close())
	}
	return errors.Join(errs...)
}

// supervise starts again what ended by itself, as an init system does, until ctx
// is done.
func (w *world) supervise(ctx context.Context) {
	for pause(ctx, 100*time.Millisecond) == nil {
		for _, p := range w.fleet.Processes() {
			if p.DiedByItself() {
				w.o.Say("%s: %s ended by itself, it is started again", w.out.Scenario, p.Name)
				_ = p.Start() // the next turn tries again
			}
		}
	}
}

// rage lets the faults loose, one after the other, while what each brings about
// lasts on its own; it returns when all of it is over.
func (w *world) rage(ctx context.Context, list []faults.Fault) {
	var lasting sync.WaitGroup
	busy := faults.NewBusy()
	for _, f := range list {
		if pause(ctx, f.After) != nil {
			break
		}
		if len(f.Victims) == len(w.fleet.Processes()) {
			lasting.Wait() // everything at once needs everything
		}
		for !busy.Take(f.Victims) {
			if pause(ctx, 20*time.Millisecond) != nil {
				break
			}
		}
		if ctx.Err() != nil {
			break
		}
		w.count(f)
		lasting.Go(func() {
			defer busy.Free(f.Victims)
			w.strike(ctx, f)
		})
	}
	lasting.Wait()
}

func (w *world) count(f faults.Fault) {
	if w.out.Faults == nil {
		w.out.Faults = map[string]int{}
	}
	for _, v := range f.Victims {
		w.out.Faults[string(f.Act)+" "+v]++
	}
	if f.Act == faults.Kill {
		w.out.Kills++
		if len(f.Victims) == len(w.fleet.Processes()) {
			w.out.AtOnce++
		}
	}
}

// strike does one fault and undoes it.
func (w *world) strike(ctx context.Context, f faults.Fault) {
	each := func(what string, do func(name string, p *fleet.Process) error) {
		var wg sync.WaitGroup
		for _, name := range f.Victims {
			wg.Go(func() {
				if err := do(name, w.fleet.Process(name)); err != nil {
					w.o.Say("%s: %s %s: %v", w.out.Scenario, what, name, err)
				}
			})
		}
		wg.Wait()
	}
	switch f.Act {
	case faults.Kill:
		each("kill", func(name string, p *fleet.Process) error {
			err := p.Kill()
			w.ended(name)
			return err
		})
		_ = pause(ctx, f.For) // at the run's end it is not waited
		each("start", func(_ string, p *fleet.Process) error { return p.Start() })
	case faults.Terminate:
		each("end", func(name string, p *fleet.Process) error {
			err := p.Stop(20 * time.Second)
			if err != nil {
				w.ended(name) // it had to be killed
			}
			return err
		})
		_ = pause(ctx, f.For) // as above
		each("start", func(_ string, p *fleet.Process) error { return p.Start() })
	case faults.Freeze:
		each("freeze", func(_ string, p *fleet.Process) error { return p.Freeze() })
		_ = pause(ctx, f.For) // as above
		each("thaw", func(_ string, p *fleet.Process) error { return p.Thaw() })
	case faults.Cut:
		each("cut", func(name string, _ *fleet.Process) error { return w.fleet.Cut(name) })
		_ = pause(ctx, f.For) // as above
		each("mend", func(name string, _ *fleet.Process) error { return w.fleet.Mend(name) })
	}
}

// ended notes when a process was killed.
func (w *world) ended(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ends[name] = append(w.ends[name], time.Since(w.traffic.Began()).Microseconds())
}

// How long the points may take to catch up, and for how long nothing must have
// come any more before what is missing counts as lost.
const (
	patience = 90 * time.Second
	quiet    = 8 * time.Second
	still    = 700 * time.Millisecond
)

// settle waits until everything that was sent has arrived, and compares all
// points. The traffic must have ended and every process must run.
func (w *world) settle(ctx context.Context) (points.Check, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("the points did not catch up in time"))
	defer cancel()
	began := time.Now()
	if err := w.fleet.AwaitReady(ctx); err != nil {
		return points.Check{}, err
	}
	ready := time.Since(began)
	if err := w.drain(ctx); err != nil {
		return points.Check{}, err
	}
	drained := time.Since(began)
	defer func() {
		if all := time.Since(began); all > 15*time.Second {
			w.o.Say("%s: the gateways were ready after %.1f s, the ledger had everything after %.1f s, the other points after %.1f s", w.out.Scenario, ready.Seconds(), drained.Seconds(), all.Seconds())
		}
	}()
	p := points.Points{Seen: w.traffic.Seen(), Ledger: w.ledger}
	ids := make([]string, len(w.accounts))
	for i, a := range w.accounts {
		ids[i] = a.ID
	}
	var err error
	if p.Counters, err = points.Counters(ctx, w.nc, w.shards, ids, w.ledger.LastOfShard); err != nil {
		return points.Check{}, err
	}
	if w.fleet.Process(fleet.Historian) != nil {
		calls := int64(0)
		for _, s := range w.ledger.Accounts {
			calls += s.Admitted + s.Refused
		}
		h, err := points.ReadHistory(ctx, points.HistoryOptions{HTTP: w.fleet.ClickHouseHTTP(), Open: w.fleet.HistoryOptions(), Run: w.traffic.Run, Number: w.traffic.Number}, w.ledger.LastOurs, calls)
		if err != nil {
			return points.Check{}, err
		}
		p.History = &h
		if p.Rollups, err = points.Rollups(ctx, w.fleet.HistoryOptions(), ids); err != nil {
			return points.Check{}, err
		}
	}
	return points.Compare(p), nil
}

// drain reads the ledger until all that was answered is in it and the gateways
// have nothing more to send, or nothing has come for a while.
func (w *world) drain(ctx context.Context) error {
	last, since := uint64(0), time.Now()
	for {
		if err := w.readLedger(ctx); err != nil {
			return err
		}
		if w.ledger.LastOurs != last {
			last, since = w.ledger.LastOurs, time.Now()
		}
		switch age := time.Since(since); {
		case age >= quiet:
			w.o.Say("%s: nothing has come for %s: %d answered calls are missing; the gateways say %v", w.out.Scenario, quiet, w.missing(), w.sent(ctx))
			return nil
		case age >= still && w.missing() == 0 && w.sentAll(ctx):
			return nil
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return fmt.Errorf("wait for the ledger: %w", context.Cause(ctx))
		}
	}
}

// readLedger reads on, and again where NATS was just coming up.
func (w *world) readLedger(ctx context.Context) error {
	for {
		err := w.ledger.Read(ctx, w.js)
		if err == nil {
			return nil
		}
		if pause(ctx, 200*time.Millisecond) != nil {
			return err
		}
	}
}

// missing counts answered calls that the ledger does not have yet.
func (w *world) missing() int {
	n := 0
	for i, s := range w.traffic.Seen() {
		if (s.Outcome == traffic.Passed || s.Outcome == traffic.Refused) && w.ledger.At(i).Times() == 0 {
			n++
		}
	}
	return n
}

// sent is what a gateway says it has taken and what of it is acknowledged.
type sent struct{ Added, Acked, Invalid, Dropped, Refused, Rejected int64 }

// sent asks the gateways what they have sent; one that does not say has a negative
// number.
func (w *world) sent(ctx context.Context) []sent {
	all := make([]sent, len(w.fleet.GatewayURLs()))
	for g := range all {
		all[g].Added = -1
		resp, err := w.fleet.AdminGet(ctx, g, "/v1/sent")
		if err != nil {
			continue
		}
		var s sent
		err = json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&s)
		_ = resp.Body.Close() // it is read
		if err == nil {
			all[g] = s
		}
	}
	return all
}

// sentAll says whether all that the gateways took is acknowledged.
func (w *world) sentAll(ctx context.Context) bool {
	for _, s := range w.sent(ctx) {
		if s.Added < 0 || s.Acked < s.Added {
			return false
		}
	}
	return true
}
