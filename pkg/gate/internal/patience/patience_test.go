package patience

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

type name struct{}

// A call waits for as long as it may, whatever its client does meanwhile.
func TestTheTimeBeginsWhenSomebodyWaitsAndOutlivesTheParent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		parent, gone := context.WithCancel(context.WithValue(t.Context(), name{}, "of the parent"))
		c := New(parent, 5*time.Second)
		defer c.Stop()
		gone()
		time.Sleep(time.Hour) // of the bubble: nobody waits yet
		if c.Err() != nil || c.Value(name{}) != "of the parent" {
			t.Fatalf("before anybody waits: %v, %v", c.Err(), c.Value(name{}))
		}
		began := time.Now()
		<-c.Done()
		if took := time.Since(began); took != 5*time.Second || !errors.Is(c.Err(), context.DeadlineExceeded) {
			t.Errorf("waited %v: %v", took, c.Err())
		}
		if at, ok := c.Deadline(); !ok || !at.Equal(began.Add(5*time.Second)) {
			t.Errorf("the deadline is %v, %v", at, ok)
		}
	})
}

func TestNothingIsWaitedForAfterStop(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]*Context{"waited": New(t.Context(), time.Hour), "not waited": New(t.Context(), time.Hour)} {
		if name == "waited" {
			_ = c.Done()
		}
		c.Stop()
		if !errors.Is(c.Err(), context.Canceled) {
			t.Errorf("%s: %v", name, c.Err())
		}
		<-c.Done()
	}
}

func TestACallThatDoesNotWaitCostsOneAllocation(t *testing.T) {
	ctx := t.Context()
	if n := testing.AllocsPerRun(100, func() {
		c := New(ctx, time.Second)
		if c.Err() != nil {
			t.Fatal(c.Err())
		}
		c.Stop()
	}); n > 1 {
		t.Errorf("%v allocations", n)
	}
}
