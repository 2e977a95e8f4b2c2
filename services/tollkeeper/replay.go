package tollkeeper

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/gate"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/testclock"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
	"github.com/tollkeeper/tollkeeper/services/gateway"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/drive"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/modelserver"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/replay"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/session"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
)

// ReplayOptions of a replay.
type ReplayOptions struct {
	// Rows in order of time.
	Rows []trace.Row
	// Limits that every account of the replay gets; none by default.
	Limits []plans.Limit
	// Speed: seconds of the trace in one second; 0 as fast as possible.
	Speed float64
	// KeepTime keeps the trace's own time stamps as event time.
	KeepTime bool
	// TestClock: the ledger has a test clock, which the replay moves through the
	// trace. Without it the ledger's time is now, and KeepTime is refused with limits
	// that end.
	TestClock   bool
	Concurrency int

	// NATS and ClickHouse of a Tollkeeper that runs.
	NATS       natsconn.Options
	ClickHouse history.Options
	// Wait is how long NATS, its ledger and ClickHouse may be missing at the start, each;
	// session.DefaultWait when 0.
	Wait time.Duration
	// SpoolDir of the replay's gateway.
	SpoolDir string

	Logger zerolog.Logger
	// Progress gets a line or a bar of progress.
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

// ErrInterrupted says that a replay was broken off: its report is of what was sent.
var ErrInterrupted = errors.New("interrupted")

// Replay drives a trace through a gateway of its own, in front of an upstream of its
// own, into a Tollkeeper that runs, and reports what clients, gateway, ledger,
// counters and history have of it. Every replay has accounts of its own, so that it
// is not mixed up with other traffic; they are removed at the end. When ctx is done
// it stops sending and ends in order, with a report and ErrInterrupted.
func Replay(ctx context.Context, o ReplayOptions) (*replay.Report, error) {
	if o.Patience <= 0 {
		o.Patience = time.Minute
	}
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	if o.Concurrency <= 0 {
		o.Concurrency = 32
	}
	if len(o.Rows) == 0 {
		return nil, errors.New("the trace has no rows (after the filters)")
	}
	if o.KeepTime {
		if err := replay.CheckTimes(o.Rows, o.Limits, o.TestClock, time.Now()); err != nil {
			return nil, err
		}
	}
	r := &replayRun{o: o, id: strings.ToLower(ksuid.New().String()[19:])}
	o.NATS.Name = "tollkeeper replay"
	conn, err := session.Open(ctx, session.Options{NATS: o.NATS, Wait: o.Wait})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	r.nc, r.js, r.shards = conn.NC, conn.JS, conn.Geometry.Shards
	if o.TestClock {
		if r.clock, err = testclock.Open(ctx, r.js); err != nil {
			return nil, err
		}
	}
	if r.history, err = openHistory(ctx, &o); err != nil {
		return nil, err
	}
	report, err := r.run(ctx)
	return report, errors.Join(err, r.history.Close())
}

// openHistory waits for ClickHouse as long as for NATS: a service waits without a bound,
// and a command does not.
func openHistory(ctx context.Context, o *ReplayOptions) (*history.History, error) {
	wait := cmp.Or(o.Wait, session.DefaultWait)
	begin, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	h, err := history.Open(begin, o.ClickHouse)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil, fmt.Errorf("ClickHouse at %s can't be reached within %s: start it, name another with --clickhouse-addr, or wait longer with --nats-wait", strings.Join(o.ClickHouse.Addrs, ", "), wait)
	}
	return h, err
}

// replayRun is the state of one replay.
type replayRun struct {
	o       ReplayOptions
	id      string
	nc      *nats.Conn
	js      jetstream.JetStream
	shards  uint32
	history *history.History
	clock   *testclock.Clock // nil: the ledger's time is now

	names    []string // of the trace's accounts
	ids      []string // of the ledger's, in the same order
	ours     map[string]bool
	rows     []replay.RowOf
	keys     []string          // API keys
	prefixes map[string]string // the trace's route → the path it has at the gateway
	watch    *replay.Watch
}

// closeTimeout bounds what a replay does after it was interrupted, but for the points
// to catch up.
const closeTimeout = 30 * time.Second

func (r *replayRun) run(asked context.Context) (report *replay.Report, err error) {
	// What was begun is ended in order, also after an interruption.
	ctx := context.WithoutCancel(asked)
	if err := r.open(asked); err != nil {
		return nil, errors.Join(err, r.close(ctx))
	}
	defer func() { err = errors.Join(err, r.close(ctx)) }()
	stream, err := r.js.Stream(ctx, ledger.Stream)
	if err != nil {
		return nil, fmt.Errorf("ledger: %w", err)
	}
	from := stream.CachedInfo().State.LastSeq + 1

	life, end := context.WithCancel(ctx)
	defer end()
	upstream, err := r.serveUpstream(life)
	if err != nil {
		return nil, err
	}
	gw, err := r.openGateway(life, upstream)
	if err != nil {
		return nil, err
	}
	r.watch = &replay.Watch{Ours: r.ours, Log: r.o.Logger}
	mirror := ledger.NewMirror(r.nc, r.js, ledger.MirrorOptions{Bucket: ledger.DecisionsBucket}, r.watch)
	watched := make(chan error, 1)
	go func() { watched <- mirror.Run(life) }()

	seen, driven := r.drive(asked, gw)
	interrupted := asked.Err() != nil
	if driven != nil && !interrupted || seen == nil {
		end()
		return nil, errors.Join(driven, gw.wait(), <-watched)
	}
	report = replay.NewReport(r.o.Rows, r.rows, seen)
	report.Interrupted = interrupted
	err = r.collect(ctx, report, gw, from)
	end()
	if err = errors.Join(err, gw.wait(), <-watched); err == nil && interrupted {
		err = ErrInterrupted
	}
	return report, err
}

// close takes the replay's accounts and plan out of the plans file; what they
// used stays.
func (r *replayRun) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, closeTimeout)
	defer cancel()
	applier := &plans.Applier{JS: r.js, NC: r.nc}
	_, err := applier.Change(ctx, "replay", func(now *plans.Document) *plans.Document {
		doc := *now
		doc.Accounts = slices.DeleteFunc(slices.Clone(doc.Accounts), func(a plans.Account) bool { return r.ours[a.ID] })
		doc.Plans = slices.DeleteFunc(slices.Clone(doc.Plans), func(p plans.Plan) bool { return p.ID == "replay-"+r.id })
		return &doc
	})
	if err != nil {
		return fmt.Errorf("remove the replay's accounts (they end with .%s): %w", r.id, err)
	}
	return nil
}

func (r *replayRun) say(format string, args ...any) {
	_, _ = fmt.Fprintf(r.o.Progress, format+"\n", args...) // for people; its loss harms nothing
}

// open makes the replay's accounts, with their keys and limits.
func (r *replayRun) open(ctx context.Context) error {
	r.ours, r.rows = map[string]bool{}, make([]replay.RowOf, len(r.o.Rows))
	extra := &plans.Document{Version: plans.FormatVersion}
	planID := ""
	if len(r.o.Limits) > 0 {
		planID = "replay-" + r.id
		extra.Plans = []plans.Plan{{ID: planID, Limits: r.o.Limits}}
	}
	accounts := map[string]int32{}
	keys := map[[2]string]int32{}
	for i := range r.o.Rows {
		row := &r.o.Rows[i]
		a, ok := accounts[row.Account]
		if !ok {
			a = int32(len(r.ids))
			accounts[row.Account] = a
			r.names, r.ids = append(r.names, row.Account), append(r.ids, row.Account+"."+r.id)
			r.ours[r.ids[a]] = true
			extra.Accounts = append(extra.Accounts, plans.Account{ID: r.ids[a], Plan: planID})
		}
		k, ok := keys[[2]string{row.Account, row.Key}]
		if !ok {
			k = int32(len(r.keys))
			keys[[2]string{row.Account, row.Key}] = k
			r.keys = append(r.keys, fmt.Sprintf("tk_replay_%s_%d", r.id, k))
			extra.Accounts[a].Keys = append(extra.Accounts[a].Keys, plans.Key{ID: fmt.Sprintf("%s-%d", r.id, k+1), SHA256: plans.HashKey(r.keys[k])})
		}
		r.rows[i] = replay.RowOf{Account: a, Key: k}
	}
	applier := &plans.Applier{JS: r.js, NC: r.nc}
	if _, err := applier.Change(ctx, "replay", func(now *plans.Document) *plans.Document { return plans.Merge(now, extra) }); err != nil {
		return fmt.Errorf("open the replay's accounts: %w", err)
	}
	r.say("%d calls of %d accounts (suffix .%s), %d keys", len(r.o.Rows), len(r.ids), r.id, len(r.keys))
	return nil
}

// config has a route for each of the trace's routes, by the trace's names: limits
// and events know them. A trace with more of them than a gateway can have is cut:
// the others share one.
func (r *replayRun) config(upstream string) gateway.Config {
	var c gateway.Config
	reserve := r.reserve()
	add := func(name, prefix string) {
		c.Routes = append(c.Routes, gateway.RouteConfig{
			Name: name, Prefix: prefix, StripPrefix: prefix != "/", Upstream: upstream, Profile: "problem",
			Model: gateway.ModelConfig{JSON: "model"}, Usage: gateway.UsageJSON, MetersHeader: modelserver.MetersHeader, Reserve: reserve,
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

// reserve bounds meters of the trace's own, which a limit of the tiers exact and
// leased has: no call uses more than the most that was recorded.
func (r *replayRun) reserve() map[string]int64 {
	most := map[string]int64{}
	for _, l := range r.o.Limits {
		m := usage.Meter(l.Meter)
		if l.Tier == string(usage.TierEventual) || m == usage.Calls || tokens(m) {
			continue
		}
		for i := range r.o.Rows {
			for _, q := range r.o.Rows[i].Meters {
				if q.Meter == m {
					most[l.Meter] = max(most[l.Meter], q.Value, 1)
				}
			}
		}
	}
	return most
}

func tokens(m usage.Meter) bool {
	return m == usage.InputTokens || m == usage.OutputTokens || m == usage.CachedInputTokens || m == usage.ReasoningTokens
}

func (r *replayRun) serveUpstream(ctx context.Context) (url string, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("listen for the upstream: %w", err)
	}
	go func() {
		if err := drive.ServeUpstream(ctx, l); err != nil {
			r.o.Logger.Error().Err(err).Msg("the replay's upstream ended")
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

// gatewayStop is time enough for everything that a replay's gateway holds.
const gatewayStop = 10 * time.Second

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
		TrustEventTime: r.o.KeepTime, SpoolDir: spool, Logger: r.o.Logger, StopTimeout: gatewayStop,
		// A replay measures what is counted: an aggregator that is away for a
		// while must not turn its calls into 503.
		Unknown: gate.Unknown{Mode: gate.PassUnknown, MaxCalls: 1 << 30},
		Ready: func(proxy, admin net.Addr) {
			g.url, g.admin = "http://"+proxy.String(), "http://"+admin.String()
			close(ready)
		},
	}
	if r.clock != nil {
		o.TestClock, o.Leases.Skew = r.clock.Now, drive.Skew
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

// drive sends the rows and shows progress.
func (r *replayRun) drive(ctx context.Context, gw *replayGateway) (*drive.Seen, error) {
	var answered atomic.Int64
	o := drive.Options{
		Rows: r.o.Rows, Account: func(i int) int { return int(r.rows[i].Account) }, Speed: r.o.Speed, KeepTime: r.o.KeepTime,
		Concurrency: r.o.Concurrency, Host: strings.TrimPrefix(gw.url, "http://"), Answered: &answered, Half: r.o.Halfway,
		Key:  func(i int) string { return r.keys[r.rows[i].Key] },
		Path: func(i int) string { return r.prefixes[r.o.Rows[i].Route] + "/v1/chat/completions" },
	}
	var windows []window.Kind
	for _, l := range r.o.Limits {
		kind, _ := window.Parse(usage.WindowKind(l.Window)) // the plan was checked
		windows = append(windows, kind)
		if usage.Tier(l.Tier).Leased() {
			o.Ordered = true
			o.Reserve = o.Reserve || l.Meter != string(usage.Calls)
		}
	}
	if r.clock != nil {
		o.Steps = &drive.Steps{Advance: r.clock.Advance, Settled: func(ctx context.Context) error {
			_, err := gw.settled(ctx, r.o.Patience)
			return err
		}, Windows: windows}
	}
	stop := replay.ShowProgress(r.o.Progress, &answered, int64(len(r.o.Rows)))
	seen, err := drive.Run(ctx, o)
	stop()
	return seen, err
}

// settled waits until everything that the gateway took is in the ledger.
func (g *replayGateway) settled(ctx context.Context, patience time.Duration) (gateway.Sent, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	wait := time.Millisecond
	for {
		s, err := g.sent(ctx)
		if err != nil {
			return s, fmt.Errorf("ask the gateway how much it has sent: %w", err)
		}
		if s.Acked == s.Added {
			return s, nil
		}
		select {
		case <-ctx.Done():
			return s, fmt.Errorf("the ledger has acknowledged %d of %d calls of the gateway after %s", s.Acked, s.Added, patience)
		case <-time.After(wait):
		}
		wait = min(2*wait, 10*time.Millisecond)
	}
}

// collect waits until each point has everything, and reads it.
func (r *replayRun) collect(ctx context.Context, report *replay.Report, gw *replayGateway, from uint64) error {
	ctx, cancel := context.WithTimeout(ctx, r.o.Patience)
	defer cancel()
	r.say("  all sent; waiting until gateway, ledger, counters and ClickHouse have caught up")
	if !gw.foreign {
		s, err := gw.settled(ctx, r.o.Patience)
		if err != nil {
			return err
		}
		report.Gateway = replay.Totals{Admitted: s.Sent.Admitted, Refused: s.Sent.Refused, Meters: s.Sent.Meters}
	}
	var err error
	if report.Fold, err = r.readLedger(ctx, from); err != nil {
		return err
	}
	report.Ledger = report.Fold.Totals
	if gw.foreign {
		report.GatewayUnknown = true
		if report.Fold, err = replay.SettledLedger(ctx, report.Fold, func() (replay.LedgerFold, error) { return r.readLedger(ctx, from) }); err != nil {
			return err
		}
		report.Ledger = report.Fold.Totals
	}
	ids := slices.Sorted(slices.Values(r.ids))
	if report.Counters, err = replay.ReadCounters(ctx, r.nc, r.shards, ids, report.Fold.LastOfShard); err != nil {
		return err
	}
	if report.History, err = replay.ReadHistory(ctx, r.history, ids, report.Fold); err != nil {
		return err
	}
	r.limits(report)
	return nil
}

// readLedger reads what the ledger has of ours, and when it took what led to denials.
func (r *replayRun) readLedger(ctx context.Context, from uint64) (replay.LedgerFold, error) {
	return replay.ReadLedger(ctx, r.js, from, func(a []byte) bool { return r.ours[string(a)] }, r.watch.Stored)
}

// limits looks how each limit was kept. Windows that end can be told only where calls
// kept their time in a ledger whose clock is the trace's.
func (r *replayRun) limits(report *replay.Report) {
	// Rows know when their clients sent them, which is before the gateway decided: by the
	// slowest answer at most.
	count := report.Seen.Longest
	if r.o.KeepTime {
		// The calls carry recorded times: their way is bounded by their answer
		// and their frame's.
		count += report.Fold.Transit
	} else {
		count += report.Fold.Latest
	}
	// The longest of all accounts: on a busy machine the gateway may hear of a decision
	// later than this process did, and of each of them by chance.
	decided := time.Duration(0)
	for _, d := range r.watch.Longest() {
		decided = max(decided, d)
	}
	for _, l := range r.o.Limits {
		kind, _ := window.Parse(usage.WindowKind(l.Window)) // the plan was checked
		if kind != window.Lifetime && r.clock == nil {
			continue
		}
		limit := replay.Limit{ID: l.ID, Meter: usage.Meter(l.Meter), Window: kind, Amount: l.Amount, Tier: usage.Tier(l.Tier)}
		if l.Lease != nil {
			limit.MaxExposure = l.Lease.MaxExposure
		}
		report.Check(r.o.Rows, r.rows, limit, func(int) (time.Duration, time.Duration) { return count, decided })
	}
}
