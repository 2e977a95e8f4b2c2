// Package outboxtest checks the outbox of pkg/gate against a real NATS server.
package outboxtest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
)

const shards = 4

// rig is a NATS server that can be stopped and started again in its place.
type rig struct {
	t    testing.TB
	dir  string
	port int
	s    *embednats.Server
}

func newRig(t testing.TB) *rig {
	r := &rig{t: t, dir: t.TempDir()}
	r.start()
	nc := r.connect()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	until(t, "the streams are made", func() bool {
		_, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{Shards: shards})
		if err != nil {
			t.Log(err)
		}
		return err == nil
	})
	return r
}

func (r *rig) start() {
	r.t.Helper()
	s, err := embednats.Start(r.t.Context(), embednats.Options{StoreDir: r.dir, Port: r.port, Logger: zerolog.New(os.Stderr).Level(zerolog.WarnLevel)})
	if err != nil {
		r.t.Fatal(err)
	}
	r.s = s
	r.port = s.Addr().(*net.TCPAddr).Port
	r.t.Cleanup(r.stop)
}

func (r *rig) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := r.s.Stop(ctx); err != nil {
		r.t.Error(err)
	}
}

// connect connects as services/internal/natsconn does: for ever, without a
// buffer of its own.
func (r *rig) connect() *nats.Conn {
	r.t.Helper()
	nc, err := nats.Connect(r.s.ClientURL(), nats.MaxReconnects(-1), nats.ReconnectBufSize(-1), nats.RetryOnFailedConnect(true),
		nats.CustomReconnectDelay(func(int) time.Duration { return 20 * time.Millisecond }))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(nc.Close)
	return nc
}

func open(t testing.TB, o outbox.Options) *outbox.Outbox {
	t.Helper()
	if o.Shards == 0 {
		o.Shards = shards
	}
	o.Gateway = "test"
	b, err := outbox.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// run runs the outbox until the test ends or the returned stop is called.
func run(t testing.TB, b *outbox.Outbox) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return stop
}

func call(i int) *usage.Call {
	c := &usage.Call{Time: usage.At(time.Now()), Account: fmt.Sprintf("account-%d", i%97), RequestID: fmt.Sprintf("r%d", i), Route: "/v1/chat", Status: 200}
	c.Quantities.SetBuiltIn(usage.InputTokensIndex, int64(i))
	return c
}

// found is what a fresh reader sees in the ledger.
type found struct {
	calls      map[string]int // request id → how often after de-duplication
	frames     int
	duplicates int
	gaps       int
	closed     map[string]uint64 // producer/shard → last number
	complete   int               // of them
	leases     map[uint32]*tollkeeperv1.LeaseMarks
	input      int64
}

func (r *rig) read(t testing.TB) found {
	t.Helper()
	nc := r.connect()
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.Stream(t.Context(), ledger.Stream)
	if err != nil {
		t.Fatal(err)
	}
	out := found{calls: map[string]int{}, closed: map[string]uint64{}, leases: map[uint32]*tollkeeperv1.LeaseMarks{}}
	last := stream.CachedInfo().State.LastSeq
	if last == 0 {
		return out
	}
	sets := map[uint32]*dedup.Set{}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var f ledger.Frame
	err = ledger.Read(ctx, js, ledger.ReadOptions{Stream: ledger.Stream}, func(m ledger.Message) error {
		kind, shard, err := ledger.ParseSubject(m.Subject)
		if err != nil {
			return err
		}
		if sets[shard] == nil {
			sets[shard] = dedup.New(0)
		}
		switch kind {
		case ledger.KindCalls:
			if err := ledger.DecodeCalls(&f, m.Subject, m.Header, m.Data); err != nil {
				return err
			}
			out.frames++
			v, _ := sets[shard].Frame(dedup.Producer(f.Producer), f.Number)
			switch v {
			case dedup.Duplicate:
				out.duplicates++
			case dedup.Gap:
				out.gaps++
			}
			if v != dedup.Duplicate {
				for i := range f.N {
					c := f.Call(i)
					out.calls[c.RequestID]++
					n, _ := c.Usage(usage.InputTokens)
					out.input += n
				}
			}
		case ledger.KindClosing:
			e, err := ledger.DecodeClosing(m.Header, m.Data)
			if err != nil {
				return err
			}
			if pc := e.GetProducerClosed(); pc != nil {
				out.closed[fmt.Sprintf("%x/%d", pc.GetProducer(), shard)] = pc.GetLastNumber()
				if pc.GetComplete() {
					out.complete++
				}
				if pc.GetLeases() != nil {
					out.leases[shard] = pc.GetLeases()
				}
			}
		}
		if m.Sequence == last {
			cancel()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestEveryCallIsInTheLedgerOnce(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	reg := prometheus.NewPedanticRegistry()
	b := open(t, outbox.Options{NATS: r.connect(), Registerer: reg})
	stop := run(t, b)
	const n = 20_000
	for i := range n {
		if err := b.Add(t.Context(), uint32(i%shards), call(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	st := b.Stats()
	if st.Acked != n || st.Sent.Admitted != n || st.Sent.Meters[usage.InputTokensIndex] != n*(n-1)/2 {
		t.Errorf("stats: %+v", st)
	}
	if st.MemoryBytes != 0 {
		t.Errorf("%d bytes of memory are still taken", st.MemoryBytes)
	}
	if got := metric(t, reg, "tollkeeper_outbox_calls_total", "acked"); got != n {
		t.Errorf("the metric says %v", got)
	}
	stop()
	if err := b.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	// The next outbox of the process can have the same registry.
	if err := open(t, outbox.Options{NATS: r.connect(), Registerer: reg}).Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := r.read(t)
	if len(got.calls) != n || got.gaps != 0 || got.duplicates != 0 || got.input != n*(n-1)/2 {
		t.Errorf("%d calls, %d gaps, %d duplicates", len(got.calls), got.gaps, got.duplicates)
	}
	if len(got.closed) != shards {
		t.Errorf("closing entries: %v", got.closed)
	}
	t.Logf("%d calls in %d frames", n, got.frames)
}

// metric returns a counter by its outcome.
func metric(t testing.TB, reg *prometheus.Registry, name, outcome string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && m.GetLabel()[0].GetValue() == outcome {
				return m.GetCounter().GetValue()
			}
		}
	}
	t.Fatalf("there is no %s{outcome=%q}", name, outcome)
	return 0
}

// load adds calls at full speed from several goroutines until stopped and
// returns how many were added.
func load(t testing.TB, b *outbox.Outbox, stop <-chan struct{}) int {
	t.Helper()
	const workers = 4
	counts := make(chan int, workers)
	for w := range workers {
		go func() {
			n := 0
			defer func() { counts <- n }()
			for {
				select {
				case <-stop:
					return
				default:
				}
				i := n*workers + w
				if err := b.Add(context.Background(), uint32(i%shards), call(i)); err != nil {
					t.Error(err)
					return
				}
				n++
				if n%500 == 0 {
					runtime.Gosched()
				}
			}
		}()
	}
	total := 0
	for range workers {
		total += <-counts
	}
	return total
}

// until polls a condition that another goroutine or process brings about.
func until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(30 * time.Second)
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

func flush(t testing.TB, b *outbox.Outbox) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	if err := b.Flush(ctx); err != nil {
		t.Fatalf("%v: %+v", err, b.Stats())
	}
}

func TestNATSAwayUnderLoadLosesAndDoublesNothing(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := t.TempDir()
	b := open(t, outbox.Options{NATS: r.connect(), SpoolDir: dir, MemoryBytes: 4 << 20, Logger: zerolog.New(zerolog.NewTestWriter(t))})
	stop := run(t, b)
	halt := make(chan struct{})
	total := make(chan int, 1)
	go func() { total <- load(t, b, halt) }()
	until(t, "some calls are acknowledged", func() bool { return b.Stats().Acked > 2000 })
	r.stop()
	until(t, "the spool is used", func() bool { return b.Stats().Spooled > 20_000 })
	st := b.Stats()
	if st.MemoryBytes > 4<<20 {
		t.Errorf("%d bytes in memory", st.MemoryBytes)
	}
	r.start()
	defer func() {
		if t.Failed() {
			t.Logf("%+v", b.Stats())
		}
	}()
	until(t, "frames are acknowledged again", func() bool { return b.Stats().Acked > st.Acked+10_000 })
	close(halt)
	n := <-total
	flush(t, b)
	st = b.Stats()
	t.Logf("%d calls, %d of them spooled, %d frames, %d sent again", n, st.Spooled, st.Frames, st.Resent)
	if st.Sent.Admitted != int64(n) || st.Acked != int64(n) || st.MemoryBytes != 0 {
		t.Errorf("stats: %+v", st)
	}
	until(t, "the spool is deleted", func() bool { return b.Stats().SpoolBytes == 0 })
	stop()
	if err := b.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := r.read(t)
	if len(got.calls) != n || got.gaps != 0 || len(got.closed) != shards {
		t.Errorf("%d calls in the ledger of %d, %d gaps, closed %v", len(got.calls), n, got.gaps, got.closed)
	}
	for id, times := range got.calls {
		if times != 1 {
			t.Fatalf("call %s is there %d times", id, times)
		}
	}
	if left := files(t, dir); len(left) != 1 {
		t.Errorf("left in the spool directory: %v", left)
	}
}

// files lists the spool directory; the lock file always stays.
func files(t testing.TB, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // deleted while we look
		}
		if err == nil && !e.IsDir() {
			out = append(out, p)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestTwoOutboxesCantShareASpool(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := t.TempDir()
	b := open(t, outbox.Options{NATS: r.connect(), SpoolDir: dir})
	_, err := outbox.Open(outbox.Options{NATS: r.connect(), SpoolDir: dir, Shards: shards})
	if !errors.Is(err, outbox.ErrSpoolInUse) || !strings.Contains(err.Error(), dir) {
		t.Errorf("got %v", err)
	}
	if err := b.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := open(t, outbox.Options{NATS: r.connect(), SpoolDir: dir}).Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestWhatACloseLeavesInTheSpoolTheNextOneSends(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := t.TempDir()
	r.stop()
	b := open(t, outbox.Options{NATS: r.connect(), SpoolDir: dir})
	stop := run(t, b)
	const n = 5000
	for i := range n {
		if err := b.Add(t.Context(), uint32(i%shards), call(i)); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := b.Flush(ctx); !errors.Is(err, outbox.ErrSpooled) {
		t.Errorf("flush: %v", err)
	}
	stop()
	if err := b.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := b.Stats().Sent.Admitted; got != n {
		t.Errorf("sent %d", got)
	}
	if err := b.Add(t.Context(), 0, call(0)); !errors.Is(err, outbox.ErrClosed) {
		t.Errorf("add after close: %v", err)
	}
	r.start()
	b2 := open(t, outbox.Options{NATS: r.connect(), SpoolDir: dir})
	run(t, b2)
	until(t, "the old spool is gone", func() bool { return b2.Stats().Recovered.Admitted == n && len(files(t, dir)) == 2 })
	if got := b2.Stats().Sent.Admitted; got != 0 {
		t.Errorf("the second producer says it sent %d", got)
	}
	if err := b2.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := r.read(t)
	if len(got.calls) != n || got.gaps != 0 || len(got.closed) != shards {
		t.Errorf("%d calls, %d gaps, closed %v", len(got.calls), got.gaps, got.closed)
	}
}
