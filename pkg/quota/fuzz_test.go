package quota

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// sealed makes a snapshot of what is between magic and sum, which hold whatever
// somebody has put there.
func sealed(body []byte) []byte {
	data := append([]byte(snapshotMagic), body...)
	sum := sha256.Sum256(data)
	return append(data, sum[:]...)
}

func unsealed(data []byte) []byte { return data[len(snapshotMagic) : len(data)-sha256.Size] }

// snapshots of shards that had a life.
func snapshots() [][]byte {
	all := [][]byte{unsealed(New(Options{}).AppendBinary(nil))}
	for seed := uint64(1); seed <= 4; seed++ {
		p := randomSim(seed)
		p.failovers, p.kills, p.changes = 0, 300, 2000
		if seed%2 == 0 {
			p.tier = usage.TierLeased
		}
		w := newSimWorld(p)
		for len(w.queue) > 0 && len(w.log) < 60 {
			e := w.queue[0]
			w.queue = w.queue[1:]
			w.now = max(w.now, e.at)
			e.do()
		}
		w.append(Entry{Control: &Control{PlanSet: &PlanSet{Version: "later", EffectiveAt: w.now + 3600*second, Plans: p.plans(7).Plans}}})
		c := usage.Call{Account: "new", Time: w.now, Source: "s", EventID: "1"}
		c.Quantities.Set("images", 3)
		w.append(Entry{Batch: batchOf(0, 0, []usage.Call{c})})
		all = append(all, unsealed(w.s.AppendBinary(nil)))
	}
	return all
}

// FuzzRead: what is read, whatever it is, is written as what it is read from, and
// can be folded on.
func FuzzRead(f *testing.F) {
	for _, body := range snapshots() {
		f.Add(body)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		s, err := Read(sealed(body))
		if err != nil {
			return
		}
		data := s.AppendBinary(nil)
		again, err := Read(data)
		if err != nil {
			t.Fatalf("what was read and written can't be read: %v", err)
		}
		if !bytes.Equal(again.AppendBinary(nil), data) || again.Hash() != s.Hash() {
			t.Fatal("what was read and written is read as something else")
		}
		goOn(s)
	})
}

// goOn has a shard do everything that it can.
func goOn(s *Shard) {
	var ids []string
	for i := range min(len(s.accounts), 20) {
		ids = append(ids, s.name(uint32(i)))
	}
	at := s.Now()
	apply := func(e Entry) {
		e.Sequence, e.Time = s.Sequence()+1, at
		s.Apply(e)
	}
	for range 3 {
		s.Top(5)
		s.Total()
		s.LeaseSums()
		s.Resume()
		for _, id := range ids {
			u, _ := s.Account(id)
			for k := range u.Limits {
				l := &u.Limits[k]
				apply(Entry{Asks: []LeaseAsk{{id, l.LimitID, l.PeriodStart, lease.Ask{Gateway: lease.Gateway{7}, Seq: 1, Need: 3, Want: 10, Sent: lease.Micros(at)}}}})
			}
			c := usage.Call{Account: id, Time: at}
			c.Quantities.Set(usage.InputTokens, 5)
			c.Quantities.Set("images", 1)
			f := c
			f.Source, f.EventID = "s", "9"
			b := batchOf(7, s.dedup.Last(dedup.Producer{7})+1, []usage.Call{c, f})
			b.Flags.Values = []int64{int64(usage.FromLease), 0}
			apply(Entry{Batch: b})
			apply(Entry{Control: &Control{Correction: &Correction{Account: id, Adjustments: []usage.Quantity{{Meter: usage.Calls, Value: -1}, {Meter: "images", Value: 2}}}}})
		}
		p := dedup.Producer{7}
		apply(Entry{Control: &Control{Closed: &p, ClosedAt: s.dedup.Last(p), Complete: true}})
		if next, ok := s.NextTimer(); ok {
			at = max(at, next)
		} else {
			at += 3600 * second
		}
		apply(Entry{})
	}
	if len(ids) > 0 {
		apply(Entry{Control: &Control{Accounts: []usage.Account{{ID: ids[0], Plan: "free"}, {ID: "child", Parent: ids[len(ids)-1], Plan: "free"}}}})
	}
	apply(Entry{Control: &Control{PlanSet: onePlan(3)}})
	s.Hash()
}

// A snapshot that claims to hold much more than it has is refused before there is
// room for it.
func TestASnapshotTakesMemoryInProportionToItsLength(t *testing.T) {
	// Not parallel: it counts the whole process's allocations.
	seeds := snapshots()
	r := rand.New(rand.NewPCG(1, 2))
	var before, after runtime.MemStats
	for try := range 3000 {
		body := bytes.Clone(seeds[try%len(seeds)])
		// Somewhere a number becomes as large as what follows, or larger.
		at := r.IntN(len(body))
		n := uint64(len(body) - at)
		if try%3 == 0 {
			n = r.Uint64()
		}
		body = append(binary.AppendUvarint(bytes.Clone(body[:at]), n), body[at+1:]...)
		if try%2 == 0 {
			body = append(body, bytes.Repeat([]byte{0xff}, 4096)...)
		}
		data := sealed(body)
		runtime.ReadMemStats(&before)
		_, _ = Read(data) // whether it can be read is not the question
		runtime.ReadMemStats(&after)
		if took := after.TotalAlloc - before.TotalAlloc; took > 64*uint64(len(data))+64<<10 {
			t.Fatalf("%d bytes were taken for a snapshot of %d (try %d, at %d)", took, len(data), try, at)
		}
	}
}

// FuzzApply: see anything.
func FuzzApply(f *testing.F) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 8 {
		seed := make([]byte, 4096)
		for i := range seed {
			seed[i] = byte(r.Uint32() >> r.IntN(16))
		}
		f.Add(seed)
	}
	f.Fuzz(rapid.MakeFuzz(anything))
}

func TestWhateverComesInvariantsHold(t *testing.T) {
	t.Parallel()
	rapid.Check(t, anything)
}

// genTiered are plans of all tiers.
var genTiered = rapid.Custom(func(t *rapid.T) *PlanSet {
	set := genPlans.Draw(t, "plans")
	for i := range set.Plans {
		for k := range set.Plans[i].Limits {
			l := &set.Plans[i].Limits[k]
			l.Tier = rapid.SampledFrom([]usage.Tier{usage.TierEventual, usage.TierExact, usage.TierLeased}).Draw(t, "tier")
			if l.Tier == usage.TierLeased {
				l.Lease = usage.LeaseTerms{Term: second, ReleaseAfter: 2 * second, MaxExposure: 8}
			}
		}
	}
	return set
})

// genAsk is what no honest gateway would say, or one would.
func genAsk(s *Shard, now usage.Micros) *rapid.Generator[LeaseAsk] {
	return rapid.Custom(func(t *rapid.T) LeaseAsk {
		small := rapid.OneOf(rapid.Just(int64(0)), rapid.Int64Range(0, 9), rapid.SampledFrom([]int64{-1, 25, lease.MaxUnits, lease.MaxUnits + 1}))
		ask := LeaseAsk{
			Account: rapid.SampledFrom(append(accountIDs, "nobody")).Draw(t, "account"), LimitID: "p/l1",
			Ask: lease.Ask{
				Gateway: lease.Gateway{rapid.SampledFrom([]byte{1, 2, 3}).Draw(t, "gateway")}, Seq: rapid.SampledFrom([]uint64{0, 1, 2, 3, 4, 5, 6, 1 << 63, 1<<64 - 1}).Draw(t, "seq"),
				Sent: lease.Micros(now), Seen: rapid.SampledFrom([]uint64{0, s.Sequence(), 1<<64 - 1}).Draw(t, "seen"),
				Known: small.Draw(t, "known"), Used: small.Draw(t, "used"), Returned: small.Draw(t, "returned"), Over: small.Draw(t, "over"), Held: small.Draw(t, "held"),
				Need: small.Draw(t, "need"), Want: small.Draw(t, "want"), Renew: rapid.Bool().Draw(t, "renew"), Closing: rapid.IntRange(0, 5).Draw(t, "closing") == 0,
			},
		}
		if rapid.Bool().Draw(t, "begins") {
			ask.Ask = lease.Ask{Gateway: ask.Gateway, Seq: rapid.Uint64Range(1, 6).Draw(t, "seq"), Sent: ask.Sent, Need: rapid.Int64Range(1, 5).Draw(t, "need")}
		}
		if u, ok := s.Account(ask.Account); ok && len(u.Limits) > 0 {
			l := rapid.SampledFrom(u.Limits).Draw(t, "limit")
			ask.LimitID, ask.WindowStart = l.LimitID, l.PeriodStart
			if rapid.IntRange(0, 5).Draw(t, "next") == 0 {
				ask.WindowStart = l.PeriodEnd
			}
			if _, name, ok := strings.Cut(l.LimitID, "/"); ok && rapid.IntRange(0, 3).Draw(t, "of another plan") == 0 {
				ask.LimitID = rapid.SampledFrom(planIDs).Draw(t, "plan") + "/" + name
			}
		}
		return ask
	})
}

// anything folds what comes, honest or not, and holds the shard to what must be.
func anything(t *rapid.T) {
	st := &story{now: noon, numbers: map[byte]uint64{}}
	s := New(Options{Shard: 3, Horizon: 600 * second})
	type folded struct {
		Entry
		decisions []usage.Decision
		answers   []LeaseAnswer
	}
	var log []folded
	if rapid.Bool().Draw(t, "newest rules") {
		e := Entry{Sequence: 1, Time: noon, Control: &Control{Core: &Core{Version: CoreVersion, Horizon: 600 * second}}}
		s.Apply(e)
		log = append(log, folded{Entry: e})
		st.seq = 1
	}
	kinds := []string{"as it is", "as it is", "asks", "asks", "asks", "tiers", "much", "end", "rules", "twins", "move", "move", "openings"}
	calm := rapid.Bool().Draw(t, "calm")
	if calm {
		// One window, in which accounts change plans while leases of theirs are out.
		kinds = []string{"as it is", "asks", "asks", "asks", "asks", "asks", "end", "twins", "move", "move", "openings"}
	}
	for range rapid.IntRange(1, 40).Draw(t, "entries") {
		before := st.now
		e := st.next(t)
		if calm {
			st.now = min(st.now, before+second)
			e.Time = st.now
		}
		switch rapid.SampledFrom(kinds).Draw(t, "what") {
		case "asks":
			e = step{Entry: Entry{Sequence: e.Sequence, Time: e.Time, Asks: rapid.SliceOfN(genAsk(s, e.Time), 1, 4).Draw(t, "asks")}}
		case "tiers":
			e = step{Entry: Entry{Sequence: e.Sequence, Time: e.Time, Control: &Control{PlanSet: genTiered.Draw(t, "plans")}}}
		case "twins":
			set := genTiered.Draw(t, "plans")
			if len(set.Plans) > 0 {
				limits := set.Plans[0].Limits
				set.Plans = nil
				for _, id := range planIDs {
					set.Plans = append(set.Plans, usage.Plan{ID: id, Limits: slices.Clone(limits)})
				}
			}
			e = step{Entry: Entry{Sequence: e.Sequence, Time: e.Time, Control: &Control{PlanSet: set}}}
		case "openings":
			open := s.Openings()
			for i := range open {
				open[i].Used, open[i].Previous = rapid.Int64Range(0, 9).Draw(t, "used"), rapid.Int64Range(0, 9).Draw(t, "previous")
				if rapid.IntRange(0, 5).Draw(t, "too late") == 0 {
					open[i].Since++
				}
			}
			e = step{Entry: Entry{Sequence: e.Sequence, Time: e.Time, Control: &Control{Openings: open}}}
		case "move":
			e = step{Entry: Entry{Sequence: e.Sequence, Time: e.Time, Control: &Control{Accounts: []usage.Account{{
				ID: rapid.SampledFrom(accountIDs).Draw(t, "account"), Plan: rapid.SampledFrom(planIDs).Draw(t, "plan"),
			}}}}}
		case "much":
			if b := e.Batch; b != nil {
				much := rapid.SampledFrom([]int64{usage.MaxQuantity, 1 << 62, 1<<63 - 1}).Draw(t, "much")
				b.BuiltIns[usage.InputTokensIndex] = Ints{Values: slices.Repeat([]int64{much}, b.N)}
				for i := range b.Time {
					if rapid.Bool().Draw(t, "when") {
						b.Time[i] = rapid.SampledFrom([]int64{-1 << 63, -1, 0, 1<<63 - 1}).Draw(t, "time")
					}
				}
			} else if e.Control != nil && e.Control.Correction != nil {
				e.Control.Correction.Adjustments[0].Value = rapid.SampledFrom([]int64{0, usage.MaxQuantity, -usage.MaxQuantity, -1 << 63}).Draw(t, "much")
			}
		case "end":
			p := dedup.Producer{rapid.SampledFrom([]byte{1, 2, 3}).Draw(t, "producer")}
			e = step{Entry: Entry{Sequence: e.Sequence, Time: e.Time, Control: &Control{Closed: &p, ClosedAt: s.dedup.Last(p) + rapid.Uint64Range(0, 1).Draw(t, "lost"), Complete: true}}}
		case "rules":
			core := Core{Version: rapid.Uint32Range(0, CoreVersion+1).Draw(t, "version"), Horizon: usage.Micros(rapid.Int64Range(-1, 1<<40).Draw(t, "horizon"))}
			e = step{Entry: Entry{Sequence: e.Sequence, Time: e.Time, Control: &Control{Core: &core}}}
		}
		if b := e.Batch; b != nil && rapid.Bool().Draw(t, "of leases") {
			b.Flags.Values = slices.Repeat([]int64{int64(usage.FromLease)}, b.N)
		}
		hash, position, at := s.Hash(), s.Sequence(), s.Now()
		fx := s.Apply(e.Entry)
		if fx.Newer != nil {
			if s.Hash() != hash || s.Sequence() != position || s.Now() != at || len(fx.Decisions)+len(fx.Answers) != 0 {
				t.Fatal("an entry of rules that are not known changed something")
			}
			data := s.AppendBinary(nil)
			var err error
			if s, err = Read(data); err != nil { // a ledger without this entry
				t.Fatal(err)
			}
			continue
		}
		holdsEffects(t, e.Entry, fx)
		log = append(log, folded{e.Entry, slices.Clone(fx.Decisions), slices.Clone(fx.Answers)})
		holds(t, s)
		if rapid.IntRange(0, 3).Draw(t, "restart") == 0 {
			data := s.AppendBinary(nil)
			read, err := Read(data)
			if err != nil || !bytes.Equal(read.AppendBinary(nil), data) || read.Hash() != s.Hash() {
				t.Fatalf("a snapshot is read as something else: %v", err)
			}
			s = read
		}
	}
	again := New(Options{Shard: 3, Horizon: 600 * second})
	for i := range log {
		fx := again.Apply(log[i].Entry)
		if diff := gocmp.Diff(log[i].decisions, fx.Decisions, cmpopts.EquateEmpty()) + gocmp.Diff(log[i].answers, fx.Answers, cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("entry %d read again: %s", log[i].Sequence, diff)
		}
	}
	if again.Hash() != s.Hash() {
		t.Fatal("the same log gave another hash")
	}
}

// holdsEffects holds what an entry led to to what is promised of it.
func holdsEffects(t *rapid.T, e Entry, fx *Effects) {
	for i := range fx.Decisions {
		d := &fx.Decisions[i]
		if i > 0 {
			last := &fx.Decisions[i-1]
			if cmp.Or(cmp.Compare(last.Account, d.Account), cmp.Compare(last.LimitID, d.LimitID)) >= 0 {
				t.Fatalf("two decisions of one limit, or out of order: %+v", fx.Decisions)
			}
		}
		if spent := d.Used >= d.Amount; d.Verdict != usage.Allow && (d.Verdict == usage.Deny && d.Room == 0) != spent || d.Room < 0 || d.Room > 0 && d.Verdict != usage.Deny {
			t.Fatalf("%s, room %d, where %d of %d are used", d.Verdict, d.Room, d.Used, d.Amount)
		}
	}
	for i := range fx.Answers {
		a := &fx.Answers[i]
		if i > 0 {
			last := &fx.Answers[i-1]
			if cmp.Or(cmp.Compare(last.Account, a.Account), cmp.Compare(last.LimitID, a.LimitID), bytes.Compare(last.Gateway[:], a.Gateway[:]), cmp.Compare(last.WindowStart, a.WindowStart)) > 0 {
				t.Fatalf("answers are out of order: %+v", fx.Answers)
			}
		}
		if a.Granted < 0 || a.Room < 0 {
			t.Fatalf("%+v", a)
		}
	}
	if e.Batch != nil && fx.Invalid == nil && fx.Frame != dedup.Duplicate && fx.Admitted+fx.Refused+fx.Duplicates != e.Batch.N {
		t.Fatalf("of %d calls %d are admitted, %d refused, %d seen before", e.Batch.N, fx.Admitted, fx.Refused, fx.Duplicates)
	}
}

// holds holds the state to what is always so.
func holds(t *rapid.T, s *Shard) {
	var sum Totals
	for i := range uint32(len(s.accounts)) {
		u := s.use(i)
		sum.Admitted += u.Own.Admitted
		sum.Refused += u.Own.Refused
		sum.Hash += u.Own.Hash
		for _, l := range u.Limits {
			if l.Used < 0 || l.Previous < 0 {
				t.Fatalf("%s of account %s: %d are used, %d before", l.LimitID, u.ID, l.Used, l.Previous)
			}
			if x := l.Lease; x != nil {
				if x.Settled < 0 || x.Outstanding < 0 || x.Exposure < 0 || x.Dead < 0 || x.Dead > x.Outstanding || x.Settled+x.Outstanding > x.Amount+x.Excess {
					t.Fatalf("%s of account %s: %+v", l.LimitID, u.ID, x)
				}
				if most := int64(1) << 59; x.Settled < min(l.Used, most) {
					t.Fatalf("%s of account %s: %d are counted, %d settled", l.LimitID, u.ID, l.Used, x.Settled)
				}
			}
		}
	}
	if total := s.Total(); total.Admitted != sum.Admitted || total.Refused != sum.Refused || total.Hash != sum.Hash {
		t.Fatalf("all calls are %+v, those of the accounts %+v", total, sum)
	}
	if at, ok := s.NextTimer(); ok && at <= s.Now() {
		t.Fatalf("a timer at %d is behind the time %d", at, s.Now())
	}
}
