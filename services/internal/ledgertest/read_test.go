package ledgertest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
)

// reading is a running ledger.Read that keeps what it was given.
type reading struct {
	t      *testing.T
	cancel context.CancelFunc
	done   chan struct{}
	err    error // after done

	mu       sync.Mutex
	got      []string
	sequence []uint64
	errs     []error
}

func read(t *testing.T, js jetstream.JetStream, o ledger.ReadOptions, hook func(ledger.Message) error) *reading {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	r := &reading{t: t, cancel: cancel, done: make(chan struct{})}
	if o.Stream == "" {
		o.Stream = ledger.Stream
	}
	o.OnError = func(err error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.errs = append(r.errs, err)
	}
	go func() {
		defer close(r.done)
		r.err = ledger.Read(ctx, js, o, func(m ledger.Message) error {
			if hook != nil {
				if err := hook(m); err != nil {
					return err
				}
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			r.got = append(r.got, string(m.Data))
			r.sequence = append(r.sequence, m.Sequence)
			return nil
		})
	}()
	t.Cleanup(func() { cancel(); <-r.done })
	return r
}

func (r *reading) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.got)
}

func (r *reading) interruptions() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.errs)
}

// has waits until everything has been read and checks that it came once, in
// order.
func (r *reading) has(want []string) {
	r.t.Helper()
	eventually(r.t, fmt.Sprintf("%d entries are read", len(want)), func() bool { return r.count() >= len(want) })
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Equal(r.got, want) {
		r.t.Fatalf("read %d entries, want %d; the first that differ: %s", len(r.got), len(want), firstDifference(r.got, want))
	}
	if !slices.IsSorted(r.sequence) {
		r.t.Fatalf("the sequences go back: %v", r.sequence)
	}
}

func firstDifference(got, want []string) string {
	for i := range want {
		if i >= len(got) || got[i] != want[i] {
			return fmt.Sprintf("%d: got %q, want %q", i, got[min(i, len(got)-1)], want[i])
		}
	}
	return "there are more than wanted"
}

// ends waits until Read has returned and returns its error.
func (r *reading) ends() error {
	r.t.Helper()
	eventually(r.t, "the reader gives up", func() bool {
		select {
		case <-r.done:
			return true
		default:
			return false
		}
	})
	return r.err
}

func appendEntries(t *testing.T, js jetstream.JetStream, subject string, from, n int) []string {
	t.Helper()
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("%s/%d", subject, from+i)
		eventually(t, "the entry is stored", func() bool {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := js.Publish(ctx, subject, []byte(out[i]))
			return err == nil
		})
	}
	return out
}

func consumers(t *testing.T, js jetstream.JetStream, stream string) int {
	t.Helper()
	s, err := js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatal(err)
	}
	return s.CachedInfo().State.Consumers
}

func TestAReaderGetsWhatIsThereAndWhatFollows(t *testing.T) {
	t.Parallel()
	_, _, js := provisioned(t)
	want := appendEntries(t, js, "calls.0", 0, 50)
	r := read(t, js, ledger.ReadOptions{}, nil)
	r.has(want)
	r.has(append(want, appendEntries(t, js, "control.0", 0, 50)...))
	if n := r.interruptions(); n != 0 {
		t.Errorf("%d interruptions: %v", n, r.errs)
	}
}

func TestAReaderOfSomeSubjectsGetsOnlyThose(t *testing.T) {
	t.Parallel()
	_, _, js := provisioned(t)
	var want []string
	r := read(t, js, ledger.ReadOptions{Subjects: ledger.ShardSubjects(1), Watchdog: 100 * time.Millisecond}, nil)
	for i := range 20 {
		appendEntries(t, js, "calls.0", i, 1)
		want = append(want, appendEntries(t, js, "calls.1", i, 1)...)
		appendEntries(t, js, "calls.10", i, 1)
		want = append(want, appendEntries(t, js, "control.1", i, 1)...)
	}
	r.has(want)
	if n := r.interruptions(); n != 0 {
		t.Errorf("%d interruptions: %v", n, r.errs)
	}
}

func TestAReaderBeginsWhereItIsTold(t *testing.T) {
	t.Parallel()
	_, _, js := provisioned(t)
	want := appendEntries(t, js, "calls.0", 0, 20)
	read(t, js, ledger.ReadOptions{From: 11}, nil).has(want[10:])
}

func TestAReaderSurvivesRestartsOfTheServerWithoutLossOrRepeat(t *testing.T) {
	t.Parallel()
	e, _, js := provisioned(t)
	r := read(t, js, ledger.ReadOptions{Subjects: []string{"calls.0", "control.0"}}, nil)
	want := appendEntries(t, js, "calls.0", 0, 100)
	for round := range 2 {
		e.stop()
		e.start()
		want = append(want, appendEntries(t, js, "calls.0", 100*(round+1), 100)...)
	}
	r.has(want)
}

func TestAReaderThatIsBusyDuringARestartGoesOnWhereItWas(t *testing.T) {
	t.Parallel()
	e, _, js := provisioned(t)
	want := appendEntries(t, js, "calls.0", 0, 600)
	reached, restarted := make(chan struct{}), make(chan struct{})
	r := read(t, js, ledger.ReadOptions{}, func(m ledger.Message) error {
		if m.Sequence == 100 {
			close(reached)
			<-restarted
		}
		return nil
	})
	<-reached
	e.stop()
	e.start()
	close(restarted)
	r.has(append(want, appendEntries(t, js, "calls.0", 600, 10)...))
}

func TestAReaderRecoversWhenItsConsumerIsDeletedUnderIt(t *testing.T) {
	t.Parallel()
	_, _, js := provisioned(t)
	r := read(t, js, ledger.ReadOptions{Watchdog: 100 * time.Millisecond}, nil)
	want := appendEntries(t, js, "calls.0", 0, 10)
	r.has(want)
	s, err := js.Stream(t.Context(), ledger.Stream)
	if err != nil {
		t.Fatal(err)
	}
	for round := range 3 {
		for name := range s.ConsumerNames(t.Context()).Name() {
			if err := js.DeleteConsumer(t.Context(), ledger.Stream, name); err != nil {
				t.Fatal(err)
			}
		}
		want = append(want, appendEntries(t, js, "calls.0", 10+10*round, 10)...)
		r.has(want)
	}
	eventually(t, "one consumer is left", func() bool { return consumers(t, js, ledger.Stream) == 1 })
	r.cancel()
	<-r.done
	if n := consumers(t, js, ledger.Stream); n != 0 {
		t.Errorf("%d consumers were left at the server", n)
	}
}

func TestAReaderThatIsCancelledReturnsAtOnce(t *testing.T) {
	t.Parallel()
	for name, away := range map[string]bool{"the server is there": false, "the server is away": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, _, js := provisioned(t)
			r := read(t, js, ledger.ReadOptions{}, nil)
			r.has(appendEntries(t, js, "calls.0", 0, 5))
			if away {
				e.stop()
				defer e.start() // for the engine's own cleanup
			}
			began := time.Now()
			r.cancel()
			<-r.done
			if d := time.Since(began); d > time.Second || r.err != nil {
				t.Errorf("it took %s and returned %v", d, r.err)
			}
		})
	}
}

func TestAHandlersErrorEndsTheReaderAndTheEntryIsReadAgainByTheNext(t *testing.T) {
	t.Parallel()
	_, _, js := provisioned(t)
	want := appendEntries(t, js, "calls.0", 0, 5)
	mine := errors.New("no more")
	r := read(t, js, ledger.ReadOptions{}, func(m ledger.Message) error {
		if m.Sequence == 3 {
			return mine
		}
		return nil
	})
	if err := r.ends(); !errors.Is(err, mine) {
		t.Fatalf("got %v", err)
	}
	r.has(want[:2])
	read(t, js, ledger.ReadOptions{From: 3}, nil).has(want[2:])
}

func purge(t *testing.T, js jetstream.JetStream, below uint64) {
	t.Helper()
	s, err := js.Stream(t.Context(), ledger.Stream)
	if err != nil {
		t.Fatal(err)
	}
	var opts []jetstream.StreamPurgeOpt
	if below > 0 {
		opts = append(opts, jetstream.WithPurgeSequence(below))
	}
	if err := s.Purge(t.Context(), opts...); err != nil {
		t.Fatal(err)
	}
}

func TestAReaderIsToldWhenWhatItNeedsWasPurged(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		from, below uint64 // below 0: everything
		purged      bool
	}{
		"up to what it needs":     {10, 10, false},
		"one entry too many":      {10, 11, true},
		"everything":              {10, 0, true},
		"all that it has read":    {21, 0, false},
		"it begins at the start":  {0, 10, false},
		"it begins at the first":  {1, 0, false},
		"some subjects, too many": {10, 15, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, _, js := provisioned(t)
			want := appendEntries(t, js, "calls.0", 0, 20)
			purge(t, js, c.below)
			o := ledger.ReadOptions{From: c.from}
			if name == "some subjects, too many" {
				o.Subjects = ledger.ShardSubjects(0)
			}
			r := read(t, js, o, nil)
			if c.purged {
				if err := r.ends(); !errors.Is(err, ledger.ErrPurged) || r.count() > 0 {
					t.Errorf("got %v after %d entries; want ErrPurged", err, r.count())
				}
				return
			}
			kept := want[min(max(c.from, c.below, 1)-1, 20):]
			if c.below == 0 {
				kept = nil
			}
			r.has(append(slices.Clone(kept), appendEntries(t, js, "calls.0", 20, 3)...))
		})
	}
}

// The handler holds the reader at its first entry; so far as the reader has
// not taken more off the server, the purge takes what it needs.
func TestAPurgeWhileReadingIsNoticed(t *testing.T) {
	t.Parallel()
	for name, subjects := range map[string][]string{"the whole stream": nil, "some subjects": ledger.ShardSubjects(0)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, _, js := provisioned(t)
			for i := range 30 { // 256 KiB each: more than is on its way at once
				if _, err := js.Publish(t.Context(), "calls.0", make([]byte, 256<<10)); err != nil {
					t.Fatal(i, err)
				}
			}
			reached, purged := make(chan struct{}), make(chan struct{})
			r := read(t, js, ledger.ReadOptions{Subjects: subjects, Watchdog: 100 * time.Millisecond}, func(m ledger.Message) error {
				if m.Sequence == 1 {
					close(reached)
					<-purged
				}
				return nil
			})
			<-reached
			purge(t, js, 30)
			close(purged)
			if err := r.ends(); !errors.Is(err, ledger.ErrPurged) {
				t.Errorf("after %d entries: %v; want ErrPurged", r.count(), err)
			}
		})
	}
}

func TestAnIdleReaderOfSomeSubjectsDoesNotMindThePurgeOfOthers(t *testing.T) {
	t.Parallel()
	_, nc, js := provisioned(t)
	mine := appendEntries(t, js, "calls.0", 0, 1)
	r := read(t, js, ledger.ReadOptions{Subjects: ledger.ShardSubjects(0), Watchdog: 20 * time.Millisecond}, nil)
	r.has(mine)
	appendEntries(t, js, "calls.1", 0, 20)
	// The reader asks for the last entry of each of its subjects, and later
	// for the stream again: by then it knows that nothing there is its own.
	for _, asked := range []string{"$JS.API.DIRECT.GET.LEDGER.leases.0", "$JS.API.STREAM.INFO.LEDGER"} {
		sub, err := nc.SubscribeSync(asked)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := sub.NextMsg(10 * time.Second); err != nil {
			t.Fatalf("%s: %v", asked, err)
		}
	}
	purge(t, js, 15)
	r.has(append(mine, appendEntries(t, js, "calls.0", 1, 3)...))
}

func TestAReaderIsToldWhenTheStreamLostWhatItHasRead(t *testing.T) {
	t.Parallel()
	remake := func(t *testing.T, js jetstream.JetStream) {
		t.Helper()
		s, err := js.Stream(t.Context(), ledger.Stream)
		if err != nil {
			t.Fatal(err)
		}
		cfg := s.CachedInfo().Config
		if err := js.DeleteStream(t.Context(), ledger.Stream); err != nil {
			t.Fatal(err)
		}
		if _, err := js.CreateStream(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("it begins behind the stream's end", func(t *testing.T) {
		t.Parallel()
		_, _, js := provisioned(t)
		appendEntries(t, js, "calls.0", 0, 5)
		if err := read(t, js, ledger.ReadOptions{From: 7}, nil).ends(); !errors.Is(err, ledger.ErrRewound) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("the stream is shorter now", func(t *testing.T) {
		t.Parallel()
		_, _, js := provisioned(t)
		r := read(t, js, ledger.ReadOptions{}, nil)
		r.has(appendEntries(t, js, "calls.0", 0, 20))
		remake(t, js)
		if err := r.ends(); !errors.Is(err, ledger.ErrRewound) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("the stream has grown as long again", func(t *testing.T) {
		t.Parallel()
		_, _, js := provisioned(t)
		hold, held := make(chan struct{}), make(chan struct{})
		r := read(t, js, ledger.ReadOptions{}, func(m ledger.Message) error {
			if m.Sequence == 20 {
				close(held)
				<-hold
			}
			return nil
		})
		appendEntries(t, js, "calls.0", 0, 20)
		<-held
		remake(t, js)
		appendEntries(t, js, "calls.0", 100, 30)
		close(hold)
		if err := r.ends(); !errors.Is(err, ledger.ErrRewound) {
			t.Errorf("got %v", err)
		}
	})
}

func TestAReaderWaitsForAStreamThatIsNotThereYet(t *testing.T) {
	t.Parallel()
	e := newEngine(t, embednats.Options{})
	_, js := e.connect()
	r := read(t, js, ledger.ReadOptions{}, nil)
	eventually(t, "the reader says what it waits for", func() bool { return r.interruptions() > 0 })
	if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{}); err != nil {
		t.Fatal(err)
	}
	r.has(appendEntries(t, js, "calls.0", 0, 3))
}

// What the server says of a request needs a place beside the messages: a
// handler that takes longer than requests last must not lose any.
// TestAServerThatIsSlowToMakeConsumersIsReadFrom: it needs longer than is waited
// while there may be an election, every time.
func TestAServerThatIsSlowToMakeConsumersIsReadFrom(t *testing.T) {
	t.Parallel()
	_, nc, js := provisioned(t)
	want := appendEntries(t, js, "calls.1", 0, 3)
	// A way to the server on which that takes long.
	const way = "slow.API."
	sub, err := nc.Subscribe(way+">", func(m *nats.Msg) {
		subject := strings.TrimPrefix(m.Subject, way)
		forward := func() { _ = nc.PublishRequest("$JS.API."+subject, m.Reply, m.Data) } // who asked finds out
		if !strings.HasPrefix(subject, "CONSUMER.CREATE.") {
			forward()
			return
		}
		time.AfterFunc(1800*time.Millisecond, forward)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	slow, err := jetstream.NewWithAPIPrefix(nc, strings.TrimSuffix(way, "."))
	if err != nil {
		t.Fatal(err)
	}
	begun := make(chan struct{})
	var once sync.Once
	r := read(t, slow, ledger.ReadOptions{}, func(ledger.Message) error { once.Do(func() { close(begun) }); return nil })
	select {
	case <-begun:
	case <-time.After(30 * time.Second):
		t.Fatal("nothing is read in 30 s")
	}
	r.has(want)
}

func TestAReaderThatIsSlowIsNeverInterrupted(t *testing.T) {
	t.Parallel()
	_, _, js := provisioned(t)
	want := appendEntries(t, js, "calls.0", 0, 1)
	free := make(chan struct{})
	n := 0
	r := read(t, js, ledger.ReadOptions{}, func(ledger.Message) error {
		if n++; n == 1 {
			<-free
		}
		return nil
	})
	// Two heartbeats wait for it when the rush begins.
	idle := time.NewTimer(2300 * time.Millisecond)
	defer idle.Stop()
	<-idle.C
	want = append(want, appendEntries(t, js, "calls.0", 1, 600)...)
	close(free)
	r.has(want)
	if n := r.interruptions(); n != 0 {
		t.Errorf("it was interrupted %d times: %v", n, r.errs)
	}
}

// Messages that together are larger than a request's bytes.
func TestLargeEntriesAreReadWithoutAnInterruption(t *testing.T) {
	t.Parallel()
	_, _, js := provisioned(t)
	var want []string
	for i := range 40 {
		text := strings.Repeat(string(rune('a'+i%26)), 600_000+i)
		if _, err := js.Publish(t.Context(), "calls.1", []byte(text)); err != nil {
			t.Fatal(err)
		}
		want = append(want, text)
	}
	r := read(t, js, ledger.ReadOptions{Subjects: []string{"calls.1"}}, nil)
	r.has(want)
	if n := r.interruptions(); n != 0 {
		t.Errorf("it was interrupted %d times: %v", n, r.errs)
	}
}

// Requests that end without a message follow each other, and say that they are
// there.
func TestAnIdleReaderIsNotInterrupted(t *testing.T) {
	t.Parallel()
	_, _, js := provisioned(t)
	want := appendEntries(t, js, "calls.0", 0, 3)
	r := read(t, js, ledger.ReadOptions{Watchdog: time.Hour}, nil)
	r.has(want)
	idle := time.NewTimer(5 * time.Second) // longer than a request lasts
	defer idle.Stop()
	<-idle.C
	r.has(append(want, appendEntries(t, js, "calls.0", 3, 3)...))
	if n := r.interruptions(); n != 0 {
		t.Errorf("it was interrupted %d times: %v", n, r.errs)
	}
}
