package quota

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
)

const noon = usage.Micros(1_763_640_000_000_000) // 2025-11-20 12:00 UTC

// onePlan is a plan with one unfiltered limit of calls.
func onePlan(amount int64) *PlanSet {
	return &PlanSet{Version: "v1", Plans: []usage.Plan{{ID: "free", Limits: []usage.Limit{
		{ID: "calls", Meter: usage.Calls, Window: usage.Month, Amount: amount, Tier: usage.TierEventual, WarnPercent: 80},
	}}}}
}

// crowd returns a shard with n accounts of one plan.
func crowd(n int, set *PlanSet) *Shard {
	s := New(Options{})
	s.Apply(Entry{Sequence: 1, Time: noon, Control: &Control{PlanSet: set}})
	accounts := make([]usage.Account, n)
	for i := range accounts {
		accounts[i] = usage.Account{ID: fmt.Sprintf("account-%07d", i), Plan: set.Plans[0].ID}
	}
	s.Apply(Entry{Sequence: 2, Time: noon, Control: &Control{Accounts: accounts}})
	return s
}

// zipfBatches returns batches as a gateway seals them: rows in the order of
// the calls, a dictionary in the order of first appearance.
func zipfBatches(batches, rows, accounts int, tokens bool) []*Batch {
	r := rand.New(rand.NewPCG(1, 2))
	zipf := rand.NewZipf(r, 1.1, 1, uint64(accounts-1))
	out := make([]*Batch, batches)
	for k := range out {
		b := &Batch{N: rows, Producer: dedup.Producer{1}}
		ids := map[uint64]uint32{}
		for range rows {
			a := zipf.Uint64()
			d, ok := ids[a]
			if !ok {
				d = uint32(len(b.Account.Dict))
				ids[a] = d
				b.Account.Dict = append(b.Account.Dict, fmt.Appendf(nil, "account-%07d", a))
			}
			b.Account.Index = append(b.Account.Index, d)
			b.Time = append(b.Time, int64(noon)+int64(r.IntN(1000)))
			if tokens {
				b.BuiltIns[usage.InputTokensIndex].Values = append(b.BuiltIns[usage.InputTokensIndex].Values, int64(r.IntN(4000)))
				b.BuiltIns[usage.OutputTokensIndex].Values = append(b.BuiltIns[usage.OutputTokensIndex].Values, int64(r.IntN(1000)))
			}
		}
		out[k] = b
	}
	return out
}

func BenchmarkApply(b *testing.B) {
	filtered := onePlan(1 << 50)
	filtered.Plans[0].Limits[0].Filter.Models = []string{"gpt-4o", "gpt-4o-mini"}
	tokens := onePlan(1 << 50)
	tokens.Plans[0].Limits[0].Meter = usage.InputTokens
	for _, bench := range []struct {
		name   string
		set    *PlanSet
		tokens bool
		skew   int64 // how much before the window's begin the calls are
	}{
		{"one limit of calls", onePlan(1 << 50), false, 0},
		{"one limit of tokens, two meters reported", tokens, true, 0},
		{"one filtered limit", filtered, false, 0},
	} {
		b.Run(bench.name, func(b *testing.B) {
			s := crowd(100_000, bench.set)
			batches := zipfBatches(500, 1000, 100_000, bench.tokens)
			for _, batch := range batches {
				if !bench.set.Plans[0].Limits[0].Filter.Empty() {
					batch.Model = Strings{Dict: [][]byte{[]byte("gpt-4o"), []byte("claude")}, Index: make([]uint32, batch.N)}
					for i := range batch.Model.Index {
						batch.Model.Index[i] = uint32(i & 1)
					}
				}
			}
			seq := s.Sequence()
			apply := func(i int) {
				seq++
				batch := batches[i%len(batches)]
				batch.Number = seq
				s.Apply(Entry{Sequence: seq, Time: noon + 1000, Batch: batch})
			}
			for i := range batches {
				apply(i)
			}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				apply(i)
				i++
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/1000, "ns/event")
		})
	}
}

func BenchmarkMemory(b *testing.B) {
	for _, tokens := range []bool{false, true} {
		b.Run(fmt.Sprintf("1 M accounts, tokens=%t", tokens), func(b *testing.B) {
			const n = 1_000_000
			set := onePlan(1 << 50)
			var before, after runtime.MemStats
			for b.Loop() {
				runtime.GC()
				runtime.ReadMemStats(&before)
				s := crowd(n, set)
				batch := &Batch{N: 1000, Producer: dedup.Producer{1}, Time: make([]int64, 1000)}
				for i := range batch.Time {
					batch.Time[i] = int64(noon)
					batch.Account.Dict = append(batch.Account.Dict, nil)
					batch.Account.Index = append(batch.Account.Index, uint32(i))
					if tokens {
						batch.BuiltIns[usage.InputTokensIndex].Values = append(batch.BuiltIns[usage.InputTokensIndex].Values, 100)
					}
				}
				for k := range n / 1000 {
					for i := range 1000 {
						batch.Account.Dict[i] = fmt.Appendf(nil, "account-%07d", k*1000+i)
					}
					batch.Number = uint64(k + 1)
					s.Apply(Entry{Sequence: uint64(k + 3), Time: noon, Batch: batch})
				}
				s.Hash()
				runtime.GC()
				runtime.ReadMemStats(&after)
				b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/n, "B/account-limit")
				runtime.KeepAlive(s)
			}
		})
	}
}

func BenchmarkSnapshot(b *testing.B) {
	s := crowd(1_000_000, onePlan(1<<50))
	b.Run("hash all", func(b *testing.B) {
		for b.Loop() {
			for i := range s.accounts {
				s.soil(uint32(i))
			}
			s.Hash()
		}
	})
	var data []byte
	b.Run("append", func(b *testing.B) {
		for b.Loop() {
			data = s.AppendBinary(data[:0])
		}
		b.ReportMetric(float64(len(data)), "bytes")
	})
	b.Run("read", func(b *testing.B) {
		for b.Loop() {
			if _, err := Read(data); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkLeased is what frames and asks cost where calls are admitted from
// leases: 10,000 accounts, each with an allowance of which three gateways have
// a part.
func BenchmarkLeased(b *testing.B) {
	const accounts = 10_000
	set := onePlan(1 << 50)
	set.Plans[0].Limits[0].Tier = usage.TierExact
	var before, after runtime.MemStats
	s := crowd(accounts, set)
	runtime.GC()
	runtime.ReadMemStats(&before)
	start, _ := window.Month.Bounds(noon)
	seq := s.Sequence()
	ask := func(account int, g byte, m lease.Ask) *Effects {
		seq++
		m.Gateway, m.Sent = lease.Gateway{g}, lease.Micros(noon)
		return s.Apply(Entry{Sequence: seq, Time: noon, Asks: []LeaseAsk{{fmt.Sprintf("account-%07d", account), "free/calls", start, m}}})
	}
	for i := range accounts {
		for g := range byte(3) {
			ask(i, g+1, lease.Ask{Seq: 1, Need: 1000})
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.Run("a frame of 1000 calls", func(b *testing.B) {
		batches := zipfBatches(100, 1000, accounts, false)
		for _, batch := range batches {
			batch.Flags.Values = make([]int64, batch.N)
			for i := range batch.Flags.Values {
				batch.Flags.Values[i] = int64(usage.FromLease)
			}
		}
		b.ReportAllocs()
		n := 0
		for b.Loop() {
			batch := batches[n%len(batches)]
			n++
			seq++
			batch.Number = seq
			s.Apply(Entry{Sequence: seq, Time: noon, Batch: batch})
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/1000, "ns/event")
	})
	b.Run("an ask", func(b *testing.B) {
		b.ReportAllocs()
		n := 0
		for b.Loop() {
			n++
			ask(n%accounts, byte(n%3)+1, lease.Ask{Seq: uint64(2 + n), Known: 1000, Want: 10})
		}
	})
	b.Logf("%d bytes an allowance with three leases", (after.HeapAlloc-before.HeapAlloc)/accounts)
	runtime.KeepAlive(s)
}
