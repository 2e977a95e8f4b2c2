package outboxtest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
)

// The test binary is its own victim: with childURL set it is a gateway that
// meters calls until it is killed, and prints each call that it answered.
const (
	childURL   = "TOLLKEEPER_OUTBOXTEST_URL"
	childSpool = "TOLLKEEPER_OUTBOXTEST_SPOOL"
	childFirst = "TOLLKEEPER_OUTBOXTEST_SPOOL_FIRST"
	// childIdle: it only says that it is open.
	childIdle = "TOLLKEEPER_OUTBOXTEST_IDLE"
)

func TestMain(m *testing.M) {
	if url := os.Getenv(childURL); url != "" {
		if err := victim(url, os.Getenv(childSpool), os.Getenv(childFirst) == "true"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// workers of a victim.
const workers = 16

func victim(url, dir string, spoolFirst bool) error {
	nc, err := nats.Connect(url, nats.MaxReconnects(-1), nats.ReconnectBufSize(-1))
	if err != nil {
		return err
	}
	b, err := outbox.Open(outbox.Options{NATS: nc, Shards: shards, Gateway: "victim", SpoolDir: dir, SpoolBeforeAnswer: spoolFirst, Logger: zerolog.Nop()})
	if err != nil {
		return err
	}
	if os.Getenv(childIdle) == "true" {
		if _, err := fmt.Fprintln(os.Stdout, "open 0"); err != nil {
			return err
		}
		return b.Run(context.Background())
	}
	failed := make(chan error, workers+1)
	go func() { failed <- b.Run(context.Background()) }()
	for w := range workers {
		go func() {
			for n := 0; ; n++ {
				i := n*workers + w
				if err := b.Add(context.Background(), uint32(i%shards), call(i)); err != nil {
					failed <- err
					return
				}
				// Answered: one write, which a kill cuts from no other, with how
				// many calls the outbox says are acknowledged or spooled.
				if _, err := fmt.Fprintf(os.Stdout, "r%d %d\n", i, b.Stats().Sent.Admitted); err != nil {
					failed <- err
					return
				}
			}
		}()
	}
	return <-failed
}

// kill runs a victim until it has answered n calls and kills it; returns what
// it had answered, and how many calls were sent by its own count.
func kill(t *testing.T, r *rig, dir string, spoolFirst bool, n int, at map[int]func(), env ...string) (answered []string, sent int) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(os.Environ(), childURL+"="+r.s.ClientURL(), childSpool+"="+dir, childFirst+"="+strconv.FormatBool(spoolFirst))
	cmd.Env = append(cmd.Env, env...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	for {
		line, err := lines.ReadString('\n')
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		var id string
		var count int
		if _, err := fmt.Sscanf(line, "%s %d\n", &id, &count); err != nil {
			t.Fatal(err)
		}
		answered, sent = append(answered, id), max(sent, count)
		if f := at[len(answered)]; f != nil {
			f()
		}
		if len(answered) == n {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := cmd.Wait(); err == nil || len(answered) < n {
		t.Fatalf("the victim ended by itself after %d calls: %v", len(answered), err)
	}
	return answered, sent
}

// recovered opens the outbox that comes after a kill and lets it send what it
// finds.
func recovered(t *testing.T, r *rig, dir string) outbox.Stats {
	t.Helper()
	b := open(t, outbox.Options{NATS: r.connect(), SpoolDir: dir})
	stop := run(t, b)
	until(t, "only its own identity is left in the spool", func() bool { return len(files(t, dir)) == 2 })
	stop()
	st := b.Stats()
	if err := b.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	return st
}

func TestAKillLosesNoAnsweredCallWithSpoolBeforeAnswer(t *testing.T) {
	t.Parallel()
	for name, away := range map[string]bool{"under load": false, "while NATS is away": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			dir := t.TempDir()
			at := map[int]func(){}
			if away {
				at[2000] = r.stop
			}
			answered, sent := kill(t, r, dir, true, 6000, at)
			if away {
				r.start()
			}
			st := recovered(t, r, dir)
			got := r.read(t)
			for _, id := range answered {
				if got.calls[id] != 1 {
					t.Fatalf("call %s was answered and is in the ledger %d times", id, got.calls[id])
				}
			}
			if got.gaps != 0 || len(got.closed) != shards || got.complete != 0 || len(got.calls) < sent {
				t.Errorf("%d calls of %d sent, %d gaps, closed %v, %d complete", len(got.calls), sent, got.gaps, got.closed, got.complete)
			}
			t.Logf("%d answered, %d in the ledger, %d of them recovered from the spool, %d frames came twice, %d torn segments",
				len(answered), len(got.calls), st.Recovered.Admitted, got.duplicates, st.TornSegments)
		})
	}
}

func TestAKillWithoutItLosesAtMostWhatWasInMemory(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := t.TempDir()
	answered, sent := kill(t, r, dir, false, 30_000, nil)
	recovered(t, r, dir)
	got := r.read(t)
	lost := 0
	for _, id := range answered {
		if got.calls[id] == 0 {
			lost++
		}
	}
	for id, n := range got.calls {
		if n != 1 {
			t.Errorf("call %s is there %d times", id, n)
		}
	}
	if got.gaps != 0 || len(got.closed) != shards || got.complete != 0 {
		t.Errorf("%d gaps, closed %v, %d complete", got.gaps, got.closed, got.complete)
	}
	t.Logf("%d answered, %d sent by its own count, %d lost: unsealed and unacknowledged frames", len(answered), sent, lost)
	// Not a call that was sent; each worker may have had one sent but not answered.
	if bound := len(answered) + workers - sent; lost > bound || len(got.calls) < sent {
		t.Errorf("%d are in the ledger, %d lost, at most %d may be", len(got.calls), lost, bound)
	}
}

// The end is said also of one that was killed before it had anything to send: it may
// have held leases. It is never complete, however calls were answered: some may have
// been under way, at the upstream, that nobody had written down.
func TestAKilledProducerIsClosedAlsoWithNothingInItsSpool(t *testing.T) {
	t.Parallel()
	for name, spoolFirst := range map[string]bool{"spooled before answering": true, "from memory": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			dir := t.TempDir()
			kill(t, r, dir, spoolFirst, 1, nil, childIdle+"=true")
			recovered(t, r, dir)
			if got := r.read(t); len(got.closed) != shards || got.complete != 0 || len(got.calls) != 0 {
				t.Errorf("closed %v, %d complete, %d calls", got.closed, got.complete, len(got.calls))
			}
		})
	}
}

// An end in order is one also while the ledger is away: the next start says it.
func TestAnEndInOrderIsCompleteAlsoWhenTheNextStartHasToSayIt(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := t.TempDir()
	b := open(t, outbox.Options{NATS: r.connect(), SpoolDir: dir})
	stop := run(t, b)
	r.stop()
	for i := range 100 {
		if err := b.Add(t.Context(), uint32(i%shards), call(i)); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	if err := b.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.start()
	recovered(t, r, dir)
	if got := r.read(t); len(got.closed) != shards || got.complete != shards || len(got.calls) != 100 {
		t.Errorf("closed %v, %d complete, %d calls", got.closed, got.complete, len(got.calls))
	}
}
