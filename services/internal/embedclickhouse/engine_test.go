package embedclickhouse

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/rs/zerolog"
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
	db := open(t, s.DSN())
	for _, setting := range []string{"fsync_after_insert", "fsync_part_directory"} {
		if got := count(t, db, "SELECT toUInt64(value) FROM system.merge_tree_settings WHERE name = '"+setting+"'"); got != 1 {
			t.Errorf("%s is %d: an acknowledged block would not survive a power loss", setting, got)
		}
	}
}

func TestAKilledEngineComesBackWithItsRows(t *testing.T) {
	t.Parallel()
	changes := make(chan StateChange, 16)
	s := start(t, func(o *Options) { o.OnStateChange = func(c StateChange) { changes <- c } })
	addr, httpAddr := s.Addr(), s.HTTPAddr()
	db := open(t, s.DSN())
	execute(t, db, "CREATE TABLE calls (n UInt64) ENGINE = MergeTree ORDER BY n")
	execute(t, db, "INSERT INTO calls SELECT number FROM numbers(1000)")
	expect(t, changes, StateReady)
	killed := s.PID()
	kill(t, killed)
	if down := expect(t, changes, StateDown); down.Err == nil || down.RetryIn <= 0 {
		t.Errorf("down is told as %+v, want a reason and when it is tried again", down)
	}
	expect(t, changes, StateStarting)
	if ready := expect(t, changes, StateReady); ready.PID == killed || ready.Restarts != 1 {
		t.Errorf("ready again is told as %+v, killed was %d", ready, killed)
	}
	if s.Addr() != addr || s.HTTPAddr() != httpAddr {
		t.Errorf("addresses moved from %s, %s to %s, %s", addr, httpAddr, s.Addr(), s.HTTPAddr())
	}
	// The driver's pool may still hand out a connection of the dead engine once.
	fresh := open(t, s.DSN())
	if got := count(t, fresh, "SELECT count() FROM calls"); got != 1000 {
		t.Errorf("%d rows after the kill, want 1000", got)
	}
}

func TestAnInterruptFromTheTerminalIsNotForTheEngine(t *testing.T) {
	t.Parallel()
	s := start(t, nil)
	pid := s.PID()
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE} {
		if err := syscall.Kill(pid, sig); err != nil {
			t.Fatal(err)
		}
	}
	if got := count(t, open(t, s.DSN()), "SELECT 1"); got != 1 || s.PID() != pid {
		t.Errorf("after the signals the answer is %d and the process %d, want 1 and %d", got, s.PID(), pid)
	}
}

func TestARetriedBlockFillsTableAndViewOnce(t *testing.T) {
	t.Parallel()
	s := start(t, nil)
	db := open(t, s.DSN())
	const window = " SETTINGS non_replicated_deduplication_window = 100"
	execute(t, db, "CREATE TABLE calls (account String, n UInt64) ENGINE = MergeTree ORDER BY account"+window)
	execute(t, db, "CREATE TABLE totals (account String, n UInt64) ENGINE = SummingMergeTree ORDER BY account"+window)
	execute(t, db, "CREATE MATERIALIZED VIEW totals_of_calls TO totals AS SELECT account, sum(n) AS n FROM calls GROUP BY account")
	insert := func(token string) {
		ctx := clickhouse.Context(t.Context(), clickhouse.WithSettings(clickhouse.Settings{
			"insert_deduplication_token": token, "deduplicate_blocks_in_dependent_materialized_views": 1}))
		if _, err := db.ExecContext(ctx, "INSERT INTO calls SELECT 'acme', number FROM numbers(100)"); err != nil {
			t.Fatal(err)
		}
	}
	check := func(when string, want uint64) {
		t.Helper()
		if got := count(t, db, "SELECT count() FROM calls"); got != want*100 {
			t.Errorf("%s: %d rows in the table, want %d", when, got, want*100)
		}
		if got := count(t, db, "SELECT sum(n) FROM totals"); got != want*4950 {
			t.Errorf("%s: %d summed by the view, want %d", when, got, want*4950)
		}
	}
	insert("block-1")
	insert("block-1")
	check("a block and its retry", 1)
	kill(t, s.PID())
	eventually(t, "the engine is back", 20*time.Second, func() bool { return s.Restarts() == 1 && s.State() == StateReady })
	db = open(t, s.DSN())
	insert("block-1")
	check("a retry after a kill", 1)
	insert("block-2")
	check("another block", 2)
}

func TestKillsUnderLoadLoseAndDoubleNothing(t *testing.T) {
	t.Parallel()
	const blocks, rows, kills = 60, 500, 4
	s := start(t, nil)
	db := open(t, s.DSN())
	execute(t, db, "CREATE TABLE calls (block UInt64, n UInt64) ENGINE = MergeTree ORDER BY (block, n) SETTINGS non_replicated_deduplication_window = 1000")
	for block := range blocks {
		if block%(blocks/kills) == blocks/kills/2 {
			// Process 0, while the engine is not back yet, would be all of us.
			pid := 0
			eventually(t, "there is an engine to kill", 30*time.Second, func() bool { pid = s.PID(); return pid > 0 })
			// In the middle of an insert as often as between two.
			go func() { _ = syscall.Kill(pid, syscall.SIGKILL) }()
		}
		ctx := clickhouse.Context(t.Context(), clickhouse.WithSettings(clickhouse.Settings{
			"insert_deduplication_token": fmt.Sprintf("block-%d", block)}))
		eventually(t, "a block is acknowledged", 30*time.Second, func() bool {
			_, err := db.ExecContext(ctx, fmt.Sprintf("INSERT INTO calls SELECT %d, number FROM numbers(%d)", block, rows))
			return err == nil
		})
	}
	if got := count(t, db, "SELECT count() FROM calls"); got != blocks*rows {
		t.Errorf("%d rows, want %d", got, blocks*rows)
	}
	if got := count(t, db, "SELECT uniqExact(block, n) FROM calls"); got != blocks*rows {
		t.Errorf("%d distinct rows, want %d", got, blocks*rows)
	}
	if s.Restarts() != kills {
		t.Errorf("%d restarts, want %d", s.Restarts(), kills)
	}
}

func TestTheServicesUserMayMakeEverySchemaWeUse(t *testing.T) {
	t.Parallel()
	s := start(t, func(o *Options) { o.DataDir = filepath.Join(o.DataDir, "a b & 'ü'") })
	db := open(t, s.DSN())
	for _, statement := range []string{
		"CREATE TABLE calls (at DateTime64(3, 'UTC') CODEC(Delta, ZSTD), account LowCardinality(String), n UInt64, attributes JSON, INDEX i n TYPE minmax, PROJECTION p (SELECT account, sum(n) GROUP BY account)) ENGINE = MergeTree PARTITION BY toYYYYMM(at) ORDER BY (account, at) TTL toDateTime(at) + INTERVAL 400 DAY",
		"CREATE TABLE rollup (account String, calls AggregateFunction(count), n SimpleAggregateFunction(sum, UInt64)) ENGINE = AggregatingMergeTree ORDER BY account",
		"CREATE MATERIALIZED VIEW rollup_of_calls TO rollup AS SELECT account, countState() AS calls, sum(n) AS n FROM calls GROUP BY account",
		"CREATE MATERIALIZED VIEW refreshed REFRESH EVERY 1 HOUR (account String, n UInt64) ENGINE = MergeTree ORDER BY account AS SELECT account, sum(n) AS n FROM calls GROUP BY account",
		"CREATE VIEW readable AS SELECT account, countMerge(calls) AS calls FROM rollup GROUP BY account",
		"CREATE TABLE accounts (id UInt64, name String) ENGINE = ReplacingMergeTree ORDER BY id",
		"CREATE DICTIONARY names (id UInt64, name String) PRIMARY KEY id SOURCE(CLICKHOUSE(DB 'tollkeeper' TABLE 'accounts' USER '" + ServiceUser + "' PASSWORD '" + s.Credentials().ServicePassword + "')) LIFETIME(60) LAYOUT(HASHED())",
		"INSERT INTO accounts VALUES (1, 'acme')",
		"INSERT INTO calls (at, account, n, attributes) VALUES (now64(), 'acme', 3, '{\"a\":1}')",
		"ALTER TABLE calls ADD COLUMN model LowCardinality(String) DEFAULT ''",
		"ALTER TABLE calls MODIFY TTL toDateTime(at) + INTERVAL 30 DAY",
		"CREATE TABLE calls_new AS calls",
		"INSERT INTO calls_new SELECT * FROM calls",
		"EXCHANGE TABLES calls AND calls_new",
		"RENAME TABLE calls_new TO calls_old",
		"DELETE FROM accounts WHERE id = 0",
		"OPTIMIZE TABLE calls FINAL",
		"ALTER TABLE calls_old DROP PARTITION ID 'all'",
		"DROP TABLE calls_old",
	} {
		execute(t, db, statement)
	}
	if got := count(t, db, "SELECT toUInt64(calls) FROM readable WHERE account = 'acme'"); got != 1 {
		t.Errorf("the view counts %d calls, want 1", got)
	}
	if got := count(t, db, "SELECT toUInt64(dictGet('tollkeeper.names', 'name', toUInt64(1)) = 'acme')"); got != 1 {
		t.Error("the dictionary does not know the account")
	}
}

func TestAbuseOfThePortsDoesNotEndTheEngine(t *testing.T) {
	t.Parallel()
	s := start(t, nil)
	pid := s.PID()
	db := open(t, s.DSN())
	for range 20 {
		for _, addr := range []string{s.Addr(), s.HTTPAddr()} {
			for _, bytes := range []string{"", "\x00", strings.Repeat("garbage\r\n\r\n", 100),
				"POST /?query=INSERT HTTP/1.1\r\nContent-Length: 100\r\n\r\nhalf", "\x00\x0aClickHouse go\x01\x02"} {
				sendAndReset(t, addr, bytes)
			}
		}
		if got := count(t, db, "SELECT 1"); got != 1 {
			t.Fatal("no answer under abuse")
		}
	}
	if s.PID() != pid || s.Restarts() != 0 {
		t.Errorf("the engine was restarted %d times", s.Restarts())
	}
}

// sendAndReset closes with a TCP reset, which is what ended a non-interactive engine.
func sendAndReset(t *testing.T, addr, bytes string) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, bytes); err != nil {
		t.Fatal(err)
	}
	if err := conn.(*net.TCPConn).SetLinger(0); err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
}

func TestATakenPortIsNamed(t *testing.T) {
	t.Parallel()
	path := engine(t)
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close() }()
	port := other.Addr().(*net.TCPAddr).Port
	for name, ports := range map[string][2]int{"native": {port, 0}, "http": {0, port}} {
		_, err = Start(t.Context(), Options{DataDir: t.TempDir(), EnginePath: path, TCPPort: ports[0], HTTPPort: ports[1], Logger: zerolog.Nop()})
		if !errors.Is(err, ErrAddressInUse) || !strings.Contains(err.Error(), other.Addr().String()) {
			t.Errorf("%s: error is %v, want %v naming %s", name, err, ErrAddressInUse, other.Addr())
		}
	}
}

func TestAPortTakenWhileTheEngineWasDownIsWaitedFor(t *testing.T) {
	t.Parallel()
	changes := make(chan StateChange, 64)
	s := start(t, func(o *Options) { o.OnStateChange = func(c StateChange) { changes <- c } })
	expect(t, changes, StateReady)
	kill(t, s.PID())
	expect(t, changes, StateDown)
	// The engine's first way back takes longer than this.
	thief, err := net.Listen("tcp", s.HTTPAddr())
	if err != nil {
		t.Fatal(err)
	}
	for {
		if down := expect(t, changes, StateDown); errors.Is(down.Err, ErrAddressInUse) {
			if !strings.Contains(down.Err.Error(), s.HTTPAddr()) {
				t.Errorf("the reason is %v, want it to name %s", down.Err, s.HTTPAddr())
			}
			break
		}
	}
	if err := thief.Close(); err != nil {
		t.Fatal(err)
	}
	expect(t, changes, StateReady)
}

func TestStopWhileTheEngineIsDownIsQuick(t *testing.T) {
	t.Parallel()
	changes := make(chan StateChange, 16)
	s := start(t, func(o *Options) { o.OnStateChange = func(c StateChange) { changes <- c } })
	expect(t, changes, StateReady)
	kill(t, s.PID())
	expect(t, changes, StateDown)
	assertStopsWithin(t, s, 2*time.Second)
}

func TestTheEngineEndsWithItsParent(t *testing.T) {
	t.Parallel()
	engine(t)
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	parent := osexec.Command(self)
	parent.Env = append(os.Environ(), supervisorMarker+"="+dir)
	parent.Stderr = os.Stderr
	stdin, err := parent.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stdin.Close() }()
	stdout, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	line, readErr := bufio.NewReader(stdout).ReadString('\n')
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil || pid <= 0 {
		_ = parent.Process.Kill()
		t.Fatalf("the parent said %q (%v)", line, readErr)
	}
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = parent.Wait()
	eventually(t, "the engine ends after its parent", 2*time.Second, func() bool { return gone(pid) })
	// What the dead one held is free again.
	start(t, func(o *Options) { o.DataDir = dir })
}

func TestStopIsQuickWithClientsConnected(t *testing.T) {
	t.Parallel()
	s := start(t, nil)
	native, web := open(t, s.DSN()), open(t, s.HTTPDSN())
	count(t, native, "SELECT 1")
	count(t, web, "SELECT 1")
	idle, err := net.Dial("tcp", s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = idle.Close() }()
	running := make(chan error, 1)
	go func() {
		var n uint64
		running <- native.QueryRowContext(context.Background(),
			"SELECT count() FROM numbers(100) WHERE sleepEachRow(0.1) = 0 SETTINGS max_block_size = 1").Scan(&n)
	}()
	eventually(t, "the long query runs", 5*time.Second, func() bool {
		return count(t, native, "SELECT count() FROM system.processes WHERE query LIKE '%sleepEachRow%' AND query NOT LIKE '%processes%'") == 1
	})
	pid := s.PID()
	assertStopsWithin(t, s, 2*time.Second)
	if !gone(pid) {
		t.Errorf("process %d is still there", pid)
	}
	if err := <-running; err == nil {
		t.Error("the query that was running ended without an error")
	}
	if s.State() != StateStopped || s.PID() != 0 {
		t.Errorf("state is %s with process %d, want stopped and 0", s.State(), s.PID())
	}
}

func TestOneEngineHoldsADataDirectory(t *testing.T) {
	t.Parallel()
	s := start(t, nil)
	_, err := Start(t.Context(), Options{DataDir: s.options.DataDir, EnginePath: engine(t), Logger: zerolog.Nop()})
	if !errors.Is(err, ErrDataDirInUse) || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("error is %v, want %v naming process %d", err, ErrDataDirInUse, os.Getpid())
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	start(t, func(o *Options) { o.DataDir = s.options.DataDir })
}

func TestReadersReadAndNothingElse(t *testing.T) {
	t.Parallel()
	s := start(t, nil)
	db := open(t, s.DSN())
	execute(t, db, "CREATE TABLE calls (n UInt64) ENGINE = MergeTree ORDER BY n")
	execute(t, db, "INSERT INTO calls VALUES (7)")
	analyst := url.UserPassword(AnalystUser, s.Credentials().AnalystPassword)
	for query, want := range map[string]string{
		"SELECT n FROM tollkeeper.calls":                                     "7",
		"SHOW TABLES FROM tollkeeper":                                        "calls",
		"SELECT count() > 0 FROM system.parts WHERE database = 'tollkeeper'": "1",
	} {
		if status, body := ask(t, s, analyst, query); status != http.StatusOK || body != want {
			t.Errorf("%s gives %d %q, want %q", query, status, body, want)
		}
		if status, body := ask(t, s, nil, query); status == http.StatusOK {
			t.Errorf("without a password: %s gives %q", query, body)
		}
	}
	for name, user := range map[string]*url.Userinfo{"analyst": analyst, "without a password": nil} {
		for _, query := range []string{
			"INSERT INTO tollkeeper.calls VALUES (8)", "DROP TABLE tollkeeper.calls", "TRUNCATE TABLE tollkeeper.calls",
			"CREATE TABLE tollkeeper.x (n UInt64) ENGINE = MergeTree ORDER BY n", "CREATE DATABASE x",
			"ALTER TABLE tollkeeper.calls DELETE WHERE 1", "OPTIMIZE TABLE tollkeeper.calls",
			"SELECT * FROM file('users.xml', LineAsString)", "SELECT * FROM url('http://" + s.HTTPAddr() + "/ping', LineAsString)",
			"SELECT * FROM remote('" + s.Addr() + "', 'system', 'one')", "SELECT * FROM executable('id', LineAsString)",
			"INSERT INTO FUNCTION file('x', 'CSV', 'n UInt64') VALUES (1)",
			"SELECT query FROM system.processes", "SELECT * FROM system.users", "KILL QUERY WHERE 1", "SYSTEM SHUTDOWN",
			"SYSTEM STOP MERGES tollkeeper.calls", "SYSTEM RELOAD CONFIG", "CREATE USER x", "GRANT ALL ON *.* TO " + AnalystUser,
			"SELECT 1 SETTINGS max_execution_time = 0", "SELECT 1 SETTINGS max_memory_usage = 0", "SELECT addressToSymbol(1)",
			"BACKUP TABLE tollkeeper.calls TO File('x')",
		} {
			if status, body := ask(t, s, user, query); status == http.StatusOK {
				t.Errorf("%s may: %s (gives %q)", name, query, body)
			}
		}
	}
	for _, query := range []string{"SELECT * FROM file('users.xml', LineAsString)", "CREATE TABLE default.x (n UInt64) ENGINE = MergeTree ORDER BY n",
		"CREATE TABLE x (n UInt64) ENGINE = File(CSV)", "CREATE USER x", "DROP DATABASE default"} {
		if _, err := db.ExecContext(t.Context(), query); err == nil {
			t.Errorf("the service's user may: %s", query)
		}
	}
	for _, user := range []*url.Userinfo{url.UserPassword(AnalystUser, ""), url.UserPassword(ServiceUser, "wrong")} {
		if status, _ := ask(t, s, user, "SELECT 1"); status != http.StatusForbidden && status != http.StatusUnauthorized {
			t.Errorf("%s with a wrong password gets %d", user.Username(), status)
		}
	}
}

// The engine itself begins as the user without a password. Its quota is used up by what
// that beginning asks for: any page or program of this machine could read all accounts,
// and close the ports.
func TestTheUserWithoutAPasswordCanDoNothing(t *testing.T) {
	t.Parallel()
	s := start(t, nil)
	execute(t, open(t, s.DSN()), "CREATE TABLE calls (n UInt64) ENGINE = MergeTree ORDER BY n")
	pid := s.PID()
	for _, query := range []string{"SYSTEM STOP LISTEN TCP", "SYSTEM START LISTEN TCP", "SELECT 1", "SELECT * FROM tollkeeper.calls", "SHOW DATABASES", "SELECT file('users.xml')", "SELECT file('" + s.options.DataDir + "/" + credentialsName + "')",
		"SELECT * FROM system.tables", "SELECT * FROM system.one", "SET max_threads = 1", "DESCRIBE TABLE tollkeeper.calls", "EXISTS tollkeeper.calls", "CREATE TEMPORARY TABLE x (n UInt64)", "SELECT version()", "SELECT 1 SETTINGS max_ast_elements = 100", "WITH 1 AS x SELECT x", "EXPLAIN SELECT 1", "(SELECT 1)", "SELECT 1 UNION ALL SELECT 2"} {
		for _, user := range []*url.Userinfo{nil, url.UserPassword("default", "")} {
			if status, body := ask(t, s, user, query); status == http.StatusOK {
				t.Errorf("%s gives %.100q", query, body)
			}
		}
	}
	if got := count(t, open(t, s.DSN()), "SELECT 1"); got != 1 || s.PID() != pid || s.Restarts() != 0 {
		t.Errorf("the engine has restarted %d times", s.Restarts())
	}
}

func TestPasswordsAreKeptPrivateAndGivenOnesWin(t *testing.T) {
	t.Parallel()
	first := start(t, nil)
	dir, generated := first.options.DataDir, first.Credentials()
	for _, name := range []string{credentialsName, usersName, configName, engineOutName, storeName} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %o: others may read it", name, info.Mode().Perm())
		}
	}
	users, err := os.ReadFile(filepath.Join(dir, usersName))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(users), generated.ServicePassword) {
		t.Error("users.xml holds a password in the clear")
	}
	if err := first.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	second := start(t, func(o *Options) { o.DataDir = dir })
	if second.Credentials() != generated {
		t.Error("the generated passwords changed at the second start")
	}
	if err := second.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	third := start(t, func(o *Options) {
		o.DataDir = dir
		o.Credentials = Credentials{ServicePassword: `p<&>"'/@: ü`, AnalystPassword: "a"}
	})
	if got := count(t, open(t, third.DSN()), "SELECT 1"); got != 1 {
		t.Errorf("the answer is %d, want 1", got)
	}
}

func TestStartRefusesWhatWouldBeUnsafeOrWrong(t *testing.T) {
	t.Parallel()
	path := engine(t)
	for name, test := range map[string]struct {
		change func(*Options)
		want   error
		hint   string
	}{
		"open to the network without passwords": {func(o *Options) { o.Host = "0.0.0.0" }, ErrCredentialsRequired, "0.0.0.0"},
		"open to IPv6 with one password": {func(o *Options) {
			o.Host = "::"
			o.Credentials.ServicePassword = "x"
		}, ErrCredentialsRequired, AnalystUser},
		"a host name":       {func(o *Options) { o.Host = "db.example" }, nil, "IP address"},
		"a port too high":   {func(o *Options) { o.TCPPort = 70000 }, nil, "70000"},
		"a wrong log level": {func(o *Options) { o.LogLevel = "loud" }, nil, "loud"},
		"no data directory": {func(o *Options) { o.DataDir = "" }, nil, "data directory"},
		"no engine":         {func(o *Options) { o.EnginePath = filepath.Join(o.DataDir, "none.so") }, ErrNotReady, "none.so"},
		"damaged passwords": {func(o *Options) {
			if err := os.WriteFile(filepath.Join(o.DataDir, credentialsName), []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, nil, credentialsName},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := Options{DataDir: t.TempDir(), EnginePath: path, Logger: zerolog.Nop()}
			test.change(&o)
			s, err := Start(t.Context(), o)
			if s != nil {
				_ = s.Stop(context.Background())
			}
			if err == nil || (test.want != nil && !errors.Is(err, test.want)) || !strings.Contains(err.Error(), test.hint) {
				t.Errorf("error is %v, want %v with %q", err, test.want, test.hint)
			}
		})
	}
}

func TestOpenToTheNetworkStillHoldsTheUserWithoutPasswordToLoopback(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := writeConfig(Options{DataDir: dir, LogLevel: "warning"}, Credentials{ServicePassword: "a", AnalystPassword: "b"}, false); err != nil {
		t.Fatal(err)
	}
	users, err := os.ReadFile(filepath.Join(dir, usersName))
	if err != nil {
		t.Fatal(err)
	}
	_, guest, found := strings.Cut(string(users), "<default>\n      <password>")
	guest, _, _ = strings.Cut(guest, "</default>")
	if !found || strings.Contains(guest, "::/0") || !strings.Contains(guest, "<ip>127.0.0.0/8</ip><ip>::1</ip>") {
		t.Errorf("the user without a password is not held to loopback: %s", guest)
	}
	if n := strings.Count(string(users), "<ip>::/0</ip>"); n != 2 {
		t.Errorf("%d users may come from the network, want the two with a password", n)
	}
	for addr, want := range map[string]string{"0.0.0.0:9000": "127.0.0.1:9000", "[::]:9000": "[::1]:9000", "127.0.0.1:9000": "127.0.0.1:9000"} {
		if got := dialable(netip.MustParseAddrPort(addr)); got != want {
			t.Errorf("%s is reached at %s, want %s", addr, got, want)
		}
	}
}

func ask(t *testing.T, s *Server, user *url.Userinfo, query string) (status int, body string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+s.HTTPAddr()+"/", strings.NewReader(query))
	if err != nil {
		t.Fatal(err)
	}
	if user != nil {
		password, _ := user.Password()
		request.SetBasicAuth(user.Username(), password)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	raw, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, strings.TrimSpace(string(raw))
}

func expect(t *testing.T, changes <-chan StateChange, want State) StateChange {
	t.Helper()
	timeout := time.NewTimer(30 * time.Second)
	defer timeout.Stop()
	for {
		select {
		case change := <-changes:
			if change.State == want {
				return change
			}
		case <-timeout.C:
			t.Fatalf("the engine did not become %s", want)
		}
	}
}

func assertStopsWithin(t *testing.T, s *Server, limit time.Duration) {
	t.Helper()
	begun := time.Now()
	if err := s.Stop(context.Background()); err != nil {
		t.Errorf("stop: %v", err)
	}
	if took := time.Since(begun); took > limit {
		t.Errorf("stop took %s, want under %s", took, limit)
	} else {
		t.Logf("stopped in %s", took)
	}
}

func kill(t *testing.T, pid int) {
	t.Helper()
	if pid <= 0 {
		t.Fatalf("there is no engine to kill (process %d)", pid)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// gone also holds for a process that is dead but not reaped by whoever inherited it.
func gone(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return strings.HasPrefix(rest, "Z")
}
