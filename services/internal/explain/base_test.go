package explain

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
)

func TestAReplayBeginsWhereNothingIsMissing(t *testing.T) {
	t.Parallel()
	server, err := embednats.Start(t.Context(), embednats.Options{StoreDir: t.TempDir(), Logger: zerolog.Nop(), Sync: time.Minute, MaxFile: 200 << 30})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	nc, err := nats.Connect(server.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{Shards: 1}); err != nil {
		t.Fatal(err)
	}
	store, err := js.ObjectStore(t.Context(), ledger.SnapshotsBucket)
	if err != nil {
		t.Fatal(err)
	}
	// A shard of 12 ticks, with snapshots at 3, 7 and 9, of which the last is damaged.
	l := newShardLog(t, 1_700_000_000_000_000)
	times := map[uint64]time.Time{}
	for n := range uint64(12) {
		l.tick()
		m := l.entries[n]
		ack, err := js.PublishMsg(t.Context(), &nats.Msg{Subject: m.Subject, Header: m.Header, Data: m.Data})
		if err != nil {
			t.Fatal(err)
		}
		stream, err := js.Stream(t.Context(), ledger.Stream)
		if err != nil {
			t.Fatal(err)
		}
		stored, err := stream.GetMsg(t.Context(), ack.Sequence)
		if err != nil {
			t.Fatal(err)
		}
		times[ack.Sequence] = stored.Time
		if at := n + 1; at == 3 || at == 7 || at == 9 {
			data := l.state.AppendBinary(nil)
			if at == 9 {
				data[len(data)/2]++
			}
			if _, err := store.PutBytes(t.Context(), fmt.Sprintf("shard-0/%d-1", at), data); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, name := range []string{"shard-00/5-1", "shard-1/5-1", "shard-0/", "elsewhere"} {
		if _, err := store.PutBytes(t.Context(), name, []byte("nothing of ours")); err != nil {
			t.Fatal(err)
		}
	}
	x := New(Options{JS: js})
	begin := func(all, before uint64) string {
		t.Helper()
		b, err := x.base(t.Context(), 0, all, before)
		if err != nil {
			t.Fatal(err)
		}
		if b == nil {
			return "nowhere"
		}
		return fmt.Sprint(b.state.Sequence())
	}
	purge := func(to uint64) jetstream.Stream {
		t.Helper()
		stream, err := js.Stream(t.Context(), ledger.Stream)
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Purge(t.Context(), jetstream.WithPurgeSequence(to)); err != nil {
			t.Fatal(err)
		}
		return stream
	}
	for _, c := range []struct {
		purged, all, before uint64
		want                string
	}{
		{1, 1, 12, "0"}, {1, 3, 12, "0"}, {1, 4, 12, "3"}, {1, 8, 12, "7"}, {1, 10, 12, "7"}, {1, 8, 7, "3"}, {1, 3, 3, "0"},
		// What the ledger no longer holds is missing, but the newest snapshot has it.
		{4, 2, 12, "7"}, {4, 4, 12, "3"}, {4, 2, 5, "3"}, {4, 2, 3, "nowhere"}, {5, 4, 12, "7"}, {9, 2, 12, "nowhere"},
	} {
		purge(c.purged)
		if got := begin(c.all, c.before); got != c.want {
			t.Errorf("the ledger begins at %d, all from %d on is wanted, the decision is before %d: begins at %s, want %s", c.purged, c.all, c.before, got, c.want)
		}
	}

	stream := purge(10)
	info, err := stream.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for sequence, at := range times {
		got, err := sequenceAt(t.Context(), stream, info.State, at)
		if want := max(sequence, 10); err != nil || got != want {
			t.Errorf("the first entry from %s on is %d, want %d: %v", at, got, want, err)
		}
	}
	if got, err := sequenceAt(t.Context(), stream, info.State, times[12].Add(time.Nanosecond)); err != nil || got != 13 {
		t.Errorf("after the last comes %d: %v", got, err)
	}
	// A stream with holes.
	kv, err := js.KeyValue(t.Context(), ledger.ConfigBucket)
	if err != nil {
		t.Fatal(err)
	}
	var last time.Time
	for n := range 40 {
		rev, err := kv.PutString(t.Context(), "a", fmt.Sprint(n))
		if err != nil {
			t.Fatal(err)
		}
		e, err := kv.GetRevision(t.Context(), "a", rev)
		if err != nil {
			t.Fatal(err)
		}
		last = e.Created()
	}
	if stream, err = js.Stream(t.Context(), "KV_"+ledger.ConfigBucket); err != nil {
		t.Fatal(err)
	}
	state := stream.CachedInfo().State
	if got, err := sequenceAt(t.Context(), stream, state, last); err != nil || got != state.LastSeq || state.NumDeleted == 0 {
		t.Errorf("the last of %+v is said to be %d: %v", state, got, err)
	}
}
