package outboxtest

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/marks"
)

// logged is what was logged until now.
type logged struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logged) count(text string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range strings.Lines(l.buf.String()) {
		if strings.Contains(line, `"level":"error"`) && strings.Contains(line, text) {
			n++
		}
	}
	return n
}

func TestAKillLosesNoCallThatWasAnsweredAfterItsDirectoryWentAway(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := t.TempDir()
	b := open(t, outbox.Options{NATS: r.connect(), SpoolDir: dir, SpoolBeforeAnswer: true, Logger: zerolog.Nop()})
	stop := run(t, b)
	taken := 0
	take := func() {
		if err := b.Add(t.Context(), uint32(taken%shards), call(taken)); err != nil {
			t.Fatal(err)
		}
		taken++
	}
	take()
	if err := os.Rename(filepath.Join(dir, b.Producer().String()), filepath.Join(t.TempDir(), "elsewhere")); err != nil {
		t.Fatal(err)
	}
	until(t, "it is noticed", func() bool { take(); return b.Stats().SpoolFailing })
	until(t, "there is another", func() bool { return !b.Stats().SpoolFailing })
	flush(t, b)
	r.stop() // from here on only the spool makes a call safe
	for range 100 {
		take()
	}
	stop()
	dead := killed(t, dir)
	if err := b.Close(t.Context()); err != nil {
		t.Error(err)
	}
	r.start()
	recovered(t, r, dead)
	if got := r.read(t); len(got.calls) != taken || got.gaps != 0 {
		t.Errorf("%d of %d answered calls are in the ledger, %d gaps", len(got.calls), taken, got.gaps)
	}
}

// What was answered before is in memory until the ledger has it, and goes to the new
// directory as well.
func TestWhatWasInADirectoryThatWentAwayIsWrittenToTheNextOne(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.stop()
	dir := t.TempDir()
	b := open(t, outbox.Options{NATS: r.connect(), SpoolDir: dir, SpoolBeforeAnswer: true, Logger: zerolog.Nop()})
	stop := run(t, b)
	const n = 50
	for i := range n + 1 {
		if i == n {
			if err := os.RemoveAll(filepath.Join(dir, b.Producer().String())); err != nil {
				t.Fatal(err)
			}
		}
		if err := b.Add(t.Context(), uint32(i%shards), call(i)); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	dead := killed(t, dir)
	if err := b.Close(t.Context()); err != nil {
		t.Error(err)
	}
	r.start()
	recovered(t, r, dead)
	if got := r.read(t); len(got.calls) != n+1 || got.gaps != 0 {
		t.Errorf("%d of %d answered calls are in the ledger, %d gaps", len(got.calls), n+1, got.gaps)
	}
}

// Without its spool a gateway goes on as long as the ledger makes calls safe, says what
// to do, and ends in order when that has all of them.
func TestASpoolThatGoesAwayIsToldAndNothingInMemoryIsLost(t *testing.T) {
	t.Parallel()
	for name, goes := range map[string]func(dir string) error{
		"deleted":    os.RemoveAll,
		"moved away": func(dir string) error { return os.Rename(dir, dir+"-elsewhere") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			dir := filepath.Join(t.TempDir(), "spool")
			var said logged
			b := open(t, outbox.Options{NATS: r.connect(), SpoolDir: dir, SpoolBeforeAnswer: true, OnFull: outbox.Refuse, Logger: zerolog.New(&said)})
			stop := run(t, b)
			lease := []marks.Mark{{Account: "acme", Limit: "free/calls", UsedAtMost: 1}}
			if err := b.Marks().Write(0, lease); err != nil {
				t.Fatal(err)
			}
			taken := 0
			take := func() error {
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				err := b.Add(ctx, uint32(taken%shards), call(taken))
				if err == nil {
					taken++
				}
				return err
			}
			for range 100 {
				if err := take(); err != nil {
					t.Fatal(err)
				}
			}
			if err := goes(dir); err != nil {
				t.Fatal(err)
			}
			until(t, "it is noticed", func() bool {
				if err := take(); err != nil {
					t.Fatalf("the ledger takes calls: %v", err)
				}
				return b.Stats().SpoolFailing
			})
			for range 3 {
				if err := b.Marks().Write(0, lease); err == nil {
					t.Error("a mark is durable in a file that nobody finds")
				}
			}
			r.stop()
			until(t, "neither disk nor ledger makes calls safe", func() bool {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
				defer cancel()
				err := b.Add(ctx, uint32(taken%shards), call(taken))
				if err == nil || errors.Is(err, outbox.ErrNotSafe) {
					taken++ // it is in memory
				}
				return errors.Is(err, outbox.ErrFull)
			})
			r.start()
			flush(t, b)
			if n := said.count("restore the directory or restart the gateway"); n != 1 {
				t.Errorf("what is to be done is said %d times: %s", n, &said.buf)
			}
			stop()
			if err := b.Close(t.Context()); err != nil {
				t.Errorf("all is in the ledger: %v", err)
			}
			if got := r.read(t); len(got.calls) != taken || got.gaps != 0 {
				t.Errorf("%d calls of %d, %d gaps", len(got.calls), taken, got.gaps)
			}
			if _, err := os.Stat(dir); err == nil {
				t.Error("a spool directory was made where none was")
			}
		})
	}
}

// Who ends without the ledger does not say that calls are in a spool that is gone.
func TestAnEndWithoutLedgerAndSpoolIsNoneInOrder(t *testing.T) {
	t.Parallel()
	for name, back := range map[string]bool{"gone": false, "restored": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.stop()
			dir := filepath.Join(t.TempDir(), "spool")
			b := open(t, outbox.Options{NATS: r.connect(), SpoolDir: dir, SpoolBeforeAnswer: true, Logger: zerolog.Nop()})
			stop := run(t, b)
			if err := b.Add(t.Context(), 0, call(0)); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(dir, dir+"-elsewhere"); err != nil {
				t.Fatal(err)
			}
			if back {
				ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
				defer cancel()
				if err := b.Add(ctx, 0, call(1)); !errors.Is(err, outbox.ErrNotSafe) {
					t.Errorf("got %v", err)
				}
				if err := os.Rename(dir+"-elsewhere", dir); err != nil {
					t.Fatal(err)
				}
				if err := b.Add(t.Context(), 0, call(2)); err != nil {
					t.Error(err)
				}
			}
			stop()
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			if err := b.Close(ctx); (err == nil) != back {
				t.Errorf("closed: %v", err)
			}
			if !back {
				return
			}
			r.start()
			recovered(t, r, dir)
			if got := r.read(t); len(got.calls) != 3 || got.complete != shards {
				t.Errorf("%d calls, %d complete", len(got.calls), got.complete)
			}
		})
	}
}
