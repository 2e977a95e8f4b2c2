package outbox

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/lane"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// away returns a connection to a server that is not there.
func away(t *testing.T) *nats.Conn {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	nc, err := nats.Connect("nats://"+address, nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1), nats.ReconnectWait(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// The sender takes calls on its own occasions too, not only when it is told of
// them. Whoever adds then must not wait for it to listen: at the end it does not.
func TestAddNeverWaitsForTheSender(t *testing.T) {
	t.Parallel()
	o, err := Open(Options{NATS: away(t), Shards: 1, Logger: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	added := make(chan error, 1)
	go func() {
		c := usage.Call{Time: usage.At(time.Now()), Account: "a"}
		for round := range 3 {
			for range ledger.MaxFrameCalls {
				if err := o.Add(context.Background(), 0, &c); err != nil {
					added <- err
					return
				}
			}
			if round < 2 {
				o.s.take(o.s.slots[0]) // as the sender's tick does; nobody listens meanwhile
			}
		}
		added <- nil
	}()
	select {
	case err := <-added:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Add waits for a sender that does not listen")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := o.Close(ctx); err == nil {
		t.Error("the calls are lost, and Close does not say so")
	}
}

// spooling returns an outbox that has to spool what it gets, without a sender.
func spooling(t *testing.T, dir string) *Outbox {
	t.Helper()
	o, err := Open(Options{NATS: away(t), Shards: 1, Logger: zerolog.Nop(), SpoolDir: dir, SpoolBeforeAnswer: true})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// add adds a call and does not wait until it is safe.
func add(t *testing.T, o *Outbox) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	c := usage.Call{Time: usage.At(time.Now()), Account: "a"}
	if err := o.Add(ctx, 0, &c); !errors.Is(err, ErrNotSafe) {
		t.Fatal(err)
	}
}

// Under load there is always something to be written: what is acknowledged must
// not fill the disk meanwhile.
func TestASpoolThatIsWrittenWithoutPauseIsEmptiedAllTheSame(t *testing.T) {
	t.Parallel()
	o := spooling(t, t.TempDir())
	own := o.s.disk.own
	own.active, own.live[3] = 4, 1 // segments 1 and 2 are acknowledged
	add(t, o)
	if j := o.s.disk.ownJob(o.now()); j == nil || len(j.append) != 1 || j.remove != 3 {
		t.Errorf("with something acknowledged: %+v", j)
	}
	// The segment that is written to stays, as long as it was empty before.
	delete(own.live, 3)
	own.emptySince = 1
	add(t, o)
	if j := o.s.disk.ownJob(o.now()); j == nil || len(j.append) != 1 || j.remove != 4 {
		t.Errorf("with everything acknowledged: %+v", j)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := o.Close(ctx); err == nil {
		t.Error("the jobs were not done, and Close does not miss their calls")
	}
}

func TestAnEarlierProducersSpoolHasItsTurnUnderLoad(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	first := spooling(t, dir)
	add(t, first)
	if err := first.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	o := spooling(t, dir)
	d := o.s.disk
	o.s.connected = true
	d.begin()
	var turns []string
	for range 4 {
		add(t, o)
		d.work()
		j := <-d.results
		if j.src == d.own {
			turns = append(turns, "own")
		} else {
			turns = append(turns, "earlier")
		}
		d.handle(j)
		if d.drain != nil { // as if it were acknowledged
			for _, sl := range d.drain.slots {
				for f := range 10 {
					if sl != nil {
						sl.lane.Acked(uint64(f))
					}
				}
			}
		}
	}
	d.end()
	if got := strings.Join(turns, " "); got != "own earlier own earlier" {
		t.Errorf("the disk worked for: %s", got)
	}
	o.s.connected = false
	if err := o.Close(context.Background()); err != nil {
		t.Error(err)
	}
}

// doNext does the disk's next job, if there is one.
func (d *disk) doNext() (did bool) {
	d.work()
	if !d.busy {
		return false
	}
	d.handle(<-d.results)
	return true
}

// What was killed had acknowledgements for two of four frames, and had noted them: only
// the others leave again, and all four are claimed again. What the next one then has an
// acknowledgement for, the one after it knows.
func TestWhatIsKnownToBeAcknowledgedIsNotSentAgain(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	first := spooling(t, dir)
	d, sl := first.s.disk, first.s.slots[0]
	d.begin()
	first.s.connected = true
	for n := range 4 {
		add(t, first)
		if !d.doNext() {
			t.Fatal("nothing is spooled")
		}
		first.s.pump(sl)
		if n < 2 {
			first.s.acked(sl, uint64(n+1))
		}
	}
	d.own.notedAt = 0 // long ago
	for d.doNext() {
	}
	left := killed(t, dir)
	d.end()
	first.s.connected = false
	if err := first.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	for known := uint64(2); known < 4; known++ {
		claimed := &claims{}
		o, err := Open(Options{NATS: away(t), Shards: 1, Logger: zerolog.Nop(), SpoolDir: left, Claims: func(_ ksuid.KSUID, _ uint32, again bool) lane.Claims {
			if again {
				return claimed
			}
			return &claims{}
		}})
		if err != nil {
			t.Fatal(err)
		}
		d = o.s.disk
		d.begin()
		o.s.connected = true
		for d.doNext() {
		}
		again := d.drain.slots[0]
		number, _, ok := again.lane.Inflight()
		if !ok || number != known+1 || again.lane.Last() != 4 {
			t.Errorf("frame %d leaves first, the last is %d", number, again.lane.Last())
		}
		if st := o.Stats(); st.KnownFrames != int64(known) || len(claimed.numbers) != 4 {
			t.Errorf("%d frames are known to be acknowledged, claimed are %v", st.KnownFrames, claimed.numbers)
		}
		o.s.acked(again, number)
		d.drain.notedAt = 0
		for d.doNext() {
		}
		left = killed(t, left)
		// Which of two that began in the same second is sent first nobody knows.
		if err := os.RemoveAll(filepath.Join(left, o.Producer().String())); err != nil {
			t.Fatal(err)
		}
		d.end()
		o.s.connected = false
		if err := o.Close(context.Background()); err != nil {
			t.Error(err)
		}
	}
}

// killed is a spool directory as a kill would leave it now.
func killed(t *testing.T, dir string) string {
	t.Helper()
	at := t.TempDir()
	if err := os.CopyFS(at, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return at
}

type claims struct{ numbers []uint64 }

func (c *claims) Add(number uint64, _ *usage.Call) { c.numbers = append(c.numbers, number) }
func (c *claims) Seal(usage.Micros)                {}

// What the sender has not even heard of is lost as well, and Close says so.
func TestCloseCountsWhatNobodyTook(t *testing.T) {
	t.Parallel()
	o, err := Open(Options{NATS: away(t), Shards: 1, Logger: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	o.s.connected = true // and nobody acknowledges
	c := usage.Call{Time: usage.At(time.Now()), Account: "a"}
	for range 3 {
		if err := o.Add(context.Background(), 0, &c); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := o.Close(ctx); err == nil || !strings.Contains(err.Error(), "3 calls") {
		t.Errorf("%v", err)
	}
}

// A disk that has lost what it said it had is not asked again without pause.
func TestAFrameThatTheSpoolHasLostIsAlarmed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	o := spooling(t, dir)
	d, sl := o.s.disk, o.s.slots[0]
	d.begin()
	for range 3 {
		add(t, o)
		if !d.doNext() {
			t.Fatal("nothing is spooled")
		}
	}
	d.evict()
	segment := filepath.Join(d.own.log.Dir(), "0000000001.seg")
	data, err := os.ReadFile(segment)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)-1] ^= 1
	if err := os.WriteFile(segment, data, 0o600); err != nil {
		t.Fatal(err)
	}
	o.s.connected = true
	jobs := 0
	for jobs < 100 && d.doNext() {
		jobs++
	}
	if jobs == 100 || !o.Stats().SpoolFailing || !sl.lane.Holed() || sl.lane.FirstMissing() != 3 {
		t.Errorf("%d jobs, failing %t, frame %d is missing", jobs, o.Stats().SpoolFailing, sl.lane.FirstMissing())
	}
	d.end()
	o.s.connected = false
	if err := o.Close(context.Background()); err != nil {
		t.Error(err)
	}
}

// A disk that is slower than what comes in must not write for the first shards only.
func TestEveryShardHasItsTurnOnASlowDisk(t *testing.T) {
	t.Parallel()
	o, err := Open(Options{NATS: away(t), Shards: 3, Logger: zerolog.Nop(), SpoolDir: t.TempDir(), SpoolBeforeAnswer: true})
	if err != nil {
		t.Fatal(err)
	}
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	put := func(shard uint32, c *usage.Call) {
		if err := o.Add(gone, shard, c); !errors.Is(err, ErrNotSafe) {
			t.Fatal(err)
		}
	}
	c := usage.Call{Time: usage.At(time.Now()), Account: "a"}
	for shard := range uint32(2) { // two jobs for each
		for i := range 2 * maxAppend / (6 * 250) {
			text := fmt.Sprintf("%0255d", i)
			c.RequestID, c.Route, c.Model, c.KeyID, c.Region, c.Method = text+"i", text+"r", text+"m", text+"k", text+"g", text+"d"
			put(shard, &c)
		}
	}
	put(2, &usage.Call{Time: c.Time, Account: "a"})
	seen := map[uint32]bool{}
	for range 3 {
		j := o.s.disk.ownJob(o.now())
		j.do()
		o.s.disk.handle(j)
		for _, r := range j.refs {
			seen[r.slot.lane.Shard()] = true
		}
	}
	if len(seen) != 3 {
		t.Errorf("after three jobs these shards had a turn: %v", seen)
	}
	if err := o.Close(context.Background()); err != nil {
		t.Error(err)
	}
}

// Without room for its own directory an outbox is one whose spool fails, until there is
// room: also when the ledger is away and nobody has anything to be written.
func TestAnOutboxWithoutRoomForItselfBecomesAbleWhenThereIs(t *testing.T) {
	t.Parallel()
	o, err := Open(Options{NATS: away(t), Shards: 1, Logger: zerolog.Nop(), SpoolDir: t.TempDir(), SpoolBeforeAnswer: true, OnFull: Refuse})
	if err != nil {
		t.Fatal(err)
	}
	d := o.s.disk
	// As Open leaves it when Make has no room; a file in its way is what makes it fail here.
	id := d.own.log.Identity()
	if err := d.own.log.Destroy(); err != nil {
		t.Fatal(err)
	}
	d.own.log = d.store.Create(id)
	d.marks.After(d.own.log.Make)
	if err := os.WriteFile(d.own.log.Dir(), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	d.notWritten(errors.New("no room"))
	d.begin()
	c := usage.Call{Time: usage.At(time.Now()), Account: "a"}
	for range 3 {
		if err := o.Add(context.Background(), 0, &c); !errors.Is(err, ErrFull) {
			t.Fatalf("without room: %v", err)
		}
		d.writeAt = 0
		if !d.doNext() || d.writeAt == 0 || !o.Stats().SpoolFailing {
			t.Error("it is not tried once in a while whether there is room")
		}
		if err := o.Marks().Write(0, nil); err == nil {
			t.Error("a mark is durable where there is no directory")
		}
	}
	// The ledger makes calls safe as well.
	o.s.connection(true)
	add(t, o)
	o.s.connection(false)
	if err := o.Add(context.Background(), 0, &c); !errors.Is(err, ErrFull) {
		t.Errorf("without room and ledger: %v", err)
	}
	if err := os.Remove(d.own.log.Dir()); err != nil {
		t.Fatal(err)
	}
	if err := o.Marks().Write(0, nil); err != nil {
		t.Error(err)
	}
	d.writeAt = 0
	if !d.doNext() || o.Stats().SpoolFailing {
		t.Error("there is room again, and it is not known")
	}
	add(t, o)
	d.doNext()
	d.end()
	if err := o.Close(context.Background()); err != nil {
		t.Error(err)
	}
	if st := o.Stats(); st.Sent.Admitted != 2 {
		t.Errorf("%d calls are safe of two", st.Sent.Admitted)
	}
}

// A disk that could not be written with nothing left to write is asked again.
func TestASpoolThatFailedIsAskedAgainAlsoWithNothingToWrite(t *testing.T) {
	t.Parallel()
	o := spooling(t, t.TempDir())
	o.s.disk.notWritten(errors.New("no room"))
	o.s.disk.writeAt = 0
	o.s.disk.begin()
	if !o.s.disk.doNext() || o.Stats().SpoolFailing {
		t.Error("it is not")
	}
	o.s.disk.end()
	if err := o.Close(context.Background()); err != nil {
		t.Error(err)
	}
}

// What the spool has lost memory keeps, however short it is.
func TestWhatTheSpoolHasLostIsNotEvicted(t *testing.T) {
	t.Parallel()
	o := spooling(t, t.TempDir())
	d, sl := o.s.disk, o.s.slots[0]
	d.begin()
	for range 3 {
		add(t, o)
		d.doNext()
	}
	if err := os.RemoveAll(d.own.log.Dir()); err != nil {
		t.Fatal(err)
	}
	add(t, o)
	for range 2 { // noticed at the file, and then at the directory
		d.writeAt, d.retryAt = 0, 0
		d.doNext()
		if d.evict(); !o.Stats().SpoolFailing || sl.lane.Holed() || len(d.own.live) > 0 {
			t.Errorf("failing %t, holed %t, live %v", o.Stats().SpoolFailing, sl.lane.Holed(), d.own.live)
		}
	}
	d.writeAt, d.retryAt = 0, 0
	d.doNext()
	if o.Stats().SpoolFailing || d.own.live[2] != 4 {
		t.Errorf("failing %t, live %v", o.Stats().SpoolFailing, d.own.live)
	}
	d.end()
	if err := o.Close(context.Background()); err != nil {
		t.Error(err)
	}
}
