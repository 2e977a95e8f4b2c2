package history

import (
	"context"
	"testing"

	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/embedclickhouse"
)

// Whoever empties the tables in order to write the history anew sends the same
// blocks under the same tokens.
func TestEmptiedTablesTakeTheSameBlocksAgain(t *testing.T) {
	t.Parallel()
	path, err := embedclickhouse.Install(t.Context(), embedclickhouse.InstallOptions{Logger: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	s, err := embedclickhouse.Start(t.Context(), embedclickhouse.Options{DataDir: t.TempDir(), EnginePath: path, Logger: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	h, err := Open(t.Context(), Options{
		Addrs: []string{s.Addr()}, Database: embedclickhouse.Database, User: embedclickhouse.ServiceUser, Password: s.Credentials().ServicePassword, Logger: zerolog.Nop(),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := h.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, emptied := range []string{"not yet", "as it was", "after a merge"} {
		for n := range uint64(3) {
			insert(t, h, block(t, 1+n, noon, ksuid.New(), usage.Call{Time: noon, Account: "a", Status: 200}), string(rune('a'+n)))
		}
		for _, table := range []string{"calls", "usage_hourly", "traffic_minute"} {
			if emptied == "as it was" { // for the next turn
				if err := h.conn.Exec(t.Context(), "OPTIMIZE TABLE "+table+" FINAL"); err != nil {
					t.Fatal(err)
				}
			}
		}
		for _, rollup := range []bool{false, true} {
			if got, err := h.Totals(t.Context(), TotalsQuery{Rollup: rollup}); err != nil || got.Admitted != 3 {
				t.Errorf("emptied: %s, rollup %t: %+v %v", emptied, rollup, got, err)
			}
		}
		for _, table := range []string{"calls", "usage_hourly", "traffic_minute"} {
			if err := h.conn.Exec(t.Context(), "TRUNCATE TABLE "+table); err != nil {
				t.Fatal(err)
			}
		}
	}
}
