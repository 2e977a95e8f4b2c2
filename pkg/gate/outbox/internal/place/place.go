// Package place tells whether a file or directory still is where it was: what is written
// to one that was deleted, moved away or unmounted nobody finds after a crash.
package place

import (
	"errors"
	"fmt"
	"os"
)

// ErrGone says that something is not there any more, or that something else is.
var ErrGone = errors.New("it was deleted, moved away or unmounted: restore the directory or restart the gateway")

// Place is a path and what was there; the zero Place is nowhere, and never gone.
type Place struct {
	path string
	info os.FileInfo
}

// Of remembers what is there now.
func Of(path string) (Place, error) {
	info, err := os.Stat(path)
	return Place{path, info}, err
}

// Check returns nil where it still is, else an error that is ErrGone.
func (p Place) Check() error {
	if p.info == nil {
		return nil
	}
	info, err := os.Stat(p.path)
	if err == nil && os.SameFile(info, p.info) {
		return nil
	}
	return errors.Join(fmt.Errorf("%s: %w", p.path, ErrGone), err)
}
