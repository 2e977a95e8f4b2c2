package spool

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// gone is a log with three records whose files have just gone away.
func gone(t *testing.T, goes func(dir string, l *Log) error) (dir string, s *Store, l *Log) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "spool")
	s = store(t, dir, 1<<30)
	l = begin(t, s)
	if _, err := l.Append(recs(1, 3, 10)); err != nil {
		t.Fatal(err)
	}
	if err := goes(dir, l); err != nil {
		t.Fatal(err)
	}
	// It is noticed before anybody takes it for durable.
	if at, err := l.Append(recs(4, 4, 10)); !errors.Is(err, ErrGone) || len(at) > 0 {
		t.Fatalf("%d records in files that nobody finds are durable: %v", len(at), err)
	}
	return dir, s, l
}

func TestALogWhoseDirectoryIsGoneIsMadeAnew(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		goes  func(dir string, l *Log) error
		fails int
	}{
		"it is deleted":    {func(_ string, l *Log) error { return os.RemoveAll(l.Dir()) }, 1},
		"it is moved away": {func(_ string, l *Log) error { return os.Rename(l.Dir(), l.Dir()+"-old") }, 1},
		"the segment":      {func(_ string, l *Log) error { return os.Remove(l.path(1)) }, 0},
		"all but the directory": {func(_ string, l *Log) error {
			return errors.Join(os.Remove(l.path(1)), os.Remove(filepath.Join(l.Dir(), identityFile)), os.Remove(l.Dir()), os.Mkdir(l.Dir(), 0o700))
		}, 1},
		"with the lock": {func(dir string, l *Log) error {
			return errors.Join(os.RemoveAll(l.Dir()), os.Remove(filepath.Join(dir, "lock")))
		}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, s, l := gone(t, c.goes)
			for range c.fails {
				if err := l.Probe(); !errors.Is(err, ErrGone) {
					t.Fatalf("it is not told: %v", err)
				}
			}
			if err := l.Has(1); err == nil {
				t.Error("it has what is gone")
			}
			if err := l.NoteAcked([]Acked{{0, 1}}); err != nil && c.fails == 0 {
				t.Error(err)
			}
			if _, err := l.Append(recs(4, 6, 10)); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(dir, 1<<30); !errors.Is(err, ErrInUse) {
				t.Errorf("somebody else can have it: %v", err)
			}
			_, logs := reopen(t, s, dir)
			for _, earlier := range logs {
				if earlier.Dir() == l.Dir() {
					if earlier.Identity() != l.Identity() {
						t.Errorf("its identity is %+v", earlier.Identity())
					}
					got, _ := all(t, earlier)
					same(t, got, recs(4, 6, 10))
					return
				}
			}
			t.Error("nobody finds it")
		})
	}
}

// Where the whole spool directory is gone nothing is made in its place: if it was
// unmounted, it would be under the mount point. When it is back all goes on.
func TestASpoolDirectoryThatIsGoneIsNotMadeAnew(t *testing.T) {
	t.Parallel()
	for name, instead := range map[string]func(dir string) error{
		"nothing in its place": func(string) error { return nil },
		"another in its place": func(dir string) error { return os.Mkdir(dir, 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, s, l := gone(t, func(dir string, _ *Log) error {
				return errors.Join(os.Rename(dir, dir+"-elsewhere"), instead(dir))
			})
			for range 3 {
				_, err := l.Append(recs(4, 4, 10))
				for _, err := range []error{err, l.Probe(), l.Make(), l.MarkWhole(), l.InPlace(), l.Remove(9)} {
					if !errors.Is(err, ErrGone) {
						t.Errorf("got %v", err)
					}
				}
			}
			if left, err := os.ReadDir(dir); len(left) > 0 || err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%v, %v", left, err)
			}
			if err := os.Remove(dir); err != nil && !errors.Is(err, syscall.ENOENT) {
				t.Fatal(err)
			}
			if err := os.Rename(dir+"-elsewhere", dir); err != nil {
				t.Fatal(err)
			}
			if _, err := l.Append(recs(4, 6, 10)); err != nil {
				t.Fatal(err)
			}
			_, logs := reopen(t, s, dir)
			if len(logs) != 1 {
				t.Fatalf("%d logs", len(logs))
			}
			got, _ := all(t, logs[0])
			same(t, got, recs(1, 6, 10))
			if err := errors.Join(l.Remove(9), l.Destroy()); err != nil {
				t.Error(err)
			}
		})
	}
}
