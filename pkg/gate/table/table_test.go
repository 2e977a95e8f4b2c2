package table

import (
	"crypto/sha256"
	"fmt"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

const second = usage.Micros(1_000_000)

var policy = Policy{Pass: true, MaxCalls: 3, StaleAfter: 3 * second}

// setDirectory is what a feed does once it has read all.
func (t *Table) setDirectory(keys []Key, accounts []AccountRecord) {
	for _, a := range accounts {
		t.SetAccount(a)
	}
	for _, k := range keys {
		t.SetKey(k)
	}
	t.DirectoryRead()
}

// family is a table with organisation > team > service, everything known at time 0.
func family(p Policy) (*Table, *Account) {
	t := New(4, testShardOf, p)
	t.setDirectory([]Key{{Hash: sha256.Sum256([]byte("secret")), KeyID: "k1", Account: "svc"}}, []AccountRecord{
		{ID: "svc", Path: []string{"svc", "team", "org"}, Plan: "pro"},
		{ID: "team", Path: []string{"team", "org"}},
		{ID: "org", Path: []string{"org"}},
		{ID: "other", Path: []string{"other"}},
	})
	t.ResetDecisions(nil)
	for s := range uint32(4) {
		t.Hear(Beacon{Shard: s, Epoch: 1, StreamTime: 0}, 0)
	}
	t.Tick(0)
	a, _ := t.ByID("svc")
	return t, a
}

func deny(account string, revision uint64, edit ...func(*usage.Decision)) Keyed {
	d := usage.Decision{
		ID: fmt.Sprint("d", revision), Account: account, LimitID: "pro/calls", Meter: usage.Calls, Verdict: usage.Deny,
		Code: usage.QuotaExceeded, Revision: revision, Used: 10, Amount: 10, PeriodEnd: 60 * second,
	}
	for _, e := range edit {
		e(&d)
	}
	return Keyed{Key: "0." + d.Account + "." + d.LimitID, Seq: revision, Decision: d}
}

func allow(account string, revision uint64) Keyed {
	return deny(account, revision, func(d *usage.Decision) { d.Verdict, d.Code = usage.Allow, "" })
}

func admit(t *Table, a *Account, req Request, now usage.Micros) Verdict {
	if t.Fine(a) {
		return Verdict{Allowed: true}
	}
	return t.Decide(a, req, now)
}

func TestAKeyLeadsToItsAccountAndShard(t *testing.T) {
	t.Parallel()
	tab, _ := family(policy)
	h := KeyHash(sha256.Sum256([]byte("secret")))
	c, found := tab.ByKey(&h)
	if found != Found || c.Account.ID() != "svc" || *c.KeyID != "k1" || c.Account.Plan() != "pro" {
		t.Fatalf("got %+v, %v", c, found)
	}
	root, shard, ok := c.Account.Root()
	if !ok || root != "org" || shard != testShardOf("org", 4) {
		t.Fatalf("root %q, shard %d, %v", root, shard, ok)
	}
	other := KeyHash(sha256.Sum256([]byte("guess")))
	if _, found := tab.ByKey(&other); found != NotFound {
		t.Fatalf("an unknown key: %v", found)
	}
	if _, found := tab.ByID("nobody"); found != NotFound {
		t.Fatalf("an unknown account: %v", found)
	}
}

func TestNothingCanBeToldBeforeTheDirectoryIsRead(t *testing.T) {
	t.Parallel()
	tab := New(4, testShardOf, policy)
	h := KeyHash(sha256.Sum256([]byte("secret")))
	if _, found := tab.ByKey(&h); found != CannotTell {
		t.Fatalf("got %v", found)
	}
	// A key whose account's record is still to come belongs to somebody, but
	// nobody knows which shard decides.
	tab.SetKey(Key{Hash: h, KeyID: "k", Account: "a", Seq: 1})
	c, found := tab.ByKey(&h)
	if found != Found {
		t.Fatalf("got %v", found)
	}
	if v := admit(tab, c.Account, Request{}, 0); v.Allowed || v.Code != usage.BillingStateUnknown {
		t.Fatalf("got %+v", v)
	}
}

func TestADenyOnAnyAccountOfThePathRefuses(t *testing.T) {
	t.Parallel()
	for _, who := range []string{"svc", "team", "org"} {
		tab, a := family(policy)
		if v := admit(tab, a, Request{}, second); !v.Allowed {
			t.Fatalf("before: %+v", v)
		}
		tab.Apply(deny(who, 5))
		v := admit(tab, a, Request{}, second)
		if v.Allowed || v.Code != usage.QuotaExceeded || v.Decision.Account != who {
			t.Fatalf("%s: %+v", who, v)
		}
		other, _ := tab.ByID("other")
		if v := admit(tab, other, Request{}, second); !v.Allowed {
			t.Fatalf("%s: somebody else is refused: %+v", who, v)
		}
		tab.Apply(allow(who, 6))
		if v := admit(tab, a, Request{}, second); !v.Allowed || !tab.Fine(a) {
			t.Fatalf("%s, after: %+v", who, v)
		}
	}
}

func TestDeepPaths(t *testing.T) {
	t.Parallel()
	tab, _ := family(policy)
	path := []string{"l0", "l1", "l2", "l3", "l4", "l5", "l6"}
	for i := range path {
		tab.SetAccount(AccountRecord{ID: path[i], Path: path[i:], Seq: 1})
	}
	a, _ := tab.ByID("l0")
	for _, id := range path {
		tab.Apply(deny(id, 1))
		if v := admit(tab, a, Request{}, 0); v.Allowed || v.Decision.Account != id {
			t.Fatalf("%s: %+v", id, v)
		}
		tab.Apply(allow(id, 2))
	}
	if !tab.Fine(a) {
		t.Fatal("not fine in the end")
	}
}

func TestAFilterMustMatch(t *testing.T) {
	t.Parallel()
	tab, a := family(policy)
	tab.Apply(deny("org", 1, func(d *usage.Decision) { d.Filter.Models = []string{"big"}; d.Filter.Methods = []string{"POST"} }))
	for req, refused := range map[Request]bool{
		{Model: "big", Method: "POST"}:   true,
		{Model: "small", Method: "POST"}: false,
		{Model: "big", Method: "GET"}:    false,
	} {
		if v := admit(tab, a, req, 0); v.Allowed == refused {
			t.Errorf("%+v: %+v", req, v)
		}
	}
}

func TestADenyEndsByItselfByTheLedgersClock(t *testing.T) {
	t.Parallel()
	tab, a := family(policy)
	tab.Apply(deny("svc", 1))
	if v := admit(tab, a, Request{}, 60*second-1); v.Allowed {
		t.Fatal("it ended early")
	}
	if v := tab.Decide(a, Request{}, 60*second); !v.Allowed {
		t.Fatalf("it did not end: %+v", v)
	}
	// The ledger's clock is 10 s ahead of ours: the period ends earlier for us.
	tab, a = family(policy)
	tab.Apply(deny("svc", 1))
	tab.Hear(Beacon{Shard: 0, Epoch: 1, StreamTime: 40 * second}, 30*second)
	if v := tab.Decide(a, Request{}, 50*second); !v.Allowed {
		t.Fatalf("the offset is not used: %+v", v)
	}
}

func TestAHeldDenyStandsWhileTheFeedIsSilent(t *testing.T) {
	t.Parallel()
	tab, a := family(policy)
	tab.Apply(deny("svc", 1))
	tab.Tick(30 * second)
	if v := admit(tab, a, Request{}, 30*second); v.Allowed || v.Code != usage.QuotaExceeded {
		t.Fatalf("got %+v", v)
	}
	// When its period is over nobody knows.
	if v := admit(tab, a, Request{}, 61*second); !v.Allowed || !v.Unknown {
		t.Fatalf("got %+v", v)
	}
}

func TestUnknownPassesUpToTheBoundOfEveryAccountOnThePath(t *testing.T) {
	t.Parallel()
	tab, a := family(policy)
	tab.Tick(4 * second)
	for i := range 3 {
		if v := admit(tab, a, Request{}, 4*second); !v.Allowed || !v.Unknown {
			t.Fatalf("call %d: %+v", i, v)
		}
	}
	for _, id := range []string{"svc", "team", "org"} {
		who, _ := tab.ByID(id)
		if v := admit(tab, who, Request{}, 4*second); v.Allowed || v.Code != usage.BillingStateUnknown || !v.Unknown {
			t.Fatalf("%s: %+v", id, v)
		}
	}
	// Known again, and then unknown again: a new episode.
	for s := range uint32(4) {
		tab.Hear(Beacon{Shard: s, Epoch: 1, StreamTime: second}, 5*second)
	}
	if v := admit(tab, a, Request{}, 5*second); !v.Allowed || v.Unknown {
		t.Fatalf("known again: %+v", v)
	}
	tab.Tick(9 * second)
	if v := admit(tab, a, Request{}, 9*second); !v.Allowed || !v.Unknown {
		t.Fatalf("new episode: %+v", v)
	}

	refusing, b := family(Policy{StaleAfter: 3 * second})
	refusing.Tick(4 * second)
	if v := admit(refusing, b, Request{}, 4*second); v.Allowed || v.Code != usage.BillingStateUnknown {
		t.Fatalf("mode refuse: %+v", v)
	}
}

func TestTheUnknownBoundHoldsWithManyCallers(t *testing.T) {
	t.Parallel()
	tab, a := family(Policy{Pass: true, MaxCalls: 1000, StaleAfter: second})
	tab.Tick(4 * second)
	team, _ := tab.ByID("team")
	var wg sync.WaitGroup
	passed := make([]int, 8)
	for w := range passed {
		wg.Add(1)
		go func() {
			defer wg.Done()
			who := a
			if w%2 == 0 {
				who = team
			}
			for range 1000 {
				if tab.Decide(who, Request{}, 4*second).Allowed {
					passed[w]++
				}
			}
		}()
	}
	wg.Wait()
	sum := 0
	for _, n := range passed {
		sum += n
	}
	if sum != 1000 {
		t.Fatalf("%d calls passed, the bound is 1000", sum)
	}
}

func TestAnOldOwnersBeaconDoesNotCount(t *testing.T) {
	t.Parallel()
	tab, a := family(policy)
	shard := testShardOf("org", 4)
	if !tab.Hear(Beacon{Shard: shard, Epoch: 2, StreamTime: 1}, second) {
		t.Fatal("the new owner is not heard")
	}
	if tab.Hear(Beacon{Shard: shard, Epoch: 1, StreamTime: 2}, 10*second) {
		t.Fatal("the old owner is heard")
	}
	tab.Tick(10 * second)
	if tab.Fine(a) {
		t.Fatal("the old owner's beacon made the shard known")
	}
	if tab.Hear(Beacon{Shard: 99, Epoch: 1}, 0) {
		t.Fatal("a shard that does not exist is heard")
	}
}

func TestAStaleMirrorBecomesUnknownAfterTheGrace(t *testing.T) {
	t.Parallel()
	tab, a := family(policy)
	tab.DecisionsStale(second)
	tab.DirectoryStale(second)
	for s := range uint32(4) {
		tab.Hear(Beacon{Shard: s, Epoch: 1, StreamTime: second}, 4*second)
	}
	tab.Tick(4 * second)
	if !tab.Fine(a) {
		t.Fatal("unknown within the grace")
	}
	for s := range uint32(4) {
		tab.Hear(Beacon{Shard: s, Epoch: 1, StreamTime: second}, 4*second+1)
	}
	tab.Tick(4*second + 1)
	if tab.Fine(a) {
		t.Fatal("known after the grace")
	}
	if _, found := tab.ByID("nobody"); found != CannotTell {
		t.Fatalf("a stale directory says %v", found)
	}
	tab.ResetDecisions(nil)
	tab.Tick(4*second + 1)
	if !tab.Fine(a) {
		t.Fatal("unknown after the reset")
	}
}

func TestTheGravestDecisionIsChosenWhateverTheOrder(t *testing.T) {
	t.Parallel()
	limit := func(id string, code usage.Code, amount int64, end usage.Micros) func(*usage.Decision) {
		return func(d *usage.Decision) { d.LimitID, d.Code, d.Amount, d.PeriodEnd = id, code, amount, end }
	}
	all := []Keyed{ // from the gravest on
		deny("org", 1, limit("pro/pay", usage.PaymentFailed, 0, 0)),
		deny("svc", 1, limit("pro/spend", usage.SpendCapReached, 5, 60*second)),
		deny("team", 1, limit("pro/life", usage.QuotaExceeded, 50, 0)),
		deny("svc", 1, limit("pro/day", usage.QuotaExceeded, 100, 86400*second)),
		deny("svc", 1, limit("pro/small", usage.QuotaExceeded, 5, 60*second)),
		deny("org", 1, limit("pro/large", usage.QuotaExceeded, 500, 60*second)),
		deny("svc", 1, limit("pro/rate", usage.RateLimited, 1, 60*second)),
	}
	rapid.Check(t, func(r *rapid.T) {
		tab, a := family(policy)
		perm := rapid.Permutation(all).Draw(r, "order")
		for _, k := range perm {
			tab.Apply(k)
		}
		for i, k := range all {
			v := tab.Decide(a, Request{}, second)
			if v.Decision == nil || v.Decision.LimitID != k.LimitID || v.Code != k.Code {
				r.Fatalf("%d: got %+v, want %s", i, v.Decision, k.LimitID)
			}
			if got := tab.Violations(a, Request{}, second, 3); len(got) != min(3, len(all)-i) || got[0].LimitID != k.LimitID {
				r.Fatalf("violations: %v", got)
			}
			next := k
			next.Revision, next.Seq, next.Verdict, next.Code = 2, 2, usage.Allow, ""
			tab.Apply(next)
		}
	})
}

func TestADenyWithoutAKnownCodeStillAnswers402(t *testing.T) {
	t.Parallel()
	tab, a := family(policy)
	tab.Apply(deny("svc", 1, func(d *usage.Decision) { d.Code = "FROM_THE_FUTURE" }))
	if v := admit(tab, a, Request{}, 0); v.Code != usage.QuotaExceeded {
		t.Fatalf("got %+v", v)
	}
}

// Law 6: whatever comes in whatever order, what is held for a key is its newest
// revision.
func TestAnOlderRevisionNeverReplacesANewerOne(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		tab, _ := family(policy)
		accounts := []string{"svc", "team", "org"}
		type key struct{ account, limit string }
		type newest struct {
			revision, seq uint64
			deny          bool
		}
		model := make(map[key]newest)
		var seq uint64
		for range rapid.IntRange(1, 60).Draw(r, "steps") {
			k := key{rapid.SampledFrom(accounts).Draw(r, "account"), rapid.SampledFrom([]string{"p/a", "p/b"}).Draw(r, "limit")}
			kv := "0." + k.account + "." + k.limit
			switch rapid.IntRange(0, 9).Draw(r, "what") {
			case 0: // a resync, of which some keys may be gone, and some be older than what the feed brought
				var all []Keyed
				next := make(map[key]newest)
				for mk, m := range model {
					if rapid.Bool().Draw(r, "gone") {
						continue
					}
					c := m
					if rapid.Bool().Draw(r, "behind") && c.revision > 1 {
						c.revision, c.deny = c.revision-1, !c.deny
					}
					d := deny(mk.account, c.revision, func(d *usage.Decision) {
						d.LimitID = mk.limit
						if !c.deny {
							d.Verdict = usage.Allow
						}
					})
					d.Seq = c.seq
					all = append(all, d)
					next[mk] = m
				}
				tab.ResetDecisions(all)
				model = next
			case 1:
				seq++
				if tab.Delete(kv, seq) {
					m := model[k]
					m.seq, m.deny = seq, false
					model[k] = m
				}
			default:
				seq++
				revision := rapid.Uint64Range(1, 20).Draw(r, "revision")
				isDeny := rapid.Bool().Draw(r, "deny")
				d := deny(k.account, revision, func(d *usage.Decision) {
					d.LimitID = k.limit
					if !isDeny {
						d.Verdict = usage.Allow
					}
				})
				d.Seq = seq
				applied := tab.Apply(d)
				m, there := model[k]
				if want := !there || revision >= m.revision; applied != want {
					r.Fatalf("revision %d after %+v: applied %v", revision, m, applied)
				}
				if applied {
					model[k] = newest{revision, seq, isDeny}
				}
			}
			want := make(map[string]int)
			for k, m := range model {
				if m.deny {
					want[k.account]++
				}
			}
			for _, id := range accounts {
				a, _ := tab.ByID(id)
				var held []*usage.Decision
				if p := a.held.Load(); p != nil {
					held = *p
				}
				if len(held) != want[id] {
					r.Fatalf("%s: %d denies are held, want %d", id, len(held), want[id])
				}
				for _, d := range held {
					if m := model[key{id, d.LimitID}]; d.Revision != m.revision {
						r.Fatalf("%s %s: revision %d, want %d", id, d.LimitID, d.Revision, m.revision)
					}
				}
			}
		}
	})
}

func TestWhatTheDirectoryLosesGoesAndWhatIsHeldStays(t *testing.T) {
	t.Parallel()
	tab, svc := family(policy)
	tab.Apply(deny("team", 1))
	old, fresh := KeyHash(sha256.Sum256([]byte("secret"))), KeyHash(sha256.Sum256([]byte("new")))
	org := tab.Handle("org")
	if !org.HasBelow() || svc.HasBelow() {
		t.Error("who is on another's path is not known")
	}
	for _, id := range []string{"org", "team", "other"} {
		tab.DeleteAccount(id, 2)
	}
	tab.DeleteKey(old, 2)
	tab.SetAccount(AccountRecord{ID: "svc", Path: []string{"svc", "org2"}, Seq: 2})
	tab.SetAccount(AccountRecord{ID: "org2", Path: []string{"org2"}, Seq: 2})
	tab.SetKey(Key{Hash: fresh, KeyID: "k2", Account: "svc", Seq: 2})
	if org.HasBelow() {
		t.Error("an account has somebody below it that moved away")
	}
	if d := cmp.Diff([]string{"svc"}, tab.Below(func(a *Account) bool { return a == svc })); d != "" {
		t.Error(d)
	}
	tab.DirectoryRead()
	if _, found := tab.ByKey(&old); found != NotFound {
		t.Fatalf("the old key: %v", found)
	}
	c, found := tab.ByKey(&fresh)
	if found != Found || c.Account != svc {
		t.Fatalf("the new key: %+v %v", c, found)
	}
	if _, found := tab.ByID("org"); found != NotFound {
		t.Fatalf("a removed account: %v", found)
	}
	if root, _, _ := svc.Root(); root != "org2" {
		t.Fatalf("root %q", root)
	}
	if d := cmp.Diff(Size{Accounts: 2, Keys: 1, Exceptional: 1}, tab.Size()); d != "" {
		t.Fatal(d)
	}
	// The deny of a team that is gone is kept: its record may come back.
	tab.SetAccount(AccountRecord{ID: "team", Path: []string{"team"}, Seq: 9})
	team, _ := tab.ByID("team")
	if v := admit(tab, team, Request{}, 0); v.Allowed {
		t.Fatal("the deny was lost")
	}
}

func TestOlderChangesOfTheDirectoryAreIgnored(t *testing.T) {
	t.Parallel()
	tab, _ := family(policy)
	h := KeyHash(sha256.Sum256([]byte("k")))
	tab.SetKey(Key{Hash: h, KeyID: "new", Account: "svc", Seq: 10})
	tab.SetKey(Key{Hash: h, KeyID: "old", Account: "team", Seq: 9})
	tab.DeleteKey(h, 9)
	if c, found := tab.ByKey(&h); found != Found || *c.KeyID != "new" {
		t.Fatalf("%+v %v", c, found)
	}
	tab.DeleteKey(h, 11)
	if _, found := tab.ByKey(&h); found != NotFound {
		t.Fatalf("%v", found)
	}
	tab.SetKey(Key{Hash: h, KeyID: "again", Account: "svc", Seq: 12})
	if _, found := tab.ByKey(&h); found != Found {
		t.Fatalf("%v", found)
	}
	tab.SetAccount(AccountRecord{ID: "svc", Path: []string{"svc"}, Seq: 20})
	tab.SetAccount(AccountRecord{ID: "svc", Path: []string{"svc", "org"}, Seq: 19})
	tab.DeleteAccount("svc", 19)
	a, _ := tab.ByID("svc")
	if root, _, _ := a.Root(); root != "svc" {
		t.Fatalf("root %q", root)
	}
	tab.DeleteAccount("svc", 21)
	if a.Known() {
		t.Fatal("still there")
	}
}

// The index against a map, with growth and deletions.
func TestIndexBehavesLikeAMap(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		var x index[string]
		x.reset(0, func(s *string) uint64 { return uint64(len(*s)) }) // collides on purpose
		model := make(map[string]*Account)
		for range rapid.IntRange(0, 200).Draw(r, "n") {
			k := fmt.Sprint(rapid.IntRange(0, 120).Draw(r, "key"))
			if rapid.IntRange(0, 3).Draw(r, "delete") == 0 {
				if x.get(&k, uint64(len(k))) != nil {
					x.put(&cell[string]{key: k})
				}
				delete(model, k)
				continue
			}
			a := &Account{id: k}
			x.put(&cell[string]{key: k, account: a})
			model[k] = a
		}
		n := 0
		x.each(func(c *cell[string]) {
			n++
			if model[c.key] != c.account {
				r.Fatalf("%s differs", c.key)
			}
		})
		if n != len(model) {
			r.Fatalf("%d keys, want %d", n, len(model))
		}
		for k, a := range model {
			if c := x.get(&k, uint64(len(k))); c == nil || c.account != a {
				r.Fatalf("%s is not found", k)
			}
		}
	})
}

func TestReadersAndTheWriterAtOnce(t *testing.T) {
	t.Parallel()
	tab, svc := family(policy)
	h := KeyHash(sha256.Sum256([]byte("secret")))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for {
				select {
				case <-stop:
					return
				default:
				}
				if c, found := tab.ByKey(&h); found != Found || c.Account != svc {
					t.Error("the key is missing")
					return
				}
				// The revision in force never goes back: allow and deny alternate,
				// and denies grow.
				if v := admit(tab, svc, Request{}, second); !v.Allowed && v.Decision.Used != int64(v.Decision.Revision) {
					t.Error("a torn decision")
					return
				}
				_, _ = tab.ByID("account-17")
			}
		}()
	}
	for i := range uint64(2000) {
		tab.Apply(deny("team", 2*i+1, func(d *usage.Decision) { d.Used = int64(d.Revision) }))
		tab.SetAccount(AccountRecord{ID: fmt.Sprint("account-", i), Path: []string{fmt.Sprint("account-", i)}, Seq: i})
		tab.SetKey(Key{Hash: sha256.Sum256(fmt.Append(nil, i)), Account: "svc", Seq: i})
		tab.Apply(allow("team", 2*i+2))
		tab.Hear(Beacon{Shard: uint32(i % 4), Epoch: 1, StreamTime: usage.Micros(i)}, usage.Micros(i))
	}
	close(stop)
	wg.Wait()
}

func TestTheOffsetOfTheLedgersClock(t *testing.T) {
	t.Parallel()
	var c streamClock
	if c.offset() != 0 {
		t.Fatal("an offset out of nothing")
	}
	c.observe(100*second, 0, 101*second) // late, as beacons are
	if got := c.offset(); got != 0 {
		t.Fatalf("lateness is taken for a difference: %d", got)
	}
	c.observe(110*second, 0, 105*second)
	if got := c.offset(); got != int64(5*second) {
		t.Fatalf("ahead: %d", got)
	}
	c.observe(100*second, 0, 106*second) // an older one does not count less
	if got := c.offset(); got != int64(5*second) {
		t.Fatalf("the best is forgotten: %d", got)
	}
	// Half a minute later twice: what was learned is gone, and we are ahead.
	c.observe(130*second, 0, 140*second)
	c.observe(165*second, 0, 175*second)
	if got := c.offset(); got != int64(-10*second)+clockSlack {
		t.Fatalf("behind: %d", got)
	}
}

// Counting that lags is not a clock that is behind: a block still ends at its time
// (law 6).
func TestALaggingOwnerDoesNotProlongBlocks(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		ours, owners usage.Micros // ahead of the ledger's clock
		late         usage.Micros // the block's end, at most by the lag
	}{
		"all clocks agree":      {0, 0, 0},
		"ours is ahead":         {600 * second, 0, 0},
		"ours is behind":        {-600 * second, 0, 58 * second},
		"the owner's is ahead":  {0, 600 * second, 0},
		"the owner's is behind": {0, -600 * second, 57 * second},
	} {
		tab := New(1, func(string, uint32) uint32 { return 0 }, Policy{StaleAfter: 3 * second})
		tab.setDirectory(nil, []AccountRecord{{ID: "acme", Path: []string{"acme"}}})
		tab.ResetDecisions(nil)
		start := usage.Micros(1_700_000_000) * second
		end := start + 300*second
		tab.Apply(Keyed{Key: "k", Seq: 1, Decision: usage.Decision{Account: "acme", LimitID: "l", Verdict: usage.Deny, Revision: 1, PeriodEnd: end}})
		a, _ := tab.ByID("acme")
		freed := usage.Micros(0)
		for at := start; at < end+1000*second && freed == 0; at += second / 4 { // the ledger's clock
			tab.Hear(Beacon{Shard: 0, Epoch: 1, StreamTime: at - 58*second, SentAt: at + c.owners}, at+c.ours)
			if tab.Decide(a, Request{}, at+c.ours).Allowed {
				freed = at
			}
		}
		if d := freed - end; d < c.late-2*second || d > c.late+2*second {
			t.Errorf("%s: the block ends %d s after its time, want %d", name, d/second, c.late/second)
		}
	}
}
