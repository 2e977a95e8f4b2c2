package aggregator

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/ownership"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// newerRules says in a shard's ledger that a newer program goes on.
func (w *world) newerRules(shard uint32) uint64 {
	return w.control(shard, &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_CoreVersion{CoreVersion: &tollkeeperv1.CoreVersion{
		Version: quota.CoreVersion + 1, ForeignHorizonMicros: 3_600_000_000,
	}}})
}

// older is an aggregator that is not expected to be ready.
type older struct {
	*running
	ready *telemetry.Readiness
}

func (w *world) runOlder(o Options) older {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w.t.Cleanup(cancel)
	o.NATS = natsconn.Options{URL: w.server.ClientURL(), Logger: zerolog.Nop()}
	o.Registerer, o.Readiness = prometheus.NewRegistry(), telemetry.NewReadiness()
	o.Member, o.Sole = "alone", true
	r := older{&running{cancel: cancel, done: make(chan error, 1), registry: o.Registerer}, o.Readiness}
	go func() { r.done <- Run(ctx, o) }()
	return r
}

func (r older) tells(t *testing.T, shards float64) {
	t.Helper()
	eventually(t, "it says to run a newer version", func() bool {
		for _, c := range r.ready.Status().Components {
			if c.Name == "aggregator" && !c.OK && strings.Contains(c.Reason, "run a newer version") {
				return true
			}
		}
		return false
	})
	all, err := r.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if f.GetName() == "tollkeeper_aggregator_shards_beyond_rules" && f.GetMetric()[0].GetGauge().GetValue() != shards {
			t.Errorf("the metric says %v", f)
		}
	}
}

// given reports whether nobody claims a shard.
func (w *world) given(shard uint32) bool {
	w.t.Helper()
	kv, err := w.js.KeyValue(w.t.Context(), ownership.DefaultBucket)
	if err != nil {
		w.t.Fatal(err)
	}
	e, err := kv.Get(w.t.Context(), fmt.Sprintf("shard.%d", shard))
	return err == nil && strings.Contains(string(e.Value()), `"released":true`)
}

// twoShards returns an account of each of two shards.
func (w *world) twoShards() (here, there string) {
	here = "account-0"
	for {
		if there = "account-" + ksuid.New().String(); w.shardOf(there) != w.shardOf(here) {
			return here, there
		}
	}
}

func TestAShardWhoseRulesAreNewerIsGivenUpAndTheOthersGoOn(t *testing.T) {
	t.Parallel()
	for name, standby := range map[string]int{"all shards are folded": 0, "only its own": -1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, 2, time.Minute)
			w.plans("v1", lifetimeLimit(10))
			here, there := w.twoShards()
			w.account(here, "free")
			w.account(there, "free")
			shard, p := w.shardOf(here), ksuid.New()
			r := w.runOlder(Options{Standby: standby, SnapshotEntries: 1 << 30, SnapshotEvery: time.Hour})
			first := w.send(p, calls(here, 9))
			eventually(t, "the shard is counted", func() bool {
				_, err := w.nc.Request(ledger.UsageSubject(shard), []byte("{}"), time.Second)
				return err == nil
			})
			w.counted(shard, first)
			// What was decided before is told; what comes after is a newer program's.
			spent := w.send(p, calls(here, 2))
			w.newerRules(shard)
			w.send(p, calls(here, 100))
			w.plans("v2", lifetimeLimit(1000))
			if d := w.decided(here, "free/calls", usage.Deny); d.Revision != spent || d.Used != 11 {
				t.Errorf("it decided %+v", d)
			}
			r.tells(t, 1)
			eventually(t, "the shard is given up", func() bool { return w.given(shard) })
			goesOn := func(admitted int64) {
				t.Helper()
				if u := w.counted(w.shardOf(there), w.send(p, calls(there, 5))); u.Total.Admitted != admitted {
					t.Errorf("of the other shard %d calls are counted, not %d", u.Total.Admitted, admitted)
				}
			}
			goesOn(5)
			if err := r.stop(t); err != nil {
				t.Fatal(err)
			}

			// Another start of the same program comes no further.
			r = w.runOlder(Options{Standby: standby})
			r.tells(t, 1)
			eventually(t, "the shard is given up again", func() bool { return w.given(shard) })
			eventually(t, "the other shard is counted", func() bool {
				_, err := w.nc.Request(ledger.UsageSubject(w.shardOf(there)), []byte("{}"), time.Second)
				return err == nil
			})
			goesOn(10)
			if err := r.stop(t); err != nil {
				t.Fatal(err)
			}
			if all := w.decisions(here, "free/calls"); all[len(all)-1].Revision != spent {
				t.Errorf("it decided by rules that it does not know: %+v", all)
			}
			dead, err := w.js.Stream(t.Context(), ledger.DeadLetterStream)
			if err != nil {
				t.Fatal(err)
			}
			if n := dead.CachedInfo().State.Msgs; n != 0 {
				t.Errorf("%d entries were put aside", n)
			}
		})
	}
}

func TestAShardThatANewerProgramHasCountedIsLeftToIt(t *testing.T) {
	t.Parallel()
	for name, standby := range map[string]int{"all shards are folded": 0, "only its own": -1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, 2, time.Minute)
			here, there := w.twoShards()
			shard, p := w.shardOf(here), ksuid.New()
			const horizon = 1_234_567_000_000
			r := w.run(Options{Horizon: horizon * time.Microsecond})
			// Both shards say by which rules they are counted, and have a snapshot.
			w.counted(shard, w.send(p, calls(here, 3)))
			w.counted(w.shardOf(there), w.send(p, calls(there, 3)))
			if err := r.stop(t); err != nil {
				t.Fatal(err)
			}
			store, err := w.js.ObjectStore(t.Context(), ledger.SnapshotsBucket)
			if err != nil {
				t.Fatal(err)
			}
			name := w.checkpoint(shard).Snapshot
			data, err := store.GetBytes(t.Context(), name)
			if err != nil {
				t.Fatal(err)
			}
			// As a newer program would write it.
			known := binary.AppendVarint([]byte{quota.CoreVersion}, horizon)
			at := bytes.Index(data, known)
			if at < 0 {
				t.Fatal("the snapshot does not say by which rules it was counted")
			}
			data[at]++
			sum := sha256.Sum256(data[:len(data)-sha256.Size])
			copy(data[len(data)-sha256.Size:], sum[:])
			if _, err := store.PutBytes(t.Context(), name, data); err != nil {
				t.Fatal(err)
			}
			stood := w.checkpoint(shard).Sequence

			old := w.runOlder(Options{Standby: standby})
			old.tells(t, 1)
			w.send(p, calls(here, 5))
			eventually(t, "the other shard is counted", func() bool {
				_, err := w.nc.Request(ledger.UsageSubject(w.shardOf(there)), []byte("{}"), time.Second)
				return err == nil
			})
			w.counted(w.shardOf(there), w.send(p, calls(there, 3)))
			eventually(t, "the shard is given up", func() bool { return w.given(shard) })
			if err := old.stop(t); err != nil {
				t.Fatal(err)
			}
			if now := w.checkpoint(shard); now.Sequence != stood || now.Snapshot != name {
				t.Errorf("it has gone on to %+v", now)
			}
		})
	}
}
