package outboxtest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/marks"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

// The test binary is its own victim: with childURL set it is a gateway that
// meters calls until it is killed, and prints each call that it answered.
const (
	childURL   = "TOLLKEEPER_OUTBOXTEST_URL"
	childSpool = "TOLLKEEPER_OUTBOXTEST_SPOOL"
	childFirst = "TOLLKEEPER_OUTBOXTEST_SPOOL_FIRST"
	// childIdle: it only says that it is open.
	childIdle = "TOLLKEEPER_OUTBOXTEST_IDLE"
	// childMarks: it notes marks of leases, and says so before and after.
	childMarks = "TOLLKEEPER_OUTBOXTEST_MARKS"
)

func TestMain(m *testing.M) {
	if url := os.Getenv(childURL); url != "" {
		var err error
		switch dir := os.Getenv(childSpool); {
		case os.Getenv(childDisk) == "true":
			err = smallDisk(url, dir)
		case os.Getenv(childFull) == "true":
			err = fullVictim(dir)
		default:
			err = victim(url, dir, os.Getenv(childFirst) == "true")
		}
		if err != nil {
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
	if os.Getenv(childMarks) == "true" {
		return note(b)
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

// note notes marks that grow by one.
func note(b *outbox.Outbox) error {
	j := b.Marks()
	for n := 1; ; n++ {
		if _, err := fmt.Fprintln(os.Stdout, "begun", n); err != nil {
			return err
		}
		if err := j.Write(0, []marks.Mark{{Shard: 1, Account: "acme", Limit: "free/calls", UsedAtMost: int64(n)}}); err != nil {
			return err
		}
		if _, err := fmt.Fprintln(os.Stdout, "noted", n); err != nil {
			return err
		}
	}
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
			if st.KnownFrames == 0 {
				t.Error("all of the spool was sent again")
			}
			t.Logf("%d answered, %d in the ledger, %d of them recovered from the spool, %d frames came twice and %d were known to be there, %d torn segments",
				len(answered), len(got.calls), st.Recovered.Admitted, got.duplicates, st.KnownFrames, st.TornSegments)
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

// What a killed gateway had noted of its leases the next one tells the ledger: all that
// it was told is noted, and nothing that it had not begun to.
func TestAKilledProducersMarksAreTold(t *testing.T) {
	t.Parallel()
	between := 0
	for n := range 8 {
		r := newRig(t)
		dir := t.TempDir()
		_, begun := kill(t, r, dir, false, 41+n, nil, childMarks+"=true")
		recovered(t, r, dir)
		got := r.read(t)
		if len(got.leases) != shards || got.complete != 0 {
			t.Fatalf("%d of %d closing entries speak of leases, %d are complete", len(got.leases), shards, got.complete)
		}
		for shard, leases := range got.leases {
			if shard != 1 {
				if len(leases.GetMarks()) != 0 {
					t.Errorf("shard %d: %v", shard, leases)
				}
				continue
			}
			m := leases.GetMarks()
			// The newest that was begun may not have been noted.
			if len(m) != 1 || m[0].GetAccount() != "acme" || m[0].GetLimit() != "free/calls" || m[0].GetUsedAtMost() > int64(begun) || m[0].GetUsedAtMost() < int64(begun)-1 {
				t.Fatalf("begun was mark %d; told are %v", begun, m)
			}
			if m[0].GetUsedAtMost() < int64(begun) {
				between++
			}
		}
	}
	t.Logf("%d of 8 kills came before the newest mark was there", between)
}

// killed is a directory as a kill would leave it now.
func killed(t *testing.T, dir string) string {
	t.Helper()
	at := t.TempDir()
	if err := os.CopyFS(at, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return at
}

func TestMarksThatAreTooManyOrDamagedGiveNothingBack(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := t.TempDir()
	b := open(t, outbox.Options{NATS: r.connect(), SpoolDir: dir})
	if none := open(t, outbox.Options{NATS: r.connect()}).Marks(); none != nil {
		t.Error("marks are kept nowhere")
	}
	nobody := killed(t, dir)
	j := b.Marks()
	began := killed(t, dir)
	for from := 0; from <= ledger.MaxLeaseMarks; from += marks.MaxBatch {
		batch := make([]marks.Mark, 0, marks.MaxBatch)
		for i := from; i < min(from+marks.MaxBatch, ledger.MaxLeaseMarks+1); i++ {
			batch = append(batch, marks.Mark{Shard: 1, Account: fmt.Sprint(i), Limit: "free/calls", UsedAtMost: 1}, marks.Mark{Shard: 2, Account: fmt.Sprint(i % 10), Limit: "free/calls", UsedAtMost: int64(i)})
		}
		for len(batch) > 0 {
			n := min(len(batch), marks.MaxBatch)
			if err := j.Write(0, batch[:n]); err != nil {
				t.Fatal(err)
			}
			batch = batch[n:]
		}
	}
	many, damaged := killed(t, dir), killed(t, dir)
	if err := b.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(damaged, b.Producer().String(), marks.File)
	if err := os.WriteFile(path, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what     string
		dir      string
		shards   int // that are told of leases
		unmarked int64
	}{
		{"nothing was noted, and nobody said that it would be", nobody, 0, 0},
		{"nothing was noted", began, shards, 0},
		{"too many of one shard", many, shards - 1, 1},
		{"damaged", damaged, 0, shards},
	} {
		r := newRig(t)
		st := recovered(t, r, c.dir)
		got := r.read(t)
		if len(got.closed) != shards || len(got.leases) != c.shards || st.UnmarkedEnds != c.unmarked || got.complete != 0 {
			t.Errorf("%s: %d shards are told of %d, %d unmarked, %d complete", c.what, len(got.leases), len(got.closed), st.UnmarkedEnds, got.complete)
		}
		if c.what == "too many of one shard" && (got.leases[1] != nil || len(got.leases[2].GetMarks()) != 10) {
			t.Errorf("%s: %v", c.what, got.leases[2])
		}
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
