package history

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas"
	"github.com/tollkeeper/tollkeeper/services/internal/embedclickhouse"
	"github.com/tollkeeper/tollkeeper/services/internal/history/migration"
)

// insert brings a block into all its tables.
func insert(t testing.TB, h *History, b *Block, token string) {
	t.Helper()
	for _, p := range h.Parts(b) {
		if err := p.Insert(t.Context(), token); err != nil {
			t.Fatal(err)
		}
	}
}

// block has the given calls in one frame at a position and time of the ledger.
func block(t testing.TB, sequence uint64, at usage.Micros, producer ksuid.KSUID, calls ...usage.Call) *Block {
	t.Helper()
	var b ledger.Builder
	for i := range calls {
		b.Add(&calls[i])
	}
	var f ledger.Frame
	if err := f.Decode(b.Seal(ledger.Header{Producer: producer, Shard: 3, Number: 17, Gateway: "gw", SealedAt: at})); err != nil {
		t.Fatal(err)
	}
	out := NewBlock()
	out.AppendFrame(&f, Entry{Sequence: sequence, Time: at}, nil)
	return out
}

var noon = usage.At(time.Date(2025, 11, 17, 12, 0, 0, 0, time.UTC))

func TestEveryColumnOfACallComesBack(t *testing.T) {
	t.Parallel()
	h := open(t)
	account := unique(t)
	c := usage.Call{
		Time: noon - 5_123_456, Account: account, KeyID: "key", RequestID: "req", TraceID: [16]byte{1, 2, 3}, SpanID: [8]byte{9}, TraceFlags: 1,
		Method: "POST", Route: "/r", Model: "m", Region: "eu", Status: 200, Duration: 123_456, Flags: usage.Estimated, Source: "src", EventID: "ev", PriceVersion: "p1", Currency: "EUR",
	}
	c.Quantities.Set(usage.InputTokens, 11)
	c.Quantities.Set(usage.OutputTokens, 0)
	c.Quantities.Set(usage.Cost, 1<<52)
	c.Quantities.Set("pages", 4)
	c.Quantities.Set("characters", 0)
	c.Ending = usage.ClientLeft
	refused := usage.Call{Time: noon, Account: account, Status: 402, Code: usage.CreditsDepleted, DecisionID: "dec"}
	producer := ksuid.New()
	insert(t, h, block(t, 7_000_001, noon, producer, c, refused), unique(t))

	rows, err := h.conn.Query(t.Context(), `SELECT toUnixTimestamp64Micro(time), toUnixTimestamp(stream_time), sequence, row, shard, producer, frame, gateway, key_id, request_id, trace_id_hex, span_id_hex,
		method, route, model, region, status, code, admitted, decision_id, duration_micros, flags, is_late, source, event_id, price_version, currency,
		counted_calls, input_tokens, output_tokens, cached_input_tokens, cost, custom, ending, estimated FROM v_calls WHERE account = ? ORDER BY row`, account)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for rows.Next() {
		var (
			at, counted                                                                                              int64
			seconds                                                                                                  uint32
			sequence, frame, duration                                                                                uint64
			row, shard, status                                                                                       uint16
			flags                                                                                                    uint32
			admitted, late, estimated                                                                                bool
			ending                                                                                                   string
			prod, gw, key, req, trace, span, method, route, model, region, code, decision, source, event, price, cur string
			in, out, cached, cost                                                                                    *int64
			custom                                                                                                   map[string]int64
		)
		if err := rows.Scan(&at, &seconds, &sequence, &row, &shard, &prod, &frame, &gw, &key, &req, &trace, &span, &method, &route, &model, &region, &status, &code, &admitted, &decision, &duration, &flags, &late,
			&source, &event, &price, &cur, &counted, &in, &out, &cached, &cost, &custom, &ending, &estimated); err != nil {
			t.Fatal(err)
		}
		null := func(p *int64) string {
			if p == nil {
				return "unknown"
			}
			return fmt.Sprint(*p)
		}
		got = append(got, fmt.Sprint(at-int64(noon), " ", int64(seconds)-int64(noon)/1e6, " ", sequence, " ", row, " ", shard, " ", prod == producer.String(), " ", frame, " ",
			strings.Join([]string{gw, key, req, trace, span, method, route, model, region}, ","), " ", status, " ", code, " ", admitted, " ", decision, " ", duration, " ", flags, " ", late, " ",
			strings.Join([]string{source, event, price, cur}, ","), " ", counted, " ", null(in), " ", null(out), " ", null(cached), " ", null(cost), " ", custom, " ", ending, " ", estimated))
	}
	if err := closeRows(rows, nil); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"-5123456 0 7000001 0 3 true 17 gw,key,req,01020300000000000000000000000000,0900000000000000,POST,/r,m,eu 200  true  123456 2 false src,ev,p1,EUR 1 11 0 unknown 4503599627370496 map[characters:0 pages:4] client_left true",
		"0 0 7000001 1 3 true 17 gw,,,00000000000000000000000000000000,0000000000000000,,,, 402 CREDITS_DEPLETED false dec 0 0 false ,,, 0 unknown unknown unknown unknown map[]  false",
	}
	if len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("got\n%s\nwanted\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestABlockIsSentOncePerToken(t *testing.T) {
	t.Parallel()
	h := open(t)
	account, token := unique(t), unique(t)
	b := block(t, 7_100_001, noon, ksuid.New(), usage.Call{Time: noon, Account: account})
	parts := h.Parts(b)
	if there, err := parts[0].Present(t.Context()); there || err != nil {
		t.Fatalf("before it was sent: %v, %v", there, err)
	}
	for range 3 {
		insert(t, h, b, token)
	}
	for _, p := range parts {
		if there, err := p.Present(t.Context()); !there || err != nil {
			t.Errorf("%s after it was sent: %v, %v", p.Table(), there, err)
		}
	}
	for _, rollup := range []bool{false, true} {
		got, err := h.Totals(t.Context(), TotalsQuery{Accounts: []string{account}, Rollup: rollup})
		if err != nil || got.Admitted != 1 || got.Meters[usage.Calls] != 1 {
			t.Errorf("rollup %v: %+v, %v", rollup, got, err)
		}
	}
	insert(t, h, b, unique(t))
	if _, err := parts[0].Present(t.Context()); !errors.Is(err, ErrTorn) {
		t.Errorf("a block that is there twice: %v", err)
	}
}

func TestQuestionsAreAnswered(t *testing.T) {
	t.Parallel()
	h := open(t)
	account, other := unique(t), unique(t)
	at := noon + 3600_000_000*24 // a day of its own
	tokens := func(n int64, model string, at usage.Micros) usage.Call {
		c := usage.Call{Time: at, Account: account, Model: model}
		c.Quantities.Set(usage.InputTokens, n)
		c.Quantities.Set("pages", n*10)
		return c
	}
	denied := usage.Call{Time: at + 61_000_000, Account: account, Model: "m1", Status: 402, Code: usage.QuotaExceeded, DecisionID: "d"}
	insert(t, h, block(t, 7_200_001, at+120_000_000, ksuid.New(),
		tokens(1, "m1", at), tokens(2, "m2", at+1_000_000), tokens(4, "m1", at+60_000_000), denied, usage.Call{Time: at, Account: other, Model: "m3"}), unique(t))
	from := at.Time()

	t.Run("usage over time", func(t *testing.T) {
		for _, q := range []struct {
			step time.Duration
			m    usage.Meter
			want string
		}{
			{time.Minute, usage.InputTokens, "[{0 3} {1 4}]"}, {time.Hour, usage.InputTokens, "[{0 7}]"},
			{time.Minute, usage.Calls, "[{0 2} {1 1}]"}, {time.Hour, usage.Calls, "[{0 3}]"},
			{time.Minute, "pages", "[{0 30} {1 40}]"}, {time.Hour, "pages", "[{0 70}]"}, {time.Second, usage.InputTokens, "[{0 1} {1 2} {60 4}]"},
		} {
			got, err := h.Usage(t.Context(), UsageQuery{From: from, To: from.Add(time.Hour), Step: q.step, Meter: q.m, Accounts: []string{account}})
			if err != nil || fmt.Sprint(got) != q.want {
				t.Errorf("%s by %s is %v (%v), wanted %s", q.m, q.step, got, err, q.want)
			}
		}
	})
	t.Run("calls by code", func(t *testing.T) {
		for _, step := range []time.Duration{time.Minute, 30 * time.Second, time.Hour} {
			got, err := h.Calls(t.Context(), CallsQuery{From: from, To: from.Add(time.Hour), Step: step, Group: ByCode, Account: account})
			if err != nil {
				t.Fatal(err)
			}
			var admitted, refused, in int64
			for _, p := range got {
				admitted, refused, in = admitted+p.Admitted, refused+p.Refused, in+p.InputTokens
				if (p.Name == "QUOTA_EXCEEDED") != (p.Refused > 0) {
					t.Errorf("%+v", p)
				}
			}
			if admitted != 3 || refused != 1 || in != 7 {
				t.Errorf("by %s: %+v", step, got)
			}
		}
	})
	t.Run("calls of all accounts by model, the rest in one", func(t *testing.T) {
		got, err := h.Calls(t.Context(), CallsQuery{From: from, To: from.Add(time.Hour), Step: time.Minute, Group: ByModel, Top: 1})
		if err != nil {
			t.Fatal(err)
		}
		var m1, rest int64
		for _, p := range got {
			if p.Other {
				rest += p.Admitted
			} else if p.Name == "m1" {
				m1 += p.Admitted
			}
		}
		if m1 != 2 || rest != 2 {
			t.Errorf("%+v", got)
		}
	})
	t.Run("top accounts", func(t *testing.T) {
		got, err := h.TopAccounts(t.Context(), from, from.Add(time.Hour), usage.Calls, 10)
		if err != nil || len(got) != 2 || got[0] != (AccountSum{account, 3, 1, 3}) || got[1] != (AccountSum{other, 1, 0, 1}) {
			t.Errorf("%+v, %v", got, err)
		}
	})
	t.Run("totals", func(t *testing.T) {
		for _, rollup := range []bool{false, true} {
			got, err := h.AccountTotals(t.Context(), TotalsQuery{Accounts: []string{account, other}, Rollup: rollup})
			if err != nil || len(got) != 2 || got[0].Account != account || got[0].Admitted != 3 || got[0].ByCode["QUOTA_EXCEEDED"] != 1 || got[0].Meters["pages"] != 70 || got[0].Meters[usage.Calls] != 3 || got[1].Admitted != 1 || got[0].LastSequence != 7_200_001 {
				t.Errorf("rollup %v: %+v, %v", rollup, got, err)
			}
		}
	})
	t.Run("refusals", func(t *testing.T) {
		got, err := h.Refusals(t.Context(), account, from, 10)
		if err != nil || len(got) != 1 || got[0].Code != usage.QuotaExceeded || got[0].Time != denied.Time || got[0].Row != 3 {
			t.Errorf("%+v, %v", got, err)
		}
	})
	t.Run("a name that looks like SQL is a name", func(t *testing.T) {
		got, err := h.Refusals(t.Context(), `x' OR 1=1 -- \`, from, 10)
		if err != nil || len(got) != 0 {
			t.Errorf("%+v, %v", got, err)
		}
	})
	t.Run("what cannot be asked", func(t *testing.T) {
		_, e1 := h.Calls(t.Context(), CallsQuery{From: from, To: from.Add(time.Hour), Step: time.Minute, Group: "1; DROP TABLE calls"})
		_, e2 := h.Usage(t.Context(), UsageQuery{From: from, To: from.Add(time.Hour), Step: time.Minute, Meter: "a'b"})
		_, e3 := h.Calls(t.Context(), CallsQuery{From: from, To: from.Add(10000 * time.Hour), Step: time.Second, Group: ByCode})
		for _, err := range []error{e1, e2, e3} {
			if !errors.Is(err, ErrQuestion) {
				t.Errorf("%v, wanted is %v", err, ErrQuestion)
			}
		}
	})
	t.Run("the server's state", func(t *testing.T) {
		got, err := h.Status(t.Context())
		if err != nil || got.Version == "" || got.Position < 7_200_001 || len(got.Tables) != 8 {
			t.Errorf("%+v, %v", got, err)
		}
	})
}

func TestAnAnalystReadsTheViewsAndWritesNothing(t *testing.T) {
	t.Parallel()
	h := open(t)
	s := engine(t)
	o, err := clickhouse.ParseDSN(s.AnalystDSN())
	if err != nil {
		t.Fatal(err)
	}
	conn, err := clickhouse.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}()
	for _, v := range []string{"v_calls", "v_usage_hourly", "v_usage_minute", "v_traffic_minute", "v_refusals", "v_decisions", "v_control", "v_corrections", "v_alerts", "v_conservation"} {
		var n uint64
		if err := conn.QueryRow(t.Context(), "SELECT count() FROM (SELECT * FROM "+v+")").Scan(&n); err != nil {
			t.Errorf("%s: %v", v, err)
		}
	}
	if err := conn.Exec(t.Context(), "INSERT INTO schema_migrations (version) VALUES (99)"); err == nil {
		t.Error("an analyst could write")
	}
	if _, err := h.Status(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestThePlainInsertHasEveryColumn(t *testing.T) {
	t.Parallel()
	h := open(t)
	p, err := h.NewPlain(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var b ledger.Builder
	b.Add(&usage.Call{Time: noon, Account: "plain", Status: 200, Ending: usage.UpstreamFailed})
	var f ledger.Frame
	if err := f.Decode(b.Seal(ledger.Header{Producer: ksuid.New(), Shard: 3, Number: 17, SealedAt: noon})); err != nil {
		t.Fatal(err)
	}
	p.Load(&f, Entry{Sequence: 1, Time: noon})
	if err := p.Insert(t.Context(), unique(t), 10); err != nil {
		t.Fatal(err)
	}
	var account string
	var ending uint8
	if err := h.conn.QueryRow(t.Context(), "SELECT account, ending FROM "+plainTable).Scan(&account, &ending); err != nil || account != "plain" || ending != 3 {
		t.Errorf("%q, %d, %v", account, ending, err)
	}
	if err := p.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestSeveralServicesMayMigrateAtOnce(t *testing.T) {
	t.Parallel()
	h := open(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := h.Migrate(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// Who only reads waits for the tables, says how far they are, and does not make them.
func TestWhoOnlyReadsWaitsForTheTables(t *testing.T) {
	t.Parallel()
	h := open(t)
	if err := h.Migrated(t.Context()); err != nil {
		t.Errorf("all is applied: %v", err)
	}
	all, err := migration.Read(schemas.ClickHouse)
	if err != nil {
		t.Fatal(err)
	}
	some := map[uint32]migration.Migration{}
	for _, m := range all[:2] {
		some[m.Version] = m
	}
	if err := compareMigrations(all, some); !errors.Is(err, ErrNotMigrated) || !strings.Contains(err.Error(), fmt.Sprintf("version 2 of %d", len(all))) {
		t.Errorf("two are applied: %v", err)
	}
	newer := map[uint32]migration.Migration{99: {Version: 99}}
	for _, m := range all {
		newer[m.Version] = m
	}
	if err := compareMigrations(all, newer); err != nil {
		t.Errorf("a newer historian: %v", err)
	}
	other := newer[1]
	other.Checksum = "another"
	newer[1] = other
	var refused *MigrationError
	if err := compareMigrations(all, newer); !errors.As(err, &refused) || refused.Version != 1 {
		t.Errorf("other tables: %v", err)
	}
	// Neither the database nor the table is there.
	o := h.o
	o.Database = "nobody_made_this"
	empty := &History{o: o}
	if empty.conn, err = clickhouse.Open(empty.options(o.Database)); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := empty.conn.Close(); err != nil {
			t.Error(err)
		}
	}()
	if err := empty.Migrated(t.Context()); !errors.Is(err, ErrNotMigrated) || !strings.Contains(err.Error(), "version 0") {
		t.Errorf("no database: %v", err)
	}
}

func TestAMigrationIsNeverChanged(t *testing.T) {
	t.Parallel()
	h := open(t)
	all, err := migration.Read(schemas.ClickHouse)
	if err != nil {
		t.Fatal(err)
	}
	changed := append([]migration.Migration(nil), all...)
	changed[1].Checksum = "another"
	var refused *MigrationError
	if err := h.migrate(t.Context(), changed); !errors.As(err, &refused) || refused.Version != 2 {
		t.Errorf("a changed migration gave %v", err)
	}
	if err := h.migrate(t.Context(), all[:2]); !errors.As(err, &refused) || refused.Version < 3 {
		t.Errorf("a newer database gave %v", err)
	}
}

func TestMigrationsCanBeRepeated(t *testing.T) {
	t.Parallel()
	all, err := migration.Read(schemas.ClickHouse)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		for _, s := range m.Statements {
			if up := strings.ToUpper(s); !strings.Contains(up, "IF NOT EXISTS") && !strings.Contains(up, "IF EXISTS") && !strings.Contains(up, "OR REPLACE") {
				t.Errorf("%04d_%s: a statement can't be repeated: %.60s", m.Version, m.Name, s)
			}
		}
	}
}

func TestWhatCannotBeMendedByWaitingIsSaidAtOnce(t *testing.T) {
	t.Parallel()
	s := engine(t)
	for name, o := range map[string]Options{
		"no address":     {},
		"no port":        {Addrs: []string{"127.0.0.1"}},
		"a bad database": {Addrs: []string{s.Addr()}, Database: "a b"},
		"a bad password": {Addrs: []string{s.Addr()}, User: embedclickhouse.ServiceUser, Password: "wrong-and-secret"},
	} {
		o.Logger = zerolog.Nop()
		h, err := Open(t.Context(), o)
		if err == nil {
			t.Errorf("%s: accepted", name)
			_ = h.Close()
			continue
		}
		if strings.Contains(err.Error(), "wrong-and-secret") {
			t.Errorf("%s: the error holds the password", name)
		}
	}
}

// said notes what readiness hears.
type said struct {
	mu      sync.Mutex
	reasons []string
}

func (s *said) OK() {}
func (s *said) NotReady(reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reasons = append(s.reasons, reason)
}

func TestAServerThatIsAwayIsWaitedFor(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
	defer cancel()
	var ready said
	_, err := Open(ctx, Options{Addrs: []string{"127.0.0.1:1"}, Logger: zerolog.Nop(), Readiness: &ready})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting ended with %v", err)
	}
	ready.mu.Lock()
	defer ready.mu.Unlock()
	if len(ready.reasons) == 0 || !strings.Contains(ready.reasons[0], "127.0.0.1:1") {
		t.Errorf("readiness heard %v", ready.reasons)
	}
}
