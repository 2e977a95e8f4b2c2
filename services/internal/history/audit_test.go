package history

import (
	"math/rand/v2"
	"testing"

	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"
	"github.com/google/go-cmp/cmp"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/audit"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func TestClickHouseMixesAsTheAuditDoes(t *testing.T) {
	t.Parallel()
	h := open(t)
	values := []uint64{0, 1, 2, 1 << 31, 1 << 32, 1 << 63, 1<<64 - 1}
	for range 100 {
		values = append(values, rand.Uint64())
	}
	var got []uint64
	if err := h.read(t.Context(), "SELECT arrayMap(x -> intHash64(x), {values:Array(UInt64)})", func(rows driver.Rows) error { return rows.Scan(&got) }, named("values", values)); err != nil {
		t.Fatal(err)
	}
	for i, x := range values {
		if got[i] != audit.Mix(x) {
			t.Errorf("intHash64(%d) is %d, Mix gives %d", x, got[i], audit.Mix(x))
		}
	}
}

// TestTheAuditAndClickHouseComeToTheSameTallies, calls of producers and foreign
// events, admitted and refused, with every meter and accounts of any name.
func TestTheAuditAndClickHouseComeToTheSameTallies(t *testing.T) {
	t.Parallel()
	h := open(t)
	prefix := unique(t)
	names := []string{prefix + "-a", prefix + "-ü ✓", prefix + `-'"\`}
	producer := ksuid.New()
	hash := audit.ProducerHash(producer.String())
	const sequence = 90_000_000
	want := audit.NewCells(1000)
	out := NewBlock()
	for n := range uint64(5) {
		header := ledger.Header{Producer: producer, Shard: 3, Number: n + 1, SealedAt: noon + usage.Micros(n)*40_000_000}
		if n == 4 {
			header = ledger.Header{Shard: 3} // foreign events, without a frame's identity
		}
		entry := Entry{Sequence: sequence + n, Time: noon + usage.Micros(n)*1_000_000}
		var b ledger.Builder
		for i := range 7 {
			c := usage.Call{Time: noon, Account: names[i%len(names)], Source: "src ✓", EventID: string(rune('a' + i))}
			if i%2 == 0 && n < 4 {
				c.Source, c.EventID = "", ""
			}
			if i == 3 {
				c.Code = usage.QuotaExceeded
			}
			if i == 4 {
				c.Quantities.Set(usage.Calls, 7)
			}
			for k, m := range usage.BuiltInMeters() {
				if (i+k)%3 == 0 && m != usage.Calls {
					c.Quantities.Set(m, int64(i*100+k))
				}
			}
			c.Quantities.Set("pages", int64(i))
			if i > 4 {
				c.Quantities.Set("characters", 10)
			}
			b.Add(&c)
			row := audit.RowHash(audit.FrameHash(hash, 3, n+1), i)
			if n == 4 {
				row = audit.ForeignHash([]byte(c.Account), []byte(c.Source), []byte(c.EventID))
			}
			want.At(audit.FrameMinute(header.SealedAt, entry.Time), []byte(c.Account)).Add(&c, row)
		}
		var f ledger.Frame
		if err := f.Decode(b.Seal(header)); err != nil {
			t.Fatal(err)
		}
		out.AppendFrame(&f, entry, nil)
	}
	insert(t, h, out, unique(t))
	q := AuditQuery{From: sequence, To: sequence + 4, Since: noon, Until: noon + 4_000_000, Limit: 1000}
	got, err := h.Audit(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]audit.Difference(nil), audit.Compare(want, got)); diff != "" || want.Len() < 6 {
		t.Errorf("%d cells: %s", want.Len(), diff)
	}
	q.Accounts = names[1:2]
	if got, err = h.Audit(t.Context(), q); err != nil || got.Len() != 3 {
		t.Errorf("of one account: %d cells, %v", got.Len(), err)
	}
	q.Accounts, q.From = nil, sequence+1
	if got, err = h.Audit(t.Context(), q); err != nil {
		t.Fatal(err)
	}
	first := audit.MinuteOf(noon)
	for _, d := range audit.Compare(want, got) {
		if d.Kind != audit.Gap || d.Minute != first {
			t.Errorf("without the first frame: %+v", d)
		}
	}
}

// BenchmarkAuditQuery is what the server needs for the tallies of a block of
// 100,000 calls of 1,000 accounts.
func BenchmarkAuditQuery(b *testing.B) {
	h := open(b)
	out := NewBlock()
	producer := ksuid.New()
	name := unique(b)
	const sequence = 95_000_000
	for n := range uint64(200) {
		var f ledger.Frame
		var builder ledger.Builder
		for i := range 500 {
			c := usage.Call{Time: noon, Account: name + string(rune('a'+i%1000/40)) + string(rune('a'+i%40)) + string(rune('a'+n%2)), Status: 200}
			c.Quantities.Set(usage.InputTokens, int64(i))
			builder.Add(&c)
		}
		if err := f.Decode(builder.Seal(ledger.Header{Producer: producer, Number: n + 1, SealedAt: noon})); err != nil {
			b.Fatal(err)
		}
		out.AppendFrame(&f, Entry{Sequence: sequence + n, Time: noon}, nil)
	}
	insert(b, h, out, unique(b))
	// Other processes' work is not ours: the server's own account of its time.
	cpu := func() (micros uint64) {
		if err := h.conn.QueryRow(b.Context(), "SELECT sum(value) FROM system.events WHERE event = 'OSCPUVirtualTimeMicroseconds'").Scan(&micros); err != nil {
			b.Fatal(err)
		}
		return micros
	}
	before := cpu()
	for b.Loop() {
		got, err := h.Audit(b.Context(), AuditQuery{From: sequence, To: sequence + 199, Since: noon, Until: noon, Limit: 100_000})
		if err != nil || got.Len() < 500 {
			b.Fatal(got.Len(), err)
		}
	}
	b.ReportMetric(float64(cpu()-before)*1000/float64(b.N)/100_000, "cpu-ns/call")
}
