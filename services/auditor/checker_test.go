package auditor

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/audit"
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

// away is a ClickHouse that was stopped.
type away struct{ asked int }

func (a *away) Ping(context.Context) error {
	a.asked++
	return errors.New("connection refused")
}

func (a *away) Audit(context.Context, history.AuditQuery) (*audit.Cells, error) {
	a.asked++
	return nil, errors.New("connection refused")
}

// While no call comes there is nothing to compare, and the audit stayed green for hours
// beside a ClickHouse that was stopped.
func TestAnIdleAuditNoticesThatClickHouseIsAway(t *testing.T) {
	t.Parallel()
	h := &away{}
	if err := newChecker(Options{}, nil).check(t.Context(), h, &result{}); err == nil || h.asked != 1 {
		t.Errorf("ClickHouse was asked %d times; the error is %v", h.asked, err)
	}
}

func TestTheHistoryPointIsGreenOnlyWhileClickHouseAnswers(t *testing.T) {
	t.Parallel()
	now := time.Unix(1000, 0)
	for name, c := range map[string]struct {
		addressed bool
		err       error
		heard     time.Time
		ok        bool
		says      string
	}{
		"answers":       {true, nil, now.Add(-time.Second), true, "stretches are compared"},
		"refuses":       {true, errors.New("connection refused"), now.Add(-time.Second), false, "does not answer"},
		"hangs":         {true, nil, now.Add(-16 * time.Second), false, "has not answered for 16s"},
		"never came":    {true, nil, time.Time{}, false, "has not answered yet"},
		"has no tables": {true, history.ErrNotMigrated, now, false, "the historian makes them"},
		"no address":    {false, nil, time.Time{}, false, "no address"},
	} {
		p := historyPoint(now, c.addressed, c.err, c.heard)
		if p.OK != c.ok || !strings.Contains(p.Detail, c.says) || p.At != atOrNone(c.heard) {
			t.Errorf("%s: %+v", name, p)
		}
	}
}
