package historian

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/services/internal/embedclickhouse"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
)

// childMarker turns this test binary into a historian that a test kills.
const childMarker = "TOLLKEEPER_TEST_HISTORIAN"

// point is a moment of a block's life at which the historian can die.
type point string

const (
	afterBoundary  point = "the boundary stands, nothing was sent"
	afterCalls     point = "the calls have arrived, their sums have not"
	afterRollups   point = "the sums have arrived, the calls have not"
	afterAll       point = "everything has arrived, nothing says so"
	beforeBoundary point = "the block is built, its boundary does not stand"
)

var points = []point{afterBoundary, afterCalls, afterRollups, afterAll, beforeBoundary}

// interruption ends the historian at a point of its nth block of calls.
type interruption struct {
	at    point
	block int64
	die   func(ctx context.Context) error

	blocks atomic.Int64
	parts  atomic.Int64 // of the block at hand that have arrived
}

func (i *interruption) seams() seams {
	return seams{
		grace: -1,
		part:  func(p part) part { return &interruptedPart{p, i} },
		journal: func(lane string, j journal) journal {
			if lane != "calls" {
				return j
			}
			return &interruptedJournal{j, i}
		},
	}
}

// now says whether the block at hand is the one.
func (i *interruption) now() bool { return i.blocks.Load() == i.block }

type interruptedJournal struct {
	journal
	i *interruption
}

func (j *interruptedJournal) save(ctx context.Context, b boundary) error {
	if b.Done {
		return j.journal.save(ctx, b)
	}
	if j.i.at == beforeBoundary && j.i.blocks.Load()+1 == j.i.block {
		return j.i.die(ctx)
	}
	if err := j.journal.save(ctx, b); err != nil {
		return err
	}
	j.i.parts.Store(0)
	j.i.blocks.Add(1)
	if j.i.at == afterBoundary && j.i.now() {
		return j.i.die(ctx)
	}
	return nil
}

type interruptedPart struct {
	part
	i *interruption
}

func (p *interruptedPart) Insert(ctx context.Context, token string) error {
	calls := p.Table() == "calls"
	if !calls && p.Table() != "usage_hourly" && p.Table() != "traffic_minute" {
		return p.part.Insert(ctx, token)
	}
	i := p.i
	if i.now() && (i.at == afterCalls && !calls || i.at == afterRollups && calls) {
		<-ctx.Done()
		return ctx.Err()
	}
	if err := p.part.Insert(ctx, token); err != nil {
		return err
	}
	arrived := i.parts.Add(1)
	if i.now() && (i.at == afterCalls || i.at == afterRollups && arrived == 2 || i.at == afterAll && arrived == 3) {
		return i.die(ctx)
	}
	return nil
}

func TestAHistorianThatStopsAnywhereLeavesEachCallOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := newClients(w, 2)
	for n, p := range points {
		c.some(10)
		reached := make(chan struct{})
		i := &interruption{at: p, block: int64(1 + n%3), die: func(ctx context.Context) error {
			close(reached)
			<-ctx.Done()
			return ctx.Err()
		}}
		stop := w.start(w.options(), i.seams())
		for stopped := false; !stopped; {
			select {
			case <-reached:
				stopped = true
			case <-t.Context().Done():
				t.Fatalf("%s was not reached", p)
			default:
				c.some(2) // until there are enough blocks
			}
		}
		if err := stop(); err != nil {
			t.Fatalf("%s: %v", p, err)
		}
	}
	w.start(w.options(), seams{})
	c.agree()
}

// runChild is a historian in a process of its own, which is killed at a point.
func runChild() int {
	var env struct {
		nats, clickhouse, password, at string
		block                          int64
	}
	fields := strings.Split(os.Getenv(childMarker), "|")
	env.nats, env.clickhouse, env.password, env.at = fields[0], fields[1], fields[2], fields[3]
	env.block, _ = strconv.ParseInt(fields[4], 10, 64) // written by the test
	i := &interruption{at: point(env.at), block: env.block, die: func(context.Context) error {
		return syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}}
	s := i.seams()
	s.grace = 0
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_, _ = bufio.NewReader(os.Stdin).ReadByte() // ends with the test
		cancel()
	}()
	err := run(ctx, Options{
		NATS:       natsconn.Options{URL: env.nats},
		ClickHouse: history.Options{Addrs: []string{env.clickhouse}, Database: embedclickhouse.Database, User: embedclickhouse.ServiceUser, Password: env.password},
		Registerer: prometheus.NewRegistry(), MaxAge: 20 * time.Millisecond, SnapshotEvery: 2, Logger: zerolog.New(os.Stderr).Level(zerolog.ErrorLevel),
	}, s)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func TestAHistorianThatIsKilledLeavesEachCallOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := newClients(w, 3)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for n, p := range points {
		c.some(10)
		child := exec.Command(self)
		child.Env = append(os.Environ(), childMarker+"="+strings.Join([]string{w.nats.ClientURL(), w.ch.Addr(), w.ch.Credentials().ServicePassword, string(p), strconv.Itoa(1 + n%3)}, "|"))
		child.Stderr = os.Stderr
		stdin, err := child.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- child.Wait() }()
		for killed := false; !killed; {
			select {
			case err := <-ended:
				var exit *exec.ExitError
				if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
					t.Fatalf("%s: the historian ended by itself: %v", p, err)
				}
				killed = true
			default:
				c.some(1)
			}
		}
		_ = stdin.Close() // its reader is dead
	}
	w.start(w.options(), seams{})
	c.agree()
}

func TestClickHouseMayBeKilledAtAnyTime(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := newClients(w, 4)
	o := w.options()
	w.start(o, seams{})
	for range 4 {
		c.some(20)
		pid := w.ch.PID()
		if pid == 0 {
			continue
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		c.some(10)
		eventually(t, "ClickHouse is back", 30*time.Second, func() bool { return w.ch.PID() != 0 && w.ch.PID() != pid })
	}
	c.agree()
	eventually(t, "the historian is ready again", 10*time.Second, func() bool { return o.Readiness.Status().Ready })
}

// lostAnswer is a part whose inserts arrive and whose answers do not, n times.
type lostAnswer struct {
	part
	left *atomic.Int64
}

func (p *lostAnswer) Insert(ctx context.Context, token string) error {
	err := p.part.Insert(ctx, token)
	if err == nil && p.left.Add(-1) >= 0 {
		return errors.New("the connection was lost before the answer came")
	}
	return err
}

func TestABlockWhoseAnswerWasLostIsNotSentTwice(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := newClients(w, 5)
	var left atomic.Int64
	left.Store(20)
	o := w.options()
	o.MaxRows = 50 // many blocks
	w.start(o, seams{part: func(p part) part { return &lostAnswer{p, &left} }})
	c.some(60)
	c.agree()
	if n := left.Load(); n > 0 {
		t.Errorf("only %d of 20 answers were lost", 20-n)
	}
}

func TestTwoHistoriansDoNotWriteAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := newClients(w, 6)
	ends := make(chan error, 2)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for range 2 {
		go func() { ends <- run(ctx, w.options(), seams{}) }()
	}
	var first error
	for ended := false; !ended; {
		select {
		case first = <-ends:
			ended = true
		default:
			c.some(2)
		}
	}
	if !errors.Is(first, errStale) {
		t.Errorf("one of the two ended with %v, wanted is %v", first, errStale)
	}
	c.some(5)
	c.agree()
	cancel()
	if err := <-ends; err != nil {
		t.Errorf("the other one ended with %v", err)
	}
}

func TestANewClickHouseGetsTheWholeHistoryAgain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := newClients(w, 8)
	c.some(10)
	stop := w.start(w.options(), seams{})
	c.agree()
	if err := stop(); err != nil {
		t.Fatal(err)
	}

	path, err := enginePath()
	if err != nil {
		t.Fatal(err)
	}
	if w.ch, err = embedclickhouse.Start(t.Context(), embedclickhouse.Options{DataDir: t.TempDir(), EnginePath: path, Logger: zerolog.Nop()}); err != nil {
		t.Fatal(err)
	}
	other := w.ch
	t.Cleanup(func() { w.stopping("the other ClickHouse", other.Stop) })
	if w.h, err = history.Open(t.Context(), w.clickhouse()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.h.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := w.h.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.start(w.options(), seams{})
	c.agree()
}
