package outboxtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// bulky is a call that no frame can make small.
func bulky(i int) *usage.Call {
	c := call(i)
	c.RequestID = fmt.Sprintf("r%d-%s", i, filler)
	return c
}

var filler = strings.Repeat("x", 200)

// fill adds calls from a number on until one is not taken, at most n.
func fill(b *outbox.Outbox, from, n int, wait time.Duration) (taken int, err error) {
	for i := from; i < from+n; i++ {
		ctx, cancel := context.WithTimeout(context.Background(), wait)
		dropped := b.Stats().Dropped
		err := b.Add(ctx, uint32(i%shards), bulky(i))
		cancel()
		if err != nil {
			return taken, err
		}
		if b.Stats().Dropped > dropped {
			return taken, errDropped
		}
		taken++
	}
	return taken, nil
}

var errDropped = errors.New("dropped")

func TestAFullOutboxDoesWhatItsPolicySays(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		policy outbox.FullPolicy
		spool  bool
		want   error
	}{
		"block, memory only":  {outbox.Block, false, context.DeadlineExceeded},
		"refuse, memory only": {outbox.Refuse, false, outbox.ErrFull},
		"drop, memory only":   {outbox.Drop, false, errDropped},
		"refuse, with spool":  {outbox.Refuse, true, outbox.ErrFull},
		"drop, with spool":    {outbox.Drop, true, errDropped},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			o := outbox.Options{NATS: r.connect(), MemoryBytes: 4 << 20, OnFull: c.policy}
			if c.spool {
				o.SpoolDir, o.SpoolBytes = t.TempDir(), 4<<20
			}
			r.stop()
			b := open(t, o)
			stop := run(t, b)
			// A burst may find memory full before the disk has had its turn; what is
			// asked here is the state in which nothing moves any more.
			taken := 0
			var err error
			for full := false; !full; {
				var n int
				n, err = fill(b, taken, 100_000, 300*time.Millisecond)
				taken += n
				st := b.Stats()
				full = err != nil && st.Full && (!c.spool || st.SpoolFailing && st.Spooled > 0)
			}
			if !errors.Is(err, c.want) {
				t.Fatalf("after %d calls: %v", taken, err)
			}
			st := b.Stats()
			if !st.Full || st.MemoryBytes > 4<<20 || st.SpoolBytes > 4<<20 {
				t.Errorf("stats: %+v", st)
			}
			r.start()
			flush(t, b)
			st = b.Stats()
			if st.Acked != int64(taken) || st.Added != int64(taken) {
				t.Errorf("%d taken, %+v", taken, st)
			}
			if n, err := fill(b, taken, 100, 5*time.Second); err != nil {
				t.Errorf("with room again, after %d: %v", n, err)
			}
			flush(t, b)
			stop()
			if err := b.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
			got := r.read(t)
			if len(got.calls) != taken+100 || got.gaps != 0 {
				t.Errorf("%d calls of %d, %d gaps", len(got.calls), taken+100, got.gaps)
			}
			t.Logf("%d calls were taken (%d spooled) before it was full; dropped %d, refused %d", taken, st.Spooled, st.Dropped, st.Refused)
		})
	}
}

// change changes the ledger's stream.
func (r *rig) change(t *testing.T, f func(*jetstream.StreamConfig)) {
	t.Helper()
	js, err := jetstream.New(r.connect())
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(t.Context(), ledger.Stream)
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	f(&cfg)
	if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
}

func TestAFullLedgerIsTriedAgain(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := t.TempDir()
	r.change(t, func(c *jetstream.StreamConfig) { c.MaxBytes = 200_000 })
	b := open(t, outbox.Options{NATS: r.connect(), SpoolDir: dir})
	run(t, b)
	const n = 5000
	for i := range n {
		if err := b.Add(t.Context(), uint32(i%shards), bulky(i)); err != nil {
			t.Fatal(err)
		}
	}
	until(t, "what the ledger does not take is spooled", func() bool {
		st := b.Stats()
		return st.Resent > 0 && st.Sent.Admitted == n
	})
	r.change(t, func(c *jetstream.StreamConfig) { c.MaxBytes = -1 })
	flush(t, b)
	if err := b.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := r.read(t); len(got.calls) != n || got.gaps != 0 || got.duplicates != 0 {
		t.Errorf("%d calls, %d gaps, %d duplicates", len(got.calls), got.gaps, got.duplicates)
	}
}

func TestAFrameThatTheLedgerCanNeverTakeIsKeptAside(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := t.TempDir()
	r.change(t, func(c *jetstream.StreamConfig) { c.MaxMsgSize = 300 })
	b := open(t, outbox.Options{NATS: r.connect(), SpoolDir: dir})
	run(t, b)
	if err := b.Add(t.Context(), 0, bulky(0)); err != nil {
		t.Fatal(err)
	}
	until(t, "the frame is given up", func() bool { return b.Stats().Rejected == 1 })
	if err := b.Add(t.Context(), 0, call(1)); err != nil {
		t.Fatal(err)
	}
	until(t, "the next one is taken", func() bool { return b.Stats().Acked == 1 })
	kept, err := filepath.Glob(filepath.Join(dir, "rejected", "*.frame"))
	if err != nil || len(kept) != 1 {
		t.Fatal(kept, err)
	}
	data, err := os.ReadFile(kept[0])
	if err != nil {
		t.Fatal(err)
	}
	var f ledger.Frame
	if err := f.Decode(data); err != nil || f.N != 1 {
		t.Error(err)
	}
	if err := b.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := r.read(t); got.gaps != 1 {
		t.Errorf("%d gaps: readers must notice", got.gaps)
	}
}

func TestInvalidCallsAndShardsAreRefused(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	b := open(t, outbox.Options{NATS: r.connect()})
	run(t, b)
	c := call(1)
	c.Account = ""
	var invalid *usage.InvalidError
	if err := b.Add(t.Context(), 0, c); !errors.As(err, &invalid) {
		t.Errorf("got %v", err)
	}
	if err := b.Add(t.Context(), shards, call(1)); err == nil {
		t.Error("a shard that does not exist was taken")
	}
	if st := b.Stats(); st.Added != 0 || st.Invalid != 1 {
		t.Errorf("stats: %+v", st)
	}
	if err := b.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}
