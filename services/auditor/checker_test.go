package auditor

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

type fakeTables struct {
	migrated error
	floor    uint64
	asked    int // times for the floor
}

func (f *fakeTables) Migrated(context.Context) error { return f.migrated }

func (f *fakeTables) AuditFrom(context.Context) (uint64, error) {
	f.asked++
	return f.floor, nil
}

// The historian makes the tables, and nobody else: until it has, /readyz says what
// is waited for, and no table is asked.
func TestTheAuditorWaitsForTheHistoriansTables(t *testing.T) {
	t.Parallel()
	all := telemetry.NewReadiness()
	ready := all.Component("auditor_tables")
	said := func() telemetry.ComponentStatus { return all.Status().Components[0] }
	f := &fakeTables{migrated: fmt.Errorf("%w: they are at version 2 of 6", history.ErrNotMigrated), floor: 7}
	if _, err := begin(t.Context(), f, ready); !errors.Is(err, history.ErrNotMigrated) || f.asked != 0 {
		t.Errorf("%v, asked %d times", err, f.asked)
	}
	if s := said(); s.OK || s.Reason != "ClickHouse's tables are not made yet: they are at version 2 of 6: waiting for the historian, which makes them when it starts" {
		t.Errorf("%+v", s)
	}
	f.migrated = errors.New("connection refused")
	if _, err := begin(t.Context(), f, ready); err == nil || f.asked != 0 {
		t.Errorf("%v, asked %d times", err, f.asked)
	}
	if s := said(); s.OK || s.Reason != "whether ClickHouse's tables are made can't be found out: connection refused" {
		t.Errorf("%+v", s)
	}
	f.migrated = nil
	if floor, err := begin(t.Context(), f, ready); err != nil || floor != 7 {
		t.Errorf("%d, %v", floor, err)
	}
	if s := said(); !s.OK {
		t.Errorf("%+v", s)
	}
}
