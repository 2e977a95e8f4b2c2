package spool

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/segmentio/ksuid"
)

func store(t *testing.T, dir string, limit int64) *Store {
	t.Helper()
	s, err := Open(dir, limit)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func begin(t *testing.T, s *Store) *Log {
	t.Helper()
	l := s.Create(Identity{Producer: ksuid.New(), Gateway: "g", Shards: 8, OpenedAt: 5})
	if err := l.Make(); err != nil {
		t.Fatal(err)
	}
	return l
}

func rec(n uint64, size int) Record {
	return Record{Shard: uint32(n % 3), Number: n, Calls: 2, At: 7, Data: bytes.Repeat([]byte{byte(n)}, size)}
}

func recs(from, to uint64, size int) (out []Record) {
	for n := from; n <= to; n++ {
		out = append(out, rec(n, size))
	}
	return out
}

// all reads everything, and how many bytes were torn.
func all(t *testing.T, l *Log) (out []Record, torn int64) {
	t.Helper()
	var pos Position
	for {
		r, _, next, tr, ok, err := l.Read(pos)
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range tr {
			torn += x.Bytes
		}
		if !ok {
			return out, torn
		}
		out, pos = append(out, r), next
	}
}

func same(t *testing.T, got, want []Record) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d records, wanted are %d", len(got), len(want))
	}
	for i := range got {
		if fmt.Sprint(got[i]) != fmt.Sprint(want[i]) {
			t.Fatalf("record %d is %d of shard %d", i, got[i].Number, got[i].Shard)
		}
	}
}

// reopen is the next process after a kill.
func reopen(t *testing.T, s *Store, dir string) (*Store, []*Log) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = store(t, dir, 1<<30)
	logs, err := s.Earlier()
	if err != nil {
		t.Fatal(err)
	}
	return s, logs
}

func TestWhatWasAppendedIsThereAfterAKill(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := store(t, dir, 1<<30)
	s.segmentBytes = 1000
	l := begin(t, s)
	want := recs(1, 50, 100)
	for _, part := range [][]Record{want[:1], want[1:30], want[30:]} {
		at, err := l.Append(part)
		if err != nil || len(at) != len(part) {
			t.Fatal(len(at), err)
		}
	}
	if len(l.segments) < 5 {
		t.Errorf("%d segments", len(l.segments))
	}
	got, torn := all(t, l)
	same(t, got, want)
	if torn != 0 {
		t.Errorf("%d bytes torn", torn)
	}
	size := s.Bytes()
	s, logs := reopen(t, s, dir)
	if len(logs) != 1 || logs[0].Identity() != l.Identity() || s.Bytes() != size {
		t.Fatalf("found %d logs, %d bytes of %d", len(logs), s.Bytes(), size)
	}
	got, _ = all(t, logs[0])
	same(t, got, want)
	if err := logs[0].Destroy(); err != nil {
		t.Fatal(err)
	}
	if s.Bytes() != 0 {
		t.Errorf("%d bytes are left", s.Bytes())
	}
	if _, logs = reopen(t, s, dir); len(logs) != 0 {
		t.Errorf("%d logs are left", len(logs))
	}
}

func TestATornEndIsCutWhereverItIs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := store(t, dir, 1<<30)
	l := begin(t, s)
	want := recs(1, 5, 40)
	at, err := l.Append(want)
	if err != nil {
		t.Fatal(err)
	}
	path := l.path(1)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	from := int(at[4].Offset)
	for cut := from; cut < len(whole); cut++ {
		for _, damage := range []func([]byte) []byte{
			func(b []byte) []byte { return b[:cut] },                                             // not all was written
			func(b []byte) []byte { b[cut] ^= 0x40; return b },                                   // not what was written
			func(b []byte) []byte { return append(b[:cut], make([]byte, len(whole)-cut+99)...) }, // zeroes, as some file systems leave
		} {
			if err := os.WriteFile(path, damage(bytes.Clone(whole)), 0o600); err != nil {
				t.Fatal(err)
			}
			again := &Log{store: s, dir: l.dir, identity: l.identity}
			if err := again.scan(); err != nil {
				t.Fatal(err)
			}
			got, torn := all(t, again)
			same(t, got, want[:4])
			if (torn == 0) != (again.segments[0].size == int64(from)) {
				t.Fatalf("cut at %d: %d bytes torn", cut, torn)
			}
			if err := again.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// stretches are what a reader of the log passes on its way.
func stretches(t *testing.T, l *Log) (numbers []uint64, passed []Torn) {
	t.Helper()
	var pos Position
	for {
		r, _, next, some, ok, err := l.Read(pos)
		if err != nil {
			t.Fatal(err)
		}
		passed = append(passed, some...)
		if !ok {
			return numbers, passed
		}
		numbers, pos = append(numbers, r.Number), next
	}
}

// One wrong bit costs the record that it is in and no other, and is never taken for
// what a crash has cut.
func TestAWrongBitCostsOneRecordWhereverItIs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := store(t, dir, 1<<30)
	l := begin(t, s)
	at, err := l.Append(recs(1, 5, 20))
	if err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(l.path(1))
	if err != nil {
		t.Fatal(err)
	}
	for bit := range 8 * len(whole) {
		damage := bytes.Clone(whole)
		damage[bit/8] ^= 1 << (bit % 8)
		if err := os.WriteFile(l.path(1), damage, 0o600); err != nil {
			t.Fatal(err)
		}
		again := s.Create(l.identity)
		if err := again.scan(); err != nil {
			t.Fatal(err)
		}
		hit := 0 // the header
		for hit < len(at) && int64(bit/8) >= at[hit].Offset {
			hit++
		}
		want := slices.DeleteFunc([]uint64{1, 2, 3, 4, 5}, func(n uint64) bool { return n == uint64(hit) })
		numbers, passed := stretches(t, again)
		if !slices.Equal(numbers, want) || len(passed) != 1 || !passed[0].Damaged {
			t.Fatalf("bit %d of byte %d: %v, %+v", bit%8, bit/8, numbers, passed)
		}
		if p := passed[0]; hit > 0 && bit/8 >= int(at[hit-1].Offset)+recordHeader+recordFixed && (p.Record.Number != uint64(hit) || p.Record.Shard != uint32(hit%3) || p.Record.Calls != 2 || p.Record.At != 7 || p.Position != at[hit-1] || p.Bytes != at[1].Offset-at[0].Offset) {
			t.Fatalf("byte %d: %+v", bit/8, p)
		}
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// No crash has cut what a producer left that ended in order.
func TestAnEndIsOnlyTornWhereACrashCame(t *testing.T) {
	t.Parallel()
	s := store(t, t.TempDir(), 1<<30)
	l := begin(t, s)
	at, err := l.Append(recs(1, 3, 20))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(l.path(1), at[2].Offset+9); err != nil {
		t.Fatal(err)
	}
	for _, mark := range []func() error{func() error { return nil }, l.MarkWhole, l.MarkLossy, l.MarkLossy} {
		if err := mark(); err != nil {
			t.Fatal(err)
		}
		again := s.Create(l.identity)
		if err := again.scan(); err != nil {
			t.Fatal(err)
		}
		if numbers, passed := stretches(t, again); len(numbers) != 2 || len(passed) != 1 || passed[0].Damaged != l.Whole() {
			t.Errorf("%v, %+v, whole %t", numbers, passed, l.Whole())
		}
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// Behind damage a call's own text may look like a record.
func TestBehindDamageOnlyGenuineRecordsAreRead(t *testing.T) {
	t.Parallel()
	s := store(t, t.TempDir(), 1<<30)
	l := begin(t, s)
	forged := rec(7, 9)
	inner := Record{Shard: 1, Number: 2, Calls: 1, At: 7, Data: appendRecord([]byte("text: "), &forged)}
	at, err := l.Append([]Record{rec(1, 9), inner, rec(3, 9)})
	if err != nil {
		t.Fatal(err)
	}
	if numbers, passed := stretches(t, l); !slices.Equal(numbers, []uint64{1, 2, 3}) || len(passed) != 0 {
		t.Errorf("%v, %+v", numbers, passed)
	}
	data, err := os.ReadFile(l.path(1))
	if err != nil {
		t.Fatal(err)
	}
	data[at[1].Offset+recordHeader] ^= 1
	if err := os.WriteFile(l.path(1), data, 0o600); err != nil {
		t.Fatal(err)
	}
	s.Genuine = func(p ksuid.KSUID, r *Record) bool { return p == l.identity.Producer && r.Number != 7 }
	if numbers, passed := stretches(t, l); !slices.Equal(numbers, []uint64{1, 3}) || len(passed) != 1 || !passed[0].Damaged {
		t.Errorf("%v, %+v", numbers, passed)
	}
}

func TestADamagedSegmentIsPutAsideWithinABound(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := store(t, dir, 1<<30)
	s.segmentBytes = 500
	l := begin(t, s)
	at, err := l.Append(recs(1, 20, 100))
	if err != nil {
		t.Fatal(err)
	}
	harm := func(n uint64) []byte {
		data, err := os.ReadFile(l.path(n))
		if err != nil {
			t.Fatal(err)
		}
		data[segmentHeader+50] ^= 1
		if err := os.WriteFile(l.path(n), data, 0o600); err != nil {
			t.Fatal(err)
		}
		return data
	}
	first := harm(1)
	harm(3)
	s.limit = 4 * 700 // one of them fits
	if numbers, passed := stretches(t, l); len(numbers) != 18 || len(passed) != 2 {
		t.Fatalf("%v, %+v", numbers, passed)
	}
	if err := l.Remove(at[19].Segment + 1); err != nil || s.Bytes() != 0 {
		t.Fatal(err, s.Bytes())
	}
	aside := l.Aside()
	if len(aside) != 2 || aside[0].Segment != 1 || aside[0].Err != nil || aside[1].Segment != 3 || aside[1].Path != "" || !errors.Is(aside[1].Err, ErrFull) {
		t.Fatalf("%+v", aside)
	}
	if got, err := os.ReadFile(aside[0].Path); err != nil || !bytes.Equal(got, first) || filepath.Dir(aside[0].Path) != filepath.Join(dir, "damaged") {
		t.Error(aside[0].Path, err)
	}
	if again := l.Aside(); len(again) != 0 {
		t.Errorf("told twice: %+v", again)
	}
	if err := l.Destroy(); err != nil {
		t.Fatal(err)
	}
	if _, logs := reopen(t, s, dir); len(logs) != 0 {
		t.Error("what was put aside is taken for a producer")
	}
}

// A disk without room leaves nothing half made, and what has room later is made then.
func TestALogIsMadeAsSoonAsThereIsRoom(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := store(t, dir, 1<<30)
	full := error(syscall.ENOSPC)
	s.mkdir = func(path string) error {
		if full == nil {
			return os.Mkdir(path, 0o700)
		}
		return full
	}
	l := s.Create(Identity{Producer: ksuid.New(), Shards: 8})
	fails := func() {
		t.Helper()
		_, err := l.Append(recs(1, 1, 10))
		for _, err := range []error{err, l.Make(), l.Probe(), l.MarkWhole()} {
			if !errors.Is(err, full) {
				t.Errorf("got %v, want %v", err, full)
			}
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 || s.Bytes() != 0 {
			t.Errorf("%v, %v, %d bytes", entries, err, s.Bytes())
		}
	}
	fails()
	// Room for the directory, none for its identity.
	s.mkdir = func(path string) error {
		return errors.Join(os.Mkdir(path, 0o700), os.Mkdir(filepath.Join(path, identityFile), 0o700))
	}
	full = syscall.EISDIR
	fails()
	s.mkdir = func(path string) error { return os.Mkdir(path, 0o700) }
	if err := l.Probe(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Append(recs(1, 3, 10)); err != nil {
		t.Fatal(err)
	}
	_, logs := reopen(t, s, dir)
	if len(logs) != 1 || logs[0].Identity() != l.Identity() {
		t.Fatalf("%d logs", len(logs))
	}
	got, _ := all(t, logs[0])
	same(t, got, recs(1, 3, 10))
	// One that was never made has nothing to be taken away.
	never := s.Create(Identity{Producer: ksuid.New()})
	if err := never.Remove(9); err != nil {
		t.Error(err)
	}
	if err := never.Destroy(); err != nil {
		t.Error(err)
	}
}

func TestAProbeSaysWhetherThereIsRoomAgain(t *testing.T) {
	t.Parallel()
	s := store(t, t.TempDir(), 1000)
	s.segmentBytes = 500
	l := begin(t, s)
	if err := l.Probe(); err != nil {
		t.Error(err)
	}
	at, err := l.Append(recs(1, 20, 100))
	if !errors.Is(err, ErrFull) {
		t.Fatal(err)
	}
	s.limit = s.Bytes()
	if err := l.Probe(); !errors.Is(err, ErrFull) {
		t.Errorf("full: %v", err)
	}
	if err := l.Remove(at[len(at)-1].Segment); err != nil {
		t.Fatal(err)
	}
	if err := l.Probe(); err != nil {
		t.Errorf("with room again: %v", err)
	}
	sync, write := error(nil), error(syscall.ENOSPC)
	if err := l.rest(); err != nil {
		t.Fatal(err)
	}
	s.create = func(path string) (file, error) {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		return faulty{f, &write, &sync}, err
	}
	if err := l.Probe(); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("on a full disk: %v", err)
	}
}

func TestADamagedSegmentDoesNotHideTheNext(t *testing.T) {
	t.Parallel()
	s := store(t, t.TempDir(), 1<<30)
	s.segmentBytes = 300
	l := begin(t, s)
	if _, err := l.Append(recs(1, 9, 100)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(l.path(2), []byte("nonsense, and more than a header of it, so that it is read"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, torn := all(t, l)
	if torn == 0 || len(got) == 0 || got[0].Number != 1 || got[len(got)-1].Number != 9 {
		t.Errorf("%d records, %d bytes torn", len(got), torn)
	}
}

func TestSegmentsAreRemovedOneByOne(t *testing.T) {
	t.Parallel()
	s := store(t, t.TempDir(), 1<<30)
	s.segmentBytes = 500
	l := begin(t, s)
	at, err := l.Append(recs(1, 20, 100))
	if err != nil {
		t.Fatal(err)
	}
	before := s.Bytes()
	if err := l.Remove(at[10].Segment); err != nil {
		t.Fatal(err)
	}
	got, _ := all(t, l)
	if len(got) == 0 || got[len(got)-1].Number != 20 || s.Bytes() >= before {
		t.Fatalf("%d records, %d bytes", len(got), s.Bytes())
	}
	for i, p := range at {
		if p.Segment >= at[10].Segment {
			same(t, got, recs(uint64(i)+1, 20, 100))
			break
		}
	}
	// Everything, the segment that is written included: numbers go on.
	if err := l.Remove(l.Active() + 1); err != nil || s.Bytes() != 0 {
		t.Fatal(err, s.Bytes())
	}
	next, err := l.Append(recs(21, 21, 100))
	if err != nil || next[0].Segment <= at[19].Segment {
		t.Fatal(next, err)
	}
	got, _ = all(t, l)
	same(t, got, recs(21, 21, 100))
}

func TestAFullSpoolTakesWhatFits(t *testing.T) {
	t.Parallel()
	s := store(t, t.TempDir(), 1000)
	s.segmentBytes = 500
	l := begin(t, s)
	at, err := l.Append(recs(1, 20, 100))
	if !errors.Is(err, ErrFull) || len(at) == 0 || s.Bytes() > 1000 {
		t.Fatal(len(at), err, s.Bytes())
	}
	got, _ := all(t, l)
	same(t, got, recs(1, uint64(len(at)), 100))
	if err := l.Remove(at[len(at)-1].Segment); err != nil {
		t.Fatal(err)
	}
	if at, _ = l.Append(recs(20, 20, 100)); len(at) != 1 {
		t.Error("no room after a removal")
	}
}

// faulty fails where it is told to, after having written half.
type faulty struct {
	*os.File
	write, sync *error
}

func (f faulty) Write(p []byte) (int, error) {
	if *f.write != nil {
		n, _ := f.File.Write(p[:len(p)/2])
		return n, *f.write
	}
	return f.File.Write(p)
}

func (f faulty) Sync() error {
	if *f.sync != nil {
		return *f.sync
	}
	return f.File.Sync()
}

func TestAFailingDiskLosesNothingThatItAcknowledged(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := store(t, dir, 1<<30)
	var write, sync error
	s.create = func(path string) (file, error) {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		return faulty{f, &write, &sync}, err
	}
	l := begin(t, s)
	next := uint64(1)
	for i := range 30 {
		write, sync = nil, nil
		switch i % 3 {
		case 1:
			write = syscall.ENOSPC
		case 2:
			sync = syscall.EIO
		}
		at, err := l.Append(recs(next, next+2, 100))
		switch {
		case i%3 == 0 && (err != nil || len(at) != 3):
			t.Fatal(len(at), err)
		case i%3 == 1 && (!errors.Is(err, syscall.ENOSPC) || len(at) != 0), i%3 == 2 && (!errors.Is(err, syscall.EIO) || len(at) != 0):
			t.Fatal(len(at), err)
		}
		next += uint64(len(at))
	}
	got, torn := all(t, l)
	same(t, got, recs(1, next-1, 100))
	if torn != 0 {
		t.Errorf("%d bytes torn", torn)
	}
	_, logs := reopen(t, s, dir)
	got, _ = all(t, logs[0])
	same(t, got, recs(1, next-1, 100))
}

func TestOneProcessAtATime(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := store(t, dir, 1<<20)
	if _, err := Open(dir, 1<<20); !errors.Is(err, ErrInUse) {
		t.Errorf("got %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	store(t, dir, 1<<20)
}

func TestOthersFilesAreLeftAlone(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, name := range []string{"notes", ksuid.New().String() + ".bak"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	// A directory that was only just made when its process was killed.
	if err := os.Mkdir(filepath.Join(dir, ksuid.New().String()), 0o700); err != nil {
		t.Fatal(err)
	}
	logs, err := store(t, dir, 1<<20).Earlier()
	if err != nil || len(logs) != 0 {
		t.Fatal(len(logs), err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 3 { // and the lock
		t.Errorf("%d entries", len(entries))
	}
}

func TestRejectedFramesAreKept(t *testing.T) {
	t.Parallel()
	s := store(t, t.TempDir(), 1<<20)
	r := rec(4, 10)
	path, err := s.Keep(ksuid.Max, &r)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, r.Data) {
		t.Error(err)
	}
}

// A server that takes no frame at all must not fill the disk.
func TestRejectedFramesHaveABound(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := store(t, dir, 4000)
	keep := func(n uint64) error {
		r := rec(n, 300)
		_, err := s.Keep(ksuid.Max, &r)
		return err
	}
	for n := range uint64(3) {
		if err := keep(n); err != nil {
			t.Fatal(err)
		}
	}
	if err := keep(3); !errors.Is(err, ErrFull) {
		t.Errorf("past a quarter of the limit: %v", err)
	}
	s, _ = reopen(t, s, dir)
	s.limit = 4000
	if err := keep(4); !errors.Is(err, ErrFull) {
		t.Errorf("and after a restart: %v", err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "rejected")); err != nil {
		t.Fatal(err)
	}
	s, _ = reopen(t, s, dir)
	s.limit = 4000
	if err := keep(5); err != nil {
		t.Errorf("when somebody has taken them away: %v", err)
	}
}

// The name of the spool's own directory is what all in it is found by.
func TestADirectoryThatIsMadeIsDurable(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var synced []string
	sync := func(d string) error {
		name, err := filepath.Rel(dir, d)
		synced = append(synced, name)
		return err
	}
	for range 2 { // the second time it is there
		if err := makeDir(filepath.Join(dir, "a", "b", "spool"), sync); err != nil {
			t.Fatal(err)
		}
	}
	if got := fmt.Sprint(synced); got != "[. a a/b]" {
		t.Errorf("synced are %s", got)
	}
	if err := makeDir(filepath.Join(dir, "c"), func(string) error { return syscall.EIO }); !errors.Is(err, syscall.EIO) {
		t.Errorf("got %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(filepath.Join(dir, "file", "x"), 1<<20); err == nil {
		t.Error("it is in a file")
	}
}

// What a failing disk left of a segment that could not be begun stands in nobody's way.
func TestASegmentThatIsThereAlreadyIsPassedBy(t *testing.T) {
	t.Parallel()
	s := store(t, t.TempDir(), 1<<20)
	l := begin(t, s)
	if err := os.WriteFile(l.path(1), []byte(magic), 0o600); err != nil {
		t.Fatal(err)
	}
	at, err := l.Append(recs(1, 2, 100))
	if err != nil || at[0].Segment != 2 {
		t.Fatal(at, err)
	}
	got, _ := all(t, l)
	same(t, got, recs(1, 2, 100))
}
