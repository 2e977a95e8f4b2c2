package tollkeeper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/gateway"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/modelserver"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/replay"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/session"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
)

// ReplayOptions of a replay.
type ReplayOptions struct {
	Rows []trace.Row
	// Limits that every account of the replay gets; none by default.
	Limits []plans.Limit
	// Speed: seconds of the trace in one second; 0 as fast as possible.
	Speed float64
	// KeepTime keeps the trace's own time stamps as event time.
	KeepTime    bool
	Concurrency int

	// NATS and ClickHouse of a Tollkeeper that runs.
	NATS       natsconn.Options
	ClickHouse history.Options
	// SpoolDir of the replay's gateway.
	SpoolDir string

	Logger zerolog.Logger
	// Progress gets a line a second.
	Progress io.Writer
	// Gateway, if set, gives the gateway in front of the upstream at a URL
	// instead of one of the replay's own. It must have metering of /v1/chat at
	// any path, and may die: then what it had sent is taken from the ledger.
	Gateway func(upstream string) (ReplayGateway, error)
	// Halfway is called once, when half of the calls are answered; tests kill
	// things there. May be nil.
	Halfway func()
	// Patience is how long the points may take to catch up; 60 s when 0.
	Patience time.Duration
}

// ReplayGateway is a gateway that is not the replay's own.
type ReplayGateway interface {
	// URL of the proxy, without a path.
	URL() string
}

// Replay drives a trace through a gateway of its own, in front of a model
// server of its own, into a Tollkeeper that runs, and reports what clients,
// gateway, ledger, counters and history have of it. Every replay has accounts of
// its own, so that it is not mixed up with other traffic.
func Replay(ctx context.Context, o ReplayOptions) (*replay.Report, error) {
	if o.Patience <= 0 {
		o.Patience = time.Minute
	}
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	if len(o.Rows) == 0 {
		return nil, errors.New("the trace has no rows (after the filters)")
	}
	r := &replayRun{o: o, id: strings.ToLower(ksuid.New().String()[19:])}
	o.NATS.Name = "tollkeeper replay"
	conn, err := session.Open(ctx, session.Options{NATS: o.NATS})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	r.nc, r.js = conn.NC, conn.JS
	if err := r.awaitLedger(ctx); err != nil {
		return nil, err
	}
	if r.history, err = history.Open(ctx, o.ClickHouse); err != nil {
		return nil, err
	}
	report, err := r.run(ctx)
	return report, errors.Join(err, r.history.Close())
}

// awaitLedger waits for a ledger to exist: a Tollkeeper may just be starting.
func (r *replayRun) awaitLedger(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for {
		g, err := ledger.ReadGeometry(ctx, r.js)
		if err == nil {
			r.shards = g.Shards
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("there is no ledger: is a Tollkeeper running there? %w", err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// replayRun is the state of one replay.
type replayRun struct {
	o       ReplayOptions
	id      string
	nc      *nats.Conn
	js      jetstream.JetStream
	shards  uint32
	history *history.History

	accounts map[string]string // the trace's name → the account's id
	ours     map[string]bool   // ids
	prefixes map[string]string // the trace's route → the path it has at the gateway
	held     sync.Map          // account id → longest latency of a decision, time.Duration
}

func (r *replayRun) run(ctx context.Context) (*replay.Report, error) {
	if err := r.open(ctx); err != nil {
		return nil, err
	}
	stream, err := r.js.Stream(ctx, ledger.Stream)
	if err != nil {
		return nil, fmt.Errorf("ledger: %w", err)
	}
	from := stream.CachedInfo().State.LastSeq + 1

	life, end := context.WithCancel(ctx)
	defer end()
	upstream, err := r.serveModel(life)
	if err != nil {
		return nil, err
	}
	gw, err := r.openGateway(life, upstream)
	if err != nil {
		return nil, err
	}
	mirror := ledger.NewMirror(r.nc, r.js, ledger.MirrorOptions{Bucket: ledger.DecisionsBucket}, (*decisionWatch)(r))
	watched := make(chan error, 1)
	go func() { watched <- mirror.Run(life) }()

	seen, err := r.drive(ctx, gw.url)
	if err != nil {
		end()
		return nil, errors.Join(err, gw.wait(), <-watched)
	}
	report := &replay.Report{Seen: seen, Clients: clientTotals(seen)}
	err = r.collect(ctx, report, gw, from)
	end()
	return report, errors.Join(err, gw.wait(), <-watched, r.close(ctx))
}

// close takes the replay's accounts and plan out of the plans file; what they
// used stays.
func (r *replayRun) close(ctx context.Context) error {
	applier := &plans.Applier{JS: r.js, NC: r.nc}
	_, err := applier.Change(ctx, "replay", func(now *plans.Document) *plans.Document {
		doc := *now
		doc.Accounts = slices.DeleteFunc(slices.Clone(doc.Accounts), func(a plans.Account) bool { return r.ours[a.ID] })
		doc.Plans = slices.DeleteFunc(slices.Clone(doc.Plans), func(p plans.Plan) bool { return p.ID == "replay-"+r.id })
		return &doc
	})
	if err != nil {
		return fmt.Errorf("close the replay's accounts (they end with .%s): %w", r.id, err)
	}
	return nil
}

func (r *replayRun) say(format string, args ...any) {
	_, _ = fmt.Fprintf(r.o.Progress, format+"\n", args...) // for people; its loss harms nothing
}

func (r *replayRun) key(row trace.Row) string {
	k := row.Key
	if k == "" {
		k = "1"
	}
	return "tk_replay_" + r.id + "_" + row.Account + "_" + k
}

// open makes the replay's accounts, with their keys and limits.
func (r *replayRun) open(ctx context.Context) error {
	r.accounts, r.ours = map[string]string{}, map[string]bool{}
	extra := &plans.Document{Version: plans.FormatVersion}
	planID := ""
	if len(r.o.Limits) > 0 {
		planID = "replay-" + r.id
		extra.Plans = []plans.Plan{{ID: planID, Limits: r.o.Limits}}
	}
	index := map[string]int{}
	keys := map[string]bool{}
	for _, row := range r.o.Rows {
		id, ok := r.accounts[row.Account]
		if !ok {
			id = row.Account + "." + r.id
			r.accounts[row.Account], r.ours[id] = id, true
			index[row.Account] = len(extra.Accounts)
			extra.Accounts = append(extra.Accounts, plans.Account{ID: id, Plan: planID})
		}
		if k := r.key(row); !keys[k] {
			keys[k] = true
			a := &extra.Accounts[index[row.Account]]
			a.Keys = append(a.Keys, plans.Key{ID: fmt.Sprintf("%s-%d", r.id, len(keys)), SHA256: plans.HashKey(k)})
		}
	}
	applier := &plans.Applier{JS: r.js, NC: r.nc}
	if _, err := applier.Change(ctx, "replay", func(now *plans.Document) *plans.Document { return plans.Merge(now, extra) }); err != nil {
		return fmt.Errorf("open the replay's accounts: %w", err)
	}
	r.say("%d calls of %d accounts (suffix .%s), %d keys", len(r.o.Rows), len(r.accounts), r.id, len(keys))
	return nil
}

// config has a route for each of the trace's routes, by the trace's names: limits
// and events know them. A trace with more of them than a gateway can have is cut:
// the others share one.
func (r *replayRun) config(upstream string) gateway.Config {
	var c gateway.Config
	add := func(name, prefix string) {
		c.Routes = append(c.Routes, gateway.RouteConfig{
			Name: name, Prefix: prefix, StripPrefix: prefix != "/", Upstream: upstream, Profile: "problem",
			Model: gateway.ModelConfig{JSON: "model"}, Usage: gateway.UsageJSON, MetersHeader: modelserver.MetersHeader,
		})
	}
	r.prefixes = map[string]string{}
	for _, row := range r.o.Rows {
		if _, known := r.prefixes[row.Route]; known || row.Route == "" || len(r.prefixes) == mostRoutes {
			continue
		}
		r.prefixes[row.Route] = "/replay/" + strconv.Itoa(len(r.prefixes))
		add(row.Route, r.prefixes[row.Route])
	}
	add("other-"+r.id, "/")
	return c
}

// mostRoutes of a trace are told apart.
const mostRoutes = 400

func (r *replayRun) path(row trace.Row) string { return r.prefixes[row.Route] + "/v1/chat/completions" }

func (r *replayRun) serveModel(ctx context.Context) (url string, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("listen for the model server: %w", err)
	}
	go func() {
		if err := telemetry.Serve(ctx, telemetry.ServeOptions{Listener: l, Handler: modelserver.Handler(modelserver.Options{})}); err != nil {
			r.o.Logger.Error().Err(err).Msg("model server")
		}
	}()
	return "http://" + l.Addr().String(), nil
}

// replayGateway is the gateway of a replay.
type replayGateway struct {
	url, admin string
	done       chan error
	scratch    string // removed at the end; empty: nothing
	foreign    bool   // not ours: nobody says what it has sent
}

// wait returns when the gateway has stopped. What it could not send it leaves in
// its spool, and a spool that is not empty is not removed.
func (g *replayGateway) wait() error {
	err := <-g.done
	if g.scratch != "" && err == nil {
		err = os.RemoveAll(g.scratch)
	}
	return err
}

// openGateway gives the gateway to drive.
func (r *replayRun) openGateway(ctx context.Context, upstream string) (*replayGateway, error) {
	if r.o.Gateway == nil {
		return r.startGateway(ctx, upstream)
	}
	g, err := r.o.Gateway(upstream)
	if err != nil {
		return nil, fmt.Errorf("the replay's gateway: %w", err)
	}
	done := make(chan error, 1)
	done <- nil // it is not ours to stop
	r.prefixes = map[string]string{}
	return &replayGateway{url: g.URL(), done: done, foreign: true}, nil
}

func (r *replayRun) startGateway(ctx context.Context, upstream string) (*replayGateway, error) {
	g := &replayGateway{done: make(chan error, 1)}
	spool := r.o.SpoolDir
	if spool == "" {
		dir, err := os.MkdirTemp("", "tollkeeper-replay-")
		if err != nil {
			return nil, fmt.Errorf("make the spool: %w", err)
		}
		spool, g.scratch = dir, dir
	}
	ready := make(chan struct{})
	o := gateway.Options{
		NATS: r.o.NATS, Config: r.config(upstream), Listen: "127.0.0.1:0", AdminListen: "127.0.0.1:0", Name: "replay-" + r.id,
		TrustEventTime: r.o.KeepTime, SpoolDir: spool, Logger: r.o.Logger,
		// A replay measures what is counted: an aggregator that is away for a
		// while must not turn its calls into 503.
		Unknown: gate.Unknown{Mode: gate.PassUnknown, MaxCalls: 1 << 30},
		Ready: func(proxy, admin net.Addr) {
			g.url, g.admin = "http://"+proxy.String(), "http://"+admin.String()
			close(ready)
		},
	}
	go func() { g.done <- gateway.Run(ctx, o) }()
	select {
	case <-ready:
	case err := <-g.done:
		return nil, fmt.Errorf("the replay's gateway: %w", err)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	// Without the directory every call would be answered 503.
	return g, g.untilReady(ctx)
}

func (g *replayGateway) untilReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var last string
	for {
		var status telemetry.ReadinessStatus
		if err := getJSON(ctx, g.admin+"/readyz", &status); err != nil {
			last = err.Error()
		} else if status.Ready {
			return nil
		} else {
			last = ""
			for _, c := range status.Components {
				if !c.OK {
					last += c.Name + ": " + c.Reason + "; "
				}
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the replay's gateway is not ready: %s", last)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (g *replayGateway) sent(ctx context.Context) (gateway.Sent, error) {
	var s gateway.Sent
	err := getJSON(ctx, g.admin+"/v1/sent", &s)
	return s, err
}

// getJSON reads a JSON answer, whatever its status.
func getJSON(ctx context.Context, url string, v any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	err = json.NewDecoder(io.LimitReader(resp.Body, 8<<20)).Decode(v)
	return errors.Join(err, resp.Body.Close())
}

// drive sends the rows and prints progress.
func (r *replayRun) drive(ctx context.Context, url string) (*replay.Seen, error) {
	var answered atomic.Int64
	half := int64(len(r.o.Rows) / 2)
	stop := make(chan struct{})
	var printer sync.WaitGroup
	printer.Go(func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		last := int64(0)
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				n := answered.Load()
				r.say("  %3d %%  %d of %d calls, %d a second", n*100/int64(len(r.o.Rows)), n, len(r.o.Rows), n-last)
				last = n
			}
		}
	})
	seen, err := replay.Drive(ctx, replay.DriveOptions{
		Rows: r.o.Rows, Speed: r.o.Speed, KeepTime: r.o.KeepTime, Concurrency: r.o.Concurrency, URL: url, Key: r.key, Path: r.path,
		Progress: func() {
			if answered.Add(1) == half && r.o.Halfway != nil {
				r.o.Halfway()
			}
		},
	})
	close(stop)
	printer.Wait()
	return seen, err
}

func clientTotals(seen *replay.Seen) replay.Totals {
	t := replay.Totals{Meters: map[usage.Meter]int64{}}
	for _, a := range seen.Accounts {
		t.Admitted += a.Admitted
		t.Refused += a.Refusals()
		for m, v := range a.Meters {
			t.Meters[m] += v
		}
	}
	return t
}

// collect waits until each point has everything, and reads it.
func (r *replayRun) collect(ctx context.Context, report *replay.Report, gw *replayGateway, from uint64) error {
	ctx, cancel := context.WithTimeout(ctx, r.o.Patience)
	defer cancel()
	r.say("  all sent; waiting until gateway, ledger, counters and ClickHouse have caught up")
	for !gw.foreign {
		s, err := gw.sent(ctx)
		if err != nil {
			return fmt.Errorf("ask the gateway what it has sent: %w", err)
		}
		if s.Acked == s.Added {
			report.Gateway = replay.Totals{Admitted: s.Sent.Admitted, Refused: s.Sent.Refused, Meters: s.Sent.Meters}
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the gateway has %d of %d calls acknowledged after %s", s.Acked, s.Added, r.o.Patience)
		case <-time.After(10 * time.Millisecond):
		}
	}
	var err error
	if report.Fold, err = replay.ReadLedger(ctx, r.js, from, func(a []byte) bool { return r.ours[string(a)] }); err != nil {
		return err
	}
	report.Ledger = report.Fold.Totals
	if gw.foreign {
		if err := r.settleLedger(ctx, report, from); err != nil {
			return err
		}
	}
	ids := slices.Sorted(maps.Keys(r.ours))
	if report.Counters, err = replay.ReadCounters(ctx, r.nc, r.shards, ids, report.Fold.LastOfShard); err != nil {
		return err
	}
	if report.History, err = r.readHistory(ctx, ids, report.Fold); err != nil {
		return err
	}
	r.overshoots(report)
	return nil
}

// settleLedger waits until nothing more of ours comes into the ledger for a
// while: a foreign gateway may have a spool to send.
func (r *replayRun) settleLedger(ctx context.Context, report *replay.Report, from uint64) error {
	const quiet = 2 * time.Second
	since, last := time.Now(), report.Ledger.Admitted+report.Ledger.Refused
	for time.Since(since) < quiet {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
		fold, err := replay.ReadLedger(ctx, r.js, from, func(a []byte) bool { return r.ours[string(a)] })
		if err != nil {
			return err
		}
		report.Fold, report.Ledger = fold, fold.Totals
		if n := fold.Admitted + fold.Refused; n != last {
			since, last = time.Now(), n
		}
	}
	report.GatewayUnknown = true
	return nil
}

// readHistory waits until the history has the ledger's newest call of ours.
func (r *replayRun) readHistory(ctx context.Context, ids []string, fold replay.LedgerFold) (replay.Totals, error) {
	var last uint64
	for _, s := range fold.LastOfShard {
		last = max(last, s)
	}
	for {
		sum, newest, err := r.askHistory(ctx, ids)
		if err == nil && newest >= last {
			return sum, nil
		}
		// ClickHouse may be away for a moment: that is what a replay may be
		// there to show.
		select {
		case <-ctx.Done():
			return sum, errors.Join(fmt.Errorf("ClickHouse has the ledger up to %d of %d after %s", newest, last, r.o.Patience), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (r *replayRun) askHistory(ctx context.Context, ids []string) (sum replay.Totals, newest uint64, err error) {
	sum.Meters = map[usage.Meter]int64{}
	for chunk := range slices.Chunk(ids, history.MaxAccounts) {
		t, err := r.history.Totals(ctx, history.TotalsQuery{Accounts: chunk})
		if err != nil {
			return sum, 0, fmt.Errorf("ClickHouse: %w", err)
		}
		newest = max(newest, t.LastSequence)
		sum.Admitted += t.Admitted
		sum.Refused += t.Refused
		for m, v := range t.Meters {
			sum.Meters[m] += v
		}
	}
	return sum, newest, nil
}

// overshoots compares what accounts were let to use of lifetime limits of calls
// with the bound of the eventual tier.
func (r *replayRun) overshoots(report *replay.Report) {
	count := report.Fold.Latest
	if r.o.KeepTime {
		// The calls carry recorded times: their way is bounded by their answer
		// and their frame's.
		count = report.Seen.Longest + report.Fold.Transit
	}
	for _, l := range r.o.Limits {
		if l.Meter != string(usage.Calls) || l.Window != string(usage.Lifetime) || l.Filter != nil {
			continue
		}
		for _, name := range slices.Sorted(maps.Keys(report.Seen.Accounts)) {
			t := report.Seen.Accounts[name]
			var decision time.Duration
			if v, ok := r.held.Load(r.accounts[name]); ok {
				decision = v.(time.Duration)
			}
			report.Overshoots = append(report.Overshoots, replay.Overshoot{
				Account: name, Limit: l.Amount, Admitted: t.Admitted, CountLatency: count, DecisionLatency: decision,
				Bound: replay.MostWithin(t.AdmittedAt, count+decision),
			})
		}
	}
}

// decisionWatch is another holder of decisions: it notes how long after its
// ledger entry a deny was held.
type decisionWatch replayRun

// Reset has the decisions of before; they say nothing about latency.
func (*decisionWatch) Reset([]ledger.Change) {}

// Stale says that decisions may be missed for a while.
func (w *decisionWatch) Stale(reason error) {
	w.o.Logger.Warn().Err(reason).Msg("decisions are not heard for a moment")
}

// Apply notes the latency of a deny of ours.
func (w *decisionWatch) Apply(c ledger.Change) {
	if c.Value == nil || strings.HasPrefix(c.Key, "checkpoint.") {
		return
	}
	d, err := ledger.UnmarshalDecision(c.Value)
	if err != nil || d.Verdict != usage.Deny || !w.ours[d.Account] {
		return
	}
	latency := time.Since(d.DecidedAt.Time())
	if v, ok := w.held.Load(d.Account); !ok || v.(time.Duration) < latency {
		w.held.Store(d.Account, latency)
	}
}
