package opening

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
)

var (
	seed   = flag.Uint64("opening.seed", 0, "run one world only")
	worlds = flag.Int("opening.worlds", 40, "how many worlds are run")
)

const (
	noon   = usage.Micros(1_763_640_000_000_000)
	second = usage.Micros(1_000_000)
)

// limits that plans of the worlds have, each with a name that may be another's tomorrow.
var limits = []usage.Limit{
	{Meter: usage.Calls, Window: usage.Minute}, {Meter: usage.Calls, Window: usage.Hour}, {Meter: usage.Calls, Window: usage.Month}, {Meter: usage.Calls, Window: usage.Lifetime},
	{Meter: usage.InputTokens, Window: usage.Minute}, {Meter: usage.InputTokens, Window: usage.Lifetime}, {Meter: "pages", Window: usage.Hour},
	{Meter: usage.Calls, Window: usage.Hour, Filter: usage.Filter{Models: []string{"small"}}}, {Meter: usage.Calls, Window: usage.Lifetime, Filter: usage.Filter{Models: []string{"small", "large"}}},
	{Meter: usage.InputTokens, Window: usage.Month, Filter: usage.Filter{Routes: []string{"/a"}}},
}

var (
	accounts = []string{"a", "b", "c", "d", "e"}
	models   = []string{"small", "large", "huge"}
)

// world is a shard whose plans and accounts change all the time, and what every account
// has used of every limit, counted call by call in maps, as if each had had all limits
// from the beginning.
type world struct {
	t       *testing.T
	r       *rand.Rand
	s       *quota.Shard
	log     []quota.Entry
	now     usage.Micros
	parents map[string]string
	used    map[string]map[int]map[int64]int64 // account, limit, window
	pages   bool                               // a meter of one's own was reported
	opened  int
}

func (w *world) append(e quota.Entry) *quota.Effects {
	e.Sequence, e.Time = uint64(len(w.log)+1), w.now
	w.log = append(w.log, e)
	fx := w.s.Apply(e)
	if fx.Invalid != nil {
		w.t.Fatal(fx.Invalid)
	}
	return fx
}

// add counts what was used at a time on an account's path.
func (w *world) add(account, model, route string, m usage.Meter, at usage.Micros, n int64) {
	for id := account; id != ""; id = w.parents[id] {
		for k, l := range limits {
			if l.Meter != m || !l.Filter.Match(model, route, "") {
				continue
			}
			kind, _ := window.Parse(l.Window)
			number := kind.Number(min(at, w.now))
			if number < kind.Number(w.now)-1 {
				continue
			}
			if w.used[id] == nil {
				w.used[id] = map[int]map[int64]int64{}
			}
			if w.used[id][k] == nil {
				w.used[id][k] = map[int64]int64{}
			}
			w.used[id][k][number] = max(0, w.used[id][k][number]+n)
		}
	}
}

func (w *world) calls() {
	b := &quota.Batch{N: 1 + w.r.IntN(6), Producer: dedup.Producer{byte(1 + w.r.IntN(2))}}
	b.Number = uint64(len(w.log) + 1) // gaps are told and counted
	tokens := &b.BuiltIns[usage.InputTokensIndex]
	pages := quota.CustomMeter{Meter: "pages"}
	for i := range b.N {
		account, model, route := accounts[w.r.IntN(len(accounts))], models[w.r.IntN(3)], []string{"/a", "/b"}[w.r.IntN(2)]
		at := w.now - usage.Micros([]int64{0, 0, 0, 5, 50, 3000, -30}[w.r.IntN(7)])*second
		n, p := w.r.Int64N(9), w.r.Int64N(3)
		for column, text := range map[*quota.Strings]string{&b.Account: account, &b.Model: model, &b.Route: route} {
			column.Dict, column.Index = append(column.Dict, []byte(text)), append(column.Index, uint32(i))
		}
		b.Time, tokens.Values, pages.Values = append(b.Time, int64(at)), append(tokens.Values, n), append(pages.Values, p)
		w.add(account, model, route, usage.Calls, at, 1)
		w.add(account, model, route, usage.InputTokens, at, n)
		if w.pages {
			w.add(account, model, route, "pages", at, p)
		}
	}
	if w.pages {
		b.Custom = []quota.CustomMeter{pages}
	}
	w.append(quota.Entry{Batch: merged(b)})
	if w.r.IntN(4) == 0 {
		w.append(quota.Entry{Batch: merged(b)}) // sent twice, counted once
	}
}

// merged gives equal texts one place in their dictionary, as a frame has them.
func merged(b *quota.Batch) *quota.Batch {
	for _, c := range []*quota.Strings{&b.Account, &b.Model, &b.Route} {
		var dict [][]byte
		for i, at := range c.Index {
			k := slices.IndexFunc(dict, func(d []byte) bool { return string(d) == string(c.Dict[at]) })
			if k < 0 {
				k, dict = len(dict), append(dict, c.Dict[at])
			}
			c.Index[i] = uint32(k)
		}
		c.Dict = dict
	}
	return b
}

func (w *world) plans() {
	set := &quota.PlanSet{Version: fmt.Sprint(len(w.log))}
	if w.r.IntN(3) == 0 {
		set.EffectiveAt = w.now + usage.Micros(w.r.IntN(90))*second
	}
	for _, id := range []string{"free", "pro"} {
		p := usage.Plan{ID: id}
		for _, k := range w.r.Perm(len(limits))[:w.r.IntN(5)] {
			l := limits[k]
			l.ID, l.Amount = fmt.Sprint("l", w.r.IntN(3), "-", len(p.Limits)), w.r.Int64N(200)
			l.Tier = []usage.Tier{usage.TierEventual, usage.TierExact}[w.r.IntN(2)]
			p.Limits = append(p.Limits, l)
		}
		set.Plans = append(set.Plans, p)
	}
	w.append(quota.Entry{Control: &quota.Control{PlanSet: set}})
}

func (w *world) account() {
	i := w.r.IntN(len(accounts))
	a := usage.Account{ID: accounts[i], Plan: []string{"free", "pro", "", "gone"}[w.r.IntN(4)], Closed: w.r.IntN(8) == 0}
	if i > 0 && w.r.IntN(2) == 0 {
		a.Parent = accounts[w.r.IntN(i)]
	}
	w.parents[a.ID] = a.Parent
	w.append(quota.Entry{Control: &quota.Control{Accounts: []usage.Account{a}}})
}

func (w *world) correct() {
	account, by := accounts[w.r.IntN(len(accounts))], w.r.Int64N(9)-4
	if by == 0 {
		return
	}
	w.add(account, "small", "/a", usage.Calls, w.now, by)
	w.append(quota.Entry{Control: &quota.Control{Correction: &quota.Correction{Account: account, Model: "small", Route: "/a", Adjustments: []usage.Quantity{{Meter: usage.Calls, Value: by}}}}})
}

// open does what an owner does: it folds the ledger anew and appends what it finds; or
// another has done so before.
func (w *world) open() {
	count := New(3, 0, w.s.Openings())
	if count == nil {
		return
	}
	for _, e := range w.log {
		if err := count.Apply(e); err != nil {
			w.t.Fatal(err)
		}
		if count.Done() {
			break
		}
	}
	if !count.Done() {
		w.t.Fatal("what is open began with no entry")
	}
	w.opened += len(count.Counted())
	for range 1 + w.r.IntN(2) {
		w.append(quota.Entry{Control: &quota.Control{Openings: count.Counted()}})
	}
}

// check holds the counters of every limit that is not open to the maps.
func (w *world) check() {
	for _, id := range accounts {
		u, _ := w.s.Account(id)
		for _, l := range u.Limits {
			for k, of := range limits {
				kind, _ := window.Parse(of.Window)
				_, begin, _ := w.s.Counted(id, l.LimitID, of.Meter, of.Window, &of.Filter)
				if l.Meter != of.Meter || l.Window != of.Window || !w.is(id, l.LimitID, &of) {
					continue
				}
				open := slices.ContainsFunc(w.s.Openings(), func(o quota.Opening) bool {
					return o.Account == id && o.Meter == of.Meter && o.Window == of.Window && slices.Equal(o.Filter.Models, of.Filter.Models) && slices.Equal(o.Filter.Routes, of.Filter.Routes)
				})
				if want := w.used[id][k][kind.Number(w.s.Now())]; l.Used != want && !open || l.Used > want {
					w.t.Fatalf("%s, %s (%+v): %d are used, %d by the limit (window from %d, open %t)", id, l.LimitID, of, want, l.Used, begin, open)
				}
			}
		}
	}
}

// is says whether an account's limit is one of the world's.
func (w *world) is(account, limitID string, of *usage.Limit) bool {
	for i := len(w.log) - 1; i >= 0; i-- {
		if c := w.log[i].Control; c != nil && c.PlanSet != nil && c.PlanSet.Version == w.s.PlanVersion() {
			for _, p := range c.PlanSet.Plans {
				for _, l := range p.Limits {
					if p.ID+"/"+l.ID == limitID {
						return slices.Equal(l.Filter.Models, of.Filter.Models) && slices.Equal(l.Filter.Routes, of.Filter.Routes)
					}
				}
			}
		}
	}
	return false
}

// A limit starts from what the ledger holds of its window, whatever the account's plan
// was meanwhile: plans and parents change to and fro, limits come, go and are renamed,
// accounts are closed and opened, calls are late and doubled, the shard is restarted,
// and what was used before new limits is told late, or twice.
func TestALimitStartsFromWhatTheLedgerHoldsOfItsWindow(t *testing.T) {
	t.Parallel()
	first, n := uint64(1), uint64(*worlds)
	if *seed != 0 {
		first, n = *seed, 1
	}
	opened, entries := 0, 0
	for s := first; s < first+n && !t.Failed(); s++ {
		t.Run(fmt.Sprint("seed ", s), func(t *testing.T) {
			w := &world{
				t: t, r: rand.New(rand.NewPCG(s, 9)), s: quota.New(quota.Options{Shard: 3}), now: noon, parents: map[string]string{},
				used: map[string]map[int]map[int64]int64{}, pages: s%2 == 0,
			}
			w.append(quota.Entry{Control: &quota.Control{Core: &quota.Core{Version: quota.CoreVersion, Horizon: 3600 * second}}})
			for range 120 {
				w.now += usage.Micros([]int64{0, 0, 0, 1, 7, 40, 900}[w.r.IntN(7)]) * second
				switch w.r.IntN(12) {
				case 0, 1:
					w.plans()
				case 2, 3, 4:
					w.account()
				case 5:
					w.correct()
				case 6:
					w.open()
				case 7:
					read, err := quota.Read(w.s.AppendBinary(nil))
					if err != nil || read.Hash() != w.s.Hash() {
						t.Fatalf("a snapshot is read as something else: %v", err)
					}
					w.s = read
				default:
					w.calls()
				}
				w.check()
			}
			w.append(quota.Entry{}) // plans that are due take effect
			w.open()
			if w.s.Open() != 0 {
				t.Errorf("%d counters stay open", w.s.Open())
			}
			w.check()
			opened, entries = opened+w.opened, entries+len(w.log)
		})
	}
	t.Logf("%d worlds from seed %d: %d entries, %d counters opened", n, first, entries, opened)
	if n > 10 && opened == 0 {
		t.Error("nothing was ever open: this says nothing")
	}
}
