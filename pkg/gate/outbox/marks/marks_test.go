package marks

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

const second = usage.Micros(1_000_000)

func mark(account string, most int64) Mark {
	return Mark{Shard: 1, Account: account, Limit: "plan/rpm", Start: 60 * second, End: 120 * second, UsedAtMost: most}
}

func write(t *testing.T, j *Journal, batch ...Mark) {
	t.Helper()
	if err := j.Write(60*second, batch); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, dir string, producer ksuid.KSUID) []Mark {
	t.Helper()
	all, kept, err := Read(dir, producer)
	if err != nil || !kept {
		t.Fatalf("kept %v: %v", kept, err)
	}
	return all
}

func is(t *testing.T, got []Mark, want ...Mark) {
	t.Helper()
	if len(got) != len(want) || len(want) > 0 && !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestTheGreatestMarkOfALeaseHolds(t *testing.T) {
	t.Parallel()
	dir, p := t.TempDir(), ksuid.New()
	if all, kept, err := Read(dir, p); len(all) != 0 || kept || err != nil {
		t.Errorf("before the first: %v, %v, %v", all, kept, err)
	}
	j := New(dir, p)
	if _, begun := j.All(); begun {
		t.Error("nothing was to be noted yet")
	}
	write(t, j)
	is(t, read(t, dir, p))
	life := Mark{Shard: 0, Account: "acme", Limit: "plan/all", UsedAtMost: 7}
	write(t, j, mark("acme", 16), life)
	write(t, j, mark("acme", 40))
	write(t, j, mark("acme", 30), mark("bert", 1))
	is(t, read(t, dir, p), life, mark("acme", 40), mark("bert", 1))
	if all, begun := j.All(); !begun || !reflect.DeepEqual(all, read(t, dir, p)) {
		t.Errorf("in memory: %v", all)
	}
	if err := j.Close(); err != nil {
		t.Fatal(err)
	}
	if err := j.Write(0, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
	is(t, read(t, dir, p), life, mark("acme", 40), mark("bert", 1))
	if _, _, err := Read(dir, ksuid.New()); !errors.Is(err, ErrDamaged) {
		t.Errorf("somebody else's: %v", err)
	}
}

func TestATornEndIsPassedOverWhereverItIs(t *testing.T) {
	t.Parallel()
	dir, p := t.TempDir(), ksuid.New()
	j := New(dir, p)
	write(t, j, mark("acme", 16))
	before, err := os.ReadFile(filepath.Join(dir, File))
	if err != nil {
		t.Fatal(err)
	}
	write(t, j, mark("acme", 40), mark("bert", 3))
	whole, err := os.ReadFile(filepath.Join(dir, File))
	if err != nil {
		t.Fatal(err)
	}
	for cut := len(before); cut < len(whole); cut++ {
		for _, damage := range [][]byte{
			whole[:cut],
			append(bytes.Clone(whole[:cut]), make([]byte, len(whole)-cut+99)...), // as some file systems leave it
		} {
			if err := os.WriteFile(filepath.Join(dir, File), damage, 0o600); err != nil {
				t.Fatal(err)
			}
			is(t, read(t, dir, p), mark("acme", 16))
		}
	}
	// What is not the end that one write can have left is no journal.
	for name, damage := range map[string][]byte{
		"no header":          whole[:fileHeader-1],
		"a header of zeroes": make([]byte, len(whole)),
		"too much":           append(bytes.Clone(before), make([]byte, recordHead+maxRecord+1)...),
		"empty":              nil,
	} {
		if err := os.WriteFile(filepath.Join(dir, File), damage, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, kept, err := Read(dir, p); !errors.Is(err, ErrDamaged) || kept {
			t.Errorf("%s: %v, %v", name, kept, err)
		}
	}
}

// A mark that was noted and can't be read any more may be greater than those that can:
// then nobody knows what was used, rather than less than was.
func TestWrongBitsNeverMakeMarksSmaller(t *testing.T) {
	t.Parallel()
	dir, p := t.TempDir(), ksuid.New()
	j := New(dir, p)
	for n := range int64(4) {
		write(t, j, mark("acme", 16*(n+1)))
	}
	whole, err := os.ReadFile(filepath.Join(dir, File))
	if err != nil {
		t.Fatal(err)
	}
	for bit := range 8 * len(whole) {
		damage := bytes.Clone(whole)
		damage[bit/8] ^= 1 << (bit % 8)
		if err := os.WriteFile(filepath.Join(dir, File), damage, 0o600); err != nil {
			t.Fatal(err)
		}
		if all, kept, err := Read(dir, p); !errors.Is(err, ErrDamaged) || kept {
			t.Fatalf("bit %d of byte %d of %d: %+v, %v, %v", bit%8, bit/8, len(whole), all, kept, err)
		}
	}
}

// What the file needs is there before it, and its marks are not noted without it.
func TestAFileIsMadeAfterWhatItNeeds(t *testing.T) {
	t.Parallel()
	dir, p := filepath.Join(t.TempDir(), "not yet"), ksuid.New()
	j := New(dir, p)
	full := error(syscall.ENOSPC)
	j.After(func() error { return errors.Join(full, os.MkdirAll(dir, 0o700)) })
	if err := j.Write(60*second, []Mark{mark("acme", 16)}); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, File)); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	full = nil
	write(t, j, mark("bert", 3))
	is(t, read(t, dir, p), mark("acme", 16), mark("bert", 3))
}

// disk fails where it is told to, and says when it is about to sync.
type disk struct {
	file
	write, sync *error
	syncing     func()
}

func (d disk) Write(p []byte) (int, error) {
	if *d.write != nil {
		n, _ := d.file.Write(p[:len(p)/2])
		return n, *d.write
	}
	return d.file.Write(p)
}

func (d disk) Sync() error {
	d.syncing()
	if *d.sync != nil {
		return *d.sync
	}
	return d.file.Sync()
}

func onDisk(j *Journal, syncing func()) (write, sync *error) {
	write, sync = new(error), new(error)
	create := j.create
	j.create = func(path string) (file, error) {
		f, err := create(path)
		return disk{f, write, sync, syncing}, err
	}
	return write, sync
}

func TestAFailingDiskLosesNoMarkThatItAcknowledged(t *testing.T) {
	t.Parallel()
	dir, p := t.TempDir(), ksuid.New()
	j := New(dir, p)
	write, sync := onDisk(j, func() {})
	acknowledged := int64(0)
	for i := range int64(60) {
		*write, *sync = nil, nil
		switch i % 5 {
		case 1, 4: // twice in a row: also while the file is made anew
			*write = syscall.ENOSPC
		case 2:
			*sync = syscall.EIO
		}
		err := j.Write(60*second, []Mark{mark("acme", 10*i), mark(fmt.Sprint(i), 1)})
		if (err == nil) != (*write == nil && *sync == nil) {
			t.Fatal(err)
		}
		if err == nil {
			acknowledged = 10 * i
		} else if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EIO) {
			t.Fatal(err)
		}
		// A mark may be there that was not acknowledged: then more is kept than need be.
		for _, m := range read(t, dir, p) {
			if m.Account == "acme" && (m.UsedAtMost < acknowledged || m.UsedAtMost > 10*i) {
				t.Fatalf("mark %d, acknowledged are %d", m.UsedAtMost, acknowledged)
			}
		}
	}
}

// A kill is a copy of the directory: what it has when Write has returned it has, and
// what Write has not returned nobody used.
func TestAKillOnEitherSideOfTheSync(t *testing.T) {
	t.Parallel()
	dir, p := t.TempDir(), ksuid.New()
	j := New(dir, p)
	returned, copies := int64(0), 0
	killed := func() {
		copies++
		at := t.TempDir()
		if err := os.CopyFS(at, os.DirFS(dir)); err != nil {
			t.Error(err)
			return
		}
		all, kept, err := Read(at, p)
		if err != nil || kept != (returned > 0) || kept && (len(all) != 1 || all[0].UsedAtMost < returned || all[0].UsedAtMost > returned+16) {
			t.Errorf("%+v, %v after %d was returned: %v", all, kept, returned, err)
		}
	}
	onDisk(j, killed)
	for i := range int64(50) {
		if i%10 == 9 {
			j.written = fewest // it is made anew
		}
		write(t, j, mark("acme", 16*(i+1)))
		returned = 16 * (i + 1)
		killed()
	}
	if copies != 100 {
		t.Errorf("%d copies", copies)
	}
}

func TestWhatIsOverIsForgottenAndTheFileStaysSmall(t *testing.T) {
	t.Parallel()
	dir, p := t.TempDir(), ksuid.New()
	j := New(dir, p)
	longest := int64(0)
	const minutes = 200
	for minute := range usage.Micros(minutes) {
		now := minute * 60 * second
		for n := range 3 {
			batch := make([]Mark, 200)
			for i := range batch {
				batch[i] = Mark{Account: fmt.Sprint("account-", i), Limit: "plan/rpm", Start: now, End: now + 60*second, UsedAtMost: int64(n)}
			}
			if err := j.Write(now, batch); err != nil {
				t.Fatal(err)
			}
		}
		info, err := os.Stat(filepath.Join(dir, File))
		if err != nil {
			t.Fatal(err)
		}
		longest = max(longest, info.Size())
	}
	if longest > 2*fewest*40 || len(j.marks) > 2*fewest {
		t.Errorf("%d bytes, %d in memory", longest, len(j.marks))
	}
	all := read(t, dir, p)
	for _, m := range all {
		if m.End+grace < (minutes-1)*60*second {
			t.Fatalf("%+v is long over", m)
		}
	}
	if len(all) != 3*200 {
		t.Errorf("%d marks: of the window, the one before and the one that ended a minute ago", len(all))
	}
}

func TestTheLongestNamesFit(t *testing.T) {
	t.Parallel()
	dir, p := t.TempDir(), ksuid.New()
	j := New(dir, p)
	long := func(n int) string { return strings.Repeat("x", usage.MaxIDBytes-4) + fmt.Sprintf("%04d", n) }
	batch := make([]Mark, MaxBatch)
	for i := range batch {
		batch[i] = Mark{Shard: 1 << 20, Account: long(i), Limit: long(0) + "/" + long(1), Start: 1 << 60, End: 1<<60 + 1, UsedAtMost: 1 << 60}
	}
	write(t, j)
	write(t, j, batch...)
	is(t, read(t, dir, p), batch...)
	if err := j.Write(0, append(batch, batch[0])); err == nil {
		t.Error("too many are taken")
	}
}
