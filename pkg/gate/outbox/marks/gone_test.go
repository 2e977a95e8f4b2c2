package marks

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/internal/place"
)

// A mark in a file that nobody finds is not durable; the next one that is brings all.
func TestAMarkInAFileThatIsGoneIsNotDurable(t *testing.T) {
	t.Parallel()
	above, p := t.TempDir(), ksuid.New()
	dir := filepath.Join(above, "producer")
	j := New(dir, p)
	j.After(func() error { return os.MkdirAll(dir, 0o700) })
	for name, goes := range map[string]func() error{
		"deleted":            func() error { return os.RemoveAll(dir) },
		"moved away":         func() error { return os.Rename(dir, filepath.Join(above, "elsewhere")) },
		"only the file":      func() error { return os.Remove(filepath.Join(dir, File)) },
		"another in its way": func() error { return os.WriteFile(filepath.Join(above, "other"), nil, 0o600) },
	} {
		write(t, j, mark("acme", 16))
		if err := goes(); err != nil {
			t.Fatal(err)
		}
		if other := filepath.Join(above, "other"); name == "another in its way" {
			if err := os.Rename(other, filepath.Join(dir, File)); err != nil {
				t.Fatal(err)
			}
		}
		if err := j.Write(60*second, []Mark{mark("bert", 3)}); !errors.Is(err, place.ErrGone) {
			t.Errorf("%s: got %v", name, err)
		}
		write(t, j, mark("carl", 5))
		is(t, read(t, dir, p), mark("acme", 16), mark("bert", 3), mark("carl", 5))
	}
}
