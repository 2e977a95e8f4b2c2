package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/plans"
)

func TestWhoeverApplyGivesUpOnIsToldHowToGoOn(t *testing.T) {
	t.Parallel()
	c := &applyCmd{Timeout: time.Minute}
	for _, given := range []error{
		&plans.StalledError{Stall: time.Minute, Done: 7, Total: 9, Err: context.Canceled},
		fmt.Errorf("read: %w", context.DeadlineExceeded),
	} {
		err := c.explain(given)
		if !errors.Is(err, given) || !strings.Contains(err.Error(), "--timeout") || !strings.Contains(err.Error(), "apply it again") {
			t.Errorf("got %v", err)
		}
	}
	other := errors.New("refused")
	if err := c.explain(other); err != other {
		t.Errorf("got %v", err)
	}
}
