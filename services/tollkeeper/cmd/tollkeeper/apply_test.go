package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/tollkeeper/tollkeeper/services/tollkeeper"
)

// A pipeline that forgot --yes was told "0" and had changed nothing.
func TestWithoutATerminalNothingIsAppliedAndItFails(t *testing.T) {
	t.Parallel()
	if err := (&applyCmd{}).confirm(); !errors.Is(err, tollkeeper.ErrNotConfirmed) || !strings.Contains(err.Error(), "--yes") {
		t.Errorf("got %v", err)
	}
	if err := (&applyCmd{Yes: true}).confirm(); err != nil {
		t.Errorf("with --yes: %v", err)
	}
}
