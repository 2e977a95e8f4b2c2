package embedclickhouse

import (
	"testing"
)

func TestServicesSeeAnOrdinaryClickHouse(t *testing.T) {
	t.Parallel()
	s := start(t, nil)
	for protocol, dsn := range map[string]string{"native": s.DSN(), "http": s.HTTPDSN()} {
		t.Run(protocol, func(t *testing.T) {
			db := open(t, dsn)
			if err := db.PingContext(t.Context()); err != nil {
				t.Fatal(err)
			}
			table := "calls_" + protocol
			execute(t, db, "CREATE TABLE "+table+" (at DateTime64(3), account LowCardinality(String), n UInt64) ENGINE = MergeTree ORDER BY (account, at)")
			tx, err := db.BeginTx(t.Context(), nil)
			if err != nil {
				t.Fatal(err)
			}
			batch, err := tx.PrepareContext(t.Context(), "INSERT INTO "+table)
			if err != nil {
				t.Fatal(err)
			}
			for i := range 1000 {
				if _, err := batch.ExecContext(t.Context(), int64(i), "acme", uint64(i)); err != nil {
					t.Fatal(err)
				}
			}
			if err := tx.Commit(); err != nil {
				t.Fatal(err)
			}
			if got := count(t, db, "SELECT sum(n) FROM "+table+" WHERE account = 'acme'"); got != 499_500 {
				t.Errorf("sum of the inserted rows is %d, want 499500", got)
			}
		})
	}
}
