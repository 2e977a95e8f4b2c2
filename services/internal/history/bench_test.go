package history

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ClickHouse/clickhouse-go/v2"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

func rowsOf(tb testing.TB, frames []trafficFrame) []callRow {
	tb.Helper()
	var out []callRow
	var f ledger.Frame
	for _, fr := range frames {
		if err := f.Decode(fr.data); err != nil {
			tb.Fatal(err)
		}
		for i := range f.N {
			out = append(out, plainRow(&f, i, fr.entry))
		}
	}
	return out
}

// BenchmarkInsert puts the historian's way of inserting, from decoded frames to
// the server's answer with both rollups, beside clickhouse-go's own batch insert
// of the same rows, already in memory, into a table of the same shape. One
// iteration is a block of 100,000 rows each way, in turn; the figures are medians
// in rows a second, and the ratio of the medians.
func BenchmarkInsert(b *testing.B) {
	for _, ids := range []bool{false, true} {
		b.Run(fmt.Sprintf("ids=%v", ids), func(b *testing.B) { benchInsert(b, ids) })
	}
}

func benchInsert(b *testing.B, ids bool) {
	h := open(b)
	ctx := context.Background()
	if err := h.conn.Exec(ctx, "DROP TABLE IF EXISTS calls_bench"); err != nil {
		b.Fatal(err)
	}
	if err := h.conn.Exec(ctx, "CREATE TABLE calls_bench AS calls"); err != nil {
		b.Fatal(err)
	}
	compressed, err := clickhouse.Open(h.options(h.o.Database))
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = compressed.Close() }()
	plainOptions := h.options(h.o.Database)
	plainOptions.Compression = nil
	plain, err := clickhouse.Open(plainOptions)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = plain.Close() }()

	const rows = 100_000
	tr := newTraffic(11, 5000, "")
	tr.ids = ids
	ways := []string{"historian", "append", "append-lz4", "struct"}
	took := make([][]float64, len(ways))
	block := NewBlock()
	run := unique(b)
	for n := 0; b.Loop(); n++ {
		frames := tr.frames(b, rows)
		list := rowsOf(b, frames)
		for k := range ways {
			way := (k + n) % len(ways)
			token := fmt.Sprint(run, n, way)
			settings := clickhouse.Context(ctx, clickhouse.WithSettings(clickhouse.Settings{"insert_deduplication_token": token, "async_insert": 0}))
			begin := time.Now()
			var err error
			switch ways[way] {
			case "historian":
				err = func() error {
					block.Reset()
					var f ledger.Frame
					for _, fr := range frames {
						if err := f.Decode(fr.data); err != nil {
							return err
						}
						block.AppendFrame(&f, fr.entry, nil)
					}
					var wg sync.WaitGroup
					parts := h.Parts(block)
					errs := make([]error, len(parts))
					for i := range parts {
						wg.Go(func() { errs[i] = parts[i].Insert(ctx, token) })
					}
					wg.Wait()
					for _, err := range errs {
						if err != nil {
							return err
						}
					}
					return nil
				}()
			default:
				err = func() error {
					conn := plain
					if ways[way] == "append-lz4" {
						conn = compressed
					}
					batch, err := conn.PrepareBatch(settings, "INSERT INTO calls_bench")
					if err != nil {
						return err
					}
					for i := range list {
						if ways[way] == "struct" {
							err = batch.AppendStruct(&list[i])
						} else {
							err = appendRow(batch, &list[i])
						}
						if err != nil {
							return err
						}
					}
					return batch.Send()
				}()
			}
			if err != nil {
				b.Fatal(ways[way], err)
			}
			took[way] = append(took[way], rows/time.Since(begin).Seconds())
		}
	}
	median := func(v []float64) float64 {
		slices.Sort(v)
		return v[len(v)/2]
	}
	b.ReportMetric(0, "ns/op")
	best := 0.0
	for way, name := range ways {
		m := median(took[way])
		b.ReportMetric(m, name+"-rows/s")
		if name != "historian" {
			best = max(best, m)
		}
	}
	b.ReportMetric(median(took[0])/best, "ratio-to-best")
}

// BenchmarkBlock is what the historian's own part of it costs: decoded frames to
// a block with its rollups.
func BenchmarkBlock(b *testing.B) {
	tr := newTraffic(12, 5000, "")
	frames := tr.frames(b, 100_000)
	block := NewBlock()
	b.ReportAllocs()
	for b.Loop() {
		block.Reset()
		var f ledger.Frame
		for _, fr := range frames {
			if err := f.Decode(fr.data); err != nil {
				b.Fatal(err)
			}
			block.AppendFrame(&f, fr.entry, nil)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/100_000, "ns/row")
}

// BenchmarkSize inserts a million calls and reports what a row takes on disk
// after everything was merged, with and without random ids, by column.
func BenchmarkSize(b *testing.B) {
	for _, ids := range []bool{false, true} {
		b.Run(fmt.Sprintf("ids=%v", ids), func(b *testing.B) {
			h := open(b)
			ctx := context.Background()
			if err := h.conn.Exec(ctx, "TRUNCATE TABLE calls"); err != nil {
				b.Fatal(err)
			}
			tr := newTraffic(13, 5000, unique(b))
			tr.prefix, tr.ids = "", ids
			for b.Loop() {
				for range 10 {
					for _, block := range fillBlocks(b, tr.frames(b, 100_000), 100_000) {
						if err := h.Parts(block)[0].Insert(ctx, unique(b)); err != nil {
							b.Fatal(err)
						}
					}
				}
			}
			if err := h.conn.Exec(ctx, "OPTIMIZE TABLE calls FINAL"); err != nil {
				b.Fatal(err)
			}
			var n uint64
			if err := h.conn.QueryRow(ctx, "SELECT count() FROM calls").Scan(&n); err != nil {
				b.Fatal(err)
			}
			rows, err := h.conn.Query(ctx, "SELECT name, data_compressed_bytes FROM system.columns WHERE database = currentDatabase() AND table = 'calls' ORDER BY 2 DESC")
			if err != nil {
				b.Fatal(err)
			}
			total := 0.0
			for rows.Next() {
				var name string
				var size uint64
				if err := rows.Scan(&name, &size); err != nil {
					b.Fatal(err)
				}
				total += float64(size) / float64(n)
				b.Logf("%-20s %6.2f bytes a row", name, float64(size)/float64(n))
			}
			if err := closeRows(rows, nil); err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(total, "bytes/row")
		})
	}
}
