package outboxtest

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/lane"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/marks"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// segment is the only one in a spool directory.
func segment(t *testing.T, dir string) string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(dir, "*", "*.seg"))
	if err != nil || len(all) != 1 {
		t.Fatal(all, err)
	}
	return all[0]
}

// wrong makes one bit wrong in the body of a record of a file, by its place among all;
// from the end where that is negative. first is where the first record begins.
func wrong(t *testing.T, path string, first, n int) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var bodies [][]byte
	for rest := data[first:]; len(rest) > 0; {
		length := int(binary.LittleEndian.Uint32(rest))
		bodies = append(bodies, rest[8:8+length])
		rest = rest[8+length:]
	}
	if n < 0 {
		n += len(bodies)
	}
	bodies[n][len(bodies[n])-5] ^= 4
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// claimed hears what is claimed, frame by frame and lane by lane.
type claimed struct {
	t       *testing.T
	newest  uint64
	unknown int // calls of nobody
	calls   int
}

func (c *claimed) Add(number uint64, call *usage.Call) {
	if number != c.newest && number != c.newest+1 {
		c.t.Errorf("frame %d is claimed behind %d", number, c.newest)
	}
	c.newest = number
	c.calls++
	if strings.HasPrefix(call.Account, "unknown") {
		c.unknown++
	}
}

func (c *claimed) Seal(at usage.Micros) {
	if d := time.Since(at.Time()); d < 0 || d > time.Hour {
		c.t.Errorf("frame %d was sealed %s ago", c.newest, d)
	}
}

// One wrong bit in what was answered as safe costs the calls of one frame, nobody takes
// it for an end that a crash has cut, and nobody is told that all is there: also when
// the frame was the last of its shard, which no later one misses.
func TestOneWrongBitInTheSpoolCostsOneFrameAndIsTold(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.stop()
	dir := t.TempDir()
	b := open(t, outbox.Options{NATS: r.connect(), SpoolDir: dir, SpoolBeforeAnswer: true})
	stop := run(t, b)
	const n = 101
	for i := range n { // one after the other: each its own frame
		if err := b.Add(t.Context(), uint32(i%shards), call(i)); err != nil {
			t.Fatal(err)
		}
	}
	dead := killed(t, dir)
	stop()
	if err := b.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	ended := killed(t, dir)
	r.start()
	for _, c := range []struct {
		what     string
		dir      string
		frame    int
		missed   uint64
		complete int
	}{
		{"in the middle of a killed gateway's", dead, 50, 1, 0},
		{"at the end of a killed gateway's", dead, -1, 1, 0},
		{"in the middle of one that ended in order", ended, 50, 1, 0},
		{"nowhere", ended, 0, 0, shards},
	} {
		t.Run(c.what, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			dir := killed(t, c.dir)
			if c.missed > 0 {
				wrong(t, segment(t, dir), 4+20+8+4, c.frame)
			}
			lanes := map[uint32]*claimed{}
			reg := prometheus.NewPedanticRegistry()
			b := open(t, outbox.Options{NATS: r.connect(), SpoolDir: dir, Registerer: reg, Claims: func(_ ksuid.KSUID, shard uint32, again bool) lane.Claims {
				c := &claimed{t: t}
				if again {
					lanes[shard] = c
				}
				return c
			}})
			stop := run(t, b)
			until(t, "the killed one's spool is gone", func() bool {
				return len(files(t, dir)) == 2+int(c.missed) // lock, identity, what is put aside
			})
			stop()
			st := b.Stats()
			if got := metric(t, reg, "tollkeeper_outbox_damages_total", "segment"); got != float64(c.missed) || st.Damaged != int64(c.missed) || st.TornSegments != 0 {
				t.Errorf("the metric says %v; %+v", got, st)
			}
			if err := b.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
			got := r.read(t)
			missed := uint64(got.gaps)
			for _, last := range got.closed {
				missed += last
			}
			missed -= uint64(len(got.calls)) + uint64(got.gaps)
			if uint64(len(got.calls)) != n-c.missed || missed != c.missed || got.complete != c.complete || len(got.closed) != shards {
				t.Errorf("%d calls are there of %d, %d frames are missed by their numbers, %d of %d ends are complete", len(got.calls), n, missed, got.complete, len(got.closed))
			}
			// What is lost is claimed as well, so that the audit misses it.
			calls, unknown := 0, 0
			for _, c := range lanes {
				calls, unknown = calls+c.calls, unknown+c.unknown
			}
			if calls != n || unknown != int(c.missed) {
				t.Errorf("%d calls are claimed, %d of them of nobody", calls, unknown)
			}
			aside, err := filepath.Glob(filepath.Join(dir, "damaged", "*.seg"))
			if err != nil || len(aside) != int(c.missed) {
				t.Errorf("put aside are %v: %v", aside, err)
			}
		})
	}
}

// A wrong bit in the marks is not a mark that is smaller than it was.
func TestOneWrongBitInTheMarksGivesNothingBack(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := t.TempDir()
	b := open(t, outbox.Options{NATS: r.connect(), SpoolDir: dir})
	j := b.Marks()
	for n := range int64(40) {
		if err := j.Write(0, []marks.Mark{{Shard: 1, Account: "acme", Limit: "free/calls", UsedAtMost: n + 1}}); err != nil {
			t.Fatal(err)
		}
	}
	dead := killed(t, dir)
	if err := b.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	wrong(t, filepath.Join(dead, b.Producer().String(), marks.File), 4+20+4, 20)
	r = newRig(t)
	st := recovered(t, r, dead)
	if got := r.read(t); len(got.closed) != shards || len(got.leases) != 0 || got.complete != 0 || st.DamagedMarks != 1 {
		t.Errorf("%d ends, leases %v, %d complete, %+v", len(got.closed), got.leases, got.complete, st)
	}
}
