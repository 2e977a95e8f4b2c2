package embedclickhouse

import (
	"bufio"
	"context"
	"database/sql"
	"fmt"
	"net/http"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"
)

// supervisorMarker turns this test binary into a supervisor that a test can kill.
const supervisorMarker = "TOLLKEEPER_TEST_SUPERVISOR_DIR"

func TestMain(m *testing.M) {
	MaybeRunChild()
	if dir := os.Getenv(supervisorMarker); dir != "" {
		os.Exit(superviseForTest(dir))
	}
	code := m.Run()
	http.DefaultClient.CloseIdleConnections()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, "a stopped engine left goroutines:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// superviseForTest starts an engine, prints its process id, and lives until its standard input ends.
func superviseForTest(dir string) int {
	path, ok := Installed("")
	if !ok {
		fmt.Fprintln(os.Stderr, "no engine")
		return 1
	}
	s, err := Start(context.Background(), Options{DataDir: dir, EnginePath: path, Logger: zerolog.Nop()})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(s.PID())
	_, _ = bufio.NewReader(os.Stdin).ReadByte()
	return 0
}

var engineOnce = sync.OnceValues(func() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	defer cancel()
	return Install(ctx, InstallOptions{Logger: zerolog.New(os.Stderr)})
})

// engine is the real library, fetched when this machine has none yet.
func engine(t testing.TB) string {
	t.Helper()
	path, err := engineOnce()
	if err != nil {
		t.Fatalf("the tests need the ClickHouse engine: %v", err)
	}
	return path
}

// start runs an engine in a directory of the test's own and stops it at the test's end.
func start(t testing.TB, change func(*Options)) *Server {
	t.Helper()
	o := Options{DataDir: t.TempDir(), EnginePath: engine(t), Logger: zerolog.New(zerolog.NewTestWriter(t))}
	if change != nil {
		change(&o)
	}
	s, err := Start(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(context.Background()); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	return s
}

func open(t testing.TB, dsn string) *sql.DB {
	t.Helper()
	o, err := clickhouse.ParseDSN(dsn)
	if err != nil {
		t.Fatal(err)
	}
	db := clickhouse.OpenDB(o)
	t.Cleanup(func() { _ = db.Close() })
	return db
}

func execute(t testing.TB, db *sql.DB, query string, args ...any) {
	t.Helper()
	if _, err := db.ExecContext(t.Context(), query, args...); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
}

func count(t testing.TB, db *sql.DB, query string) (n uint64) {
	t.Helper()
	if err := db.QueryRowContext(t.Context(), query).Scan(&n); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return n
}

// eventually polls for what another process does; there is no event of it to wait for.
func eventually(t testing.TB, what string, within time.Duration, condition func() bool) {
	t.Helper()
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-deadline.C:
			t.Fatalf("not within %s: %s", within, what)
		case <-tick.C:
		}
	}
}
