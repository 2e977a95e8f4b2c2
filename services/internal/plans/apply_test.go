package plans

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/ledger/directory"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
	"github.com/tollkeeper/tollkeeper/services/internal/plans/internal/records"
)

const testShards = 4

// bus is a real NATS with the ledger's streams.
type bus struct {
	nc *nats.Conn
	js jetstream.JetStream
}

func newBus(t *testing.T) bus {
	t.Helper()
	s, err := embednats.Start(t.Context(), embednats.Options{StoreDir: t.TempDir(), Sync: time.Minute, MaxFile: 100 << 30})
	if err != nil {
		t.Fatal(err)
	}
	nc, err := nats.Connect(s.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		nc.Close()
		if err := s.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{Shards: testShards}); err != nil {
		t.Fatal(err)
	}
	return bus{nc, js}
}

// reset makes the ledger empty again.
func (b bus) reset(t *testing.T) {
	t.Helper()
	for _, name := range []string{ledger.Stream, "KV_" + ledger.ConfigBucket, "KV_" + ledger.DirectoryBucket} {
		if err := b.js.DeleteStream(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := ledger.Provision(t.Context(), b.js, ledger.ProvisionOptions{Shards: testShards}); err != nil {
		t.Fatal(err)
	}
}

// applier is one that sees soon that another has died.
func (b bus) applier() *Applier { return &Applier{JS: b.js, NC: b.nc, renewal: 5 * time.Millisecond} }

// fold is what the shards know after reading all control entries, each id once.
type fold struct {
	Plans    map[uint32]string // version by shard
	Accounts map[string]usage.Account
	Entries  int
}

func (b bus) fold(t *testing.T) fold {
	t.Helper()
	f := fold{Plans: map[uint32]string{}, Accounts: map[string]usage.Account{}}
	seen := map[string]bool{}
	stream, err := b.js.Stream(t.Context(), ledger.Stream)
	if err != nil {
		t.Fatal(err)
	}
	for seq := uint64(1); seq <= stream.CachedInfo().State.LastSeq; seq++ {
		m, err := stream.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		_, shard, err := ledger.ParseSubject(m.Subject)
		if err != nil {
			t.Fatal(err)
		}
		e, err := ledger.DecodeControl(m.Header, m.Data)
		if err != nil {
			t.Fatal(err)
		}
		f.Entries++
		if id := fmt.Sprint(shard, " ", e.GetId()); seen[id] {
			continue
		} else {
			seen[id] = true
		}
		if set := e.GetPlanSet(); set != nil {
			f.Plans[shard] = set.GetVersion()
		}
		for _, a := range e.GetAccountSet().GetAccounts() {
			f.Accounts[a.GetId()] = ledger.AccountFromProto(a)
		}
	}
	return f
}

// records is the directory as gateways see it.
func (b bus) records(t *testing.T) map[string]string {
	t.Helper()
	kv, err := b.js.KeyValue(t.Context(), ledger.DirectoryBucket)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := kv.ListKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for k := range keys.Keys() {
		e, err := kv.Get(t.Context(), k)
		if err != nil {
			t.Fatal(err)
		}
		out[k] = string(e.Value())
	}
	return out
}

// expect checks that everything everywhere says what doc says.
func (b bus) expect(t *testing.T, doc *Document) {
	t.Helper()
	now, err := b.applier().Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if now.Version != Version(doc) || Version(now.Document) != now.Version || now.Unfinished != "" {
		t.Errorf("what holds is %s (document %s, unfinished %q), want %s", now.Version, Version(now.Document), now.Unfinished, Version(doc))
	}
	f := b.fold(t)
	for shard := range uint32(testShards) {
		if len(doc.Plans) > 0 && f.Plans[shard] != PlansVersion(doc) {
			t.Errorf("shard %d has plans %s, want %s", shard, f.Plans[shard], PlansVersion(doc))
		}
	}
	want := map[string]usage.Account{}
	for _, a := range doc.Accounts {
		want[a.ID] = usage.Account{ID: a.ID, Parent: a.Parent, Plan: a.Plan}
	}
	open := map[string]usage.Account{}
	for id, a := range f.Accounts {
		if !a.Closed {
			open[id] = a
		}
	}
	if diff := cmp.Diff(want, open); diff != "" {
		t.Errorf("accounts in the ledger: %s", diff)
	}
	data, err := records.Of(doc)
	if err != nil {
		t.Fatal(err)
	}
	wantRecords := map[string]string{}
	for k, v := range data {
		wantRecords[k] = string(v)
	}
	got := b.records(t)
	for k, v := range got {
		if v == "" {
			delete(got, k) // nothing is left in it
		}
	}
	if diff := cmp.Diff(wantRecords, got); diff != "" {
		t.Errorf("directory: %s", diff)
	}
}

func first() *Document {
	return &Document{
		Version: 1,
		Plans: []Plan{
			{ID: "free", Limits: []Limit{{ID: "calls", Meter: "calls", Window: "minute", Amount: 10}}},
			{ID: "team", Limits: []Limit{{ID: "spend", Meter: "cost", Window: "month", Amount: 1000, Code: "SPEND_CAP_REACHED"}}},
		},
		Accounts: []Account{
			{ID: "acme", Plan: "team"},
			{ID: "acme/search", Parent: "acme", Plan: "free", Keys: []Key{{ID: "k1", SHA256: HashKey("1")}, {ID: "k2", SHA256: HashKey("2")}}},
			{ID: "gone", Plan: "free", Keys: []Key{{ID: "k3", SHA256: HashKey("3")}}},
			{ID: "solo", Plan: "free", Keys: []Key{{ID: "k4", SHA256: HashKey("4")}}},
		},
	}
}

// second removes an account and keys, moves a key, changes, adds and removes plans.
func second() *Document {
	return &Document{
		Version: 1,
		Plans: []Plan{
			{ID: "free", Limits: []Limit{{ID: "calls", Meter: "calls", Window: "minute", Amount: 20}}},
			{ID: "pro", Limits: []Limit{{ID: "tokens", Meter: "output_tokens", Window: "day", Amount: 5000, WarnPercent: 80}}},
		},
		Accounts: []Account{
			{ID: "acme", Plan: "pro"},
			{ID: "acme/search", Parent: "acme", Plan: "free", Keys: []Key{{ID: "k1", SHA256: HashKey("1")}}},
			{ID: "acme/search/web", Parent: "acme/search", Keys: []Key{{ID: "k2", SHA256: HashKey("2")}}},
			{ID: "solo", Plan: "free", Keys: []Key{{ID: "k4", SHA256: HashKey("4")}}},
		},
	}
}

func TestApplyingMakesTheDocumentHold(t *testing.T) {
	t.Parallel()
	b := newBus(t)
	empty, err := b.applier().Current(t.Context())
	if err != nil || empty.Revision != 0 || empty.Version != "" || empty.Document == nil {
		t.Fatalf("before anything was applied: %+v, %v", empty, err)
	}
	planned, err := b.applier().Plan(t.Context(), first())
	if err != nil {
		t.Fatal(err)
	}
	done, err := b.applier().Apply(t.Context(), first(), "ada")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(planned, done); diff != "" {
		t.Errorf("something else was done than planned: %s", diff)
	}
	b.expect(t, first())

	entries := b.fold(t).Entries
	if again, err := b.applier().Apply(t.Context(), first(), "ada"); err != nil || !again.Empty() {
		t.Errorf("the same again: %v, %v", again, err)
	}
	if n := b.fold(t).Entries; n != entries {
		t.Errorf("the same again wrote %d entries", n-entries)
	}

	if _, err := b.applier().Apply(t.Context(), second(), "bob"); err != nil {
		t.Fatal(err)
	}
	b.expect(t, second())
	if a := b.fold(t).Accounts["gone"]; !a.Closed {
		t.Errorf("the removed account is %+v, want it closed", a)
	}
	now, err := b.applier().Current(t.Context())
	if err != nil || now.Author != "bob" || now.AppliedAt == 0 {
		t.Errorf("got %+v, %v", now, err)
	}
	b.onlyOneDocument(t)
}

// onlyOneDocument checks that replaced documents are removed.
func (b bus) onlyOneDocument(t *testing.T) {
	t.Helper()
	kv, err := b.js.KeyValue(t.Context(), ledger.ConfigBucket)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := kv.Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	keys = slices.DeleteFunc(keys, func(k string) bool { return !strings.HasPrefix(k, documentPrefix) })
	if len(keys) != 1 {
		t.Errorf("the bucket has %v, want one document", keys)
	}
}

func TestOnlyAChangedAccountIsWritten(t *testing.T) {
	t.Parallel()
	b := newBus(t)
	if _, err := b.applier().Apply(t.Context(), first(), "ada"); err != nil {
		t.Fatal(err)
	}
	before := b.fold(t).Entries
	next := Merge(first(), &Document{Version: 1, Accounts: []Account{{ID: "new", Plan: "free", Keys: []Key{{ID: "k9", SHA256: HashKey("9")}}}}})
	diff, err := b.applier().Apply(t.Context(), next, "ada")
	if err != nil {
		t.Fatal(err)
	}
	if len(diff.Accounts) != 1 || len(diff.Plans) != 0 {
		t.Errorf("got %s", diff)
	}
	b.expect(t, next)
	if n := b.fold(t).Entries - before; n != 1 {
		t.Errorf("%d entries for one account", n)
	}
}

// A gateway reads the directory at any moment: between two writes it must never find a
// key without its account, an account without the one above it, or without its plan.
func TestTheDirectoryFitsTogetherAtEveryStepOfAnAct(t *testing.T) {
	t.Parallel()
	b := newBus(t)
	look := func(step string) error {
		if step != "record" && step != "records" {
			return nil
		}
		plans, accounts := map[string]bool{"": true}, map[string]directory.Account{}
		var keys []directory.Key
		for key, value := range b.records(t) {
			switch kind, part := directory.ParseKey(key); kind {
			case directory.Plans:
				list, err := directory.ReadPlans([]byte(value))
				if err != nil {
					return err
				}
				for _, p := range list {
					plans[p.ID] = true
				}
			case directory.AccountsPart:
				p, err := directory.ReadAccounts(part, []byte(value))
				if err != nil {
					return err
				}
				directory.Differ(nil, p, func(id []byte) {
					a, _ := p.Account(string(id))
					accounts[a.ID] = a
				})
			case directory.KeysPart:
				p, err := directory.ReadKeys(part, []byte(value))
				if err != nil {
					return err
				}
				directory.Differ(nil, p, func(h []byte) {
					k, _ := p.Key(directory.Hash(h))
					keys = append(keys, k)
				})
			default:
				t.Errorf("a record %s", key)
			}
		}
		for _, k := range keys {
			if _, ok := accounts[k.Account]; !ok {
				t.Errorf("at %s key %s leads to %s, which is not there", step, k.ID, k.Account)
			}
		}
		for _, a := range accounts {
			if _, ok := accounts[a.Parent]; a.Parent != "" && !ok && step != "record" {
				t.Errorf("at %s account %s is below %s, which is not there", step, a.ID, a.Parent)
			}
			if !plans[a.Plan] {
				t.Errorf("at %s account %s has plan %s, which is not there", step, a.ID, a.Plan)
			}
		}
		return nil
	}
	a := b.applier()
	a.step = look
	for _, doc := range []*Document{first(), second(), first(), {Version: 1}} {
		if _, err := a.Apply(t.Context(), doc, "ada"); err != nil {
			t.Fatal(err)
		}
		b.expect(t, doc)
	}
}

// Whatever was ever in the directory, a gateway that starts reads the records that there
// are, and no markers of those that went away.
func TestADirectoryDoesNotGrowByWhatWasRemoved(t *testing.T) {
	t.Parallel()
	b := newBus(t)
	for n := range 3 {
		doc := &Document{Version: 1, Plans: []Plan{{ID: fmt.Sprint("plan-", n), Limits: []Limit{{ID: "calls", Meter: "calls", Window: "day", Amount: 1}}}}}
		for i := range 5000 {
			id := fmt.Sprintf("account-%d-%d", n, i)
			doc.Accounts = append(doc.Accounts, Account{ID: id, Plan: doc.Plans[0].ID, Keys: []Key{{ID: id, SHA256: HashKey(id)}}})
		}
		if _, err := b.applier().Apply(t.Context(), doc, "ada"); err != nil {
			t.Fatal(err)
		}
		b.expect(t, doc)
	}
	s, err := b.js.Stream(t.Context(), "KV_"+ledger.DirectoryBucket)
	if err != nil {
		t.Fatal(err)
	}
	if n := s.CachedInfo().State.Msgs; n > 2*directory.Parts+1 {
		t.Errorf("%d messages for 5000 accounts after 10000 were removed, and %d hold any directory", n, 2*directory.Parts+1)
	}
}

var errCrash = errors.New("killed")

// steps counts the points between two steps of applying next.
func (b bus) steps(t *testing.T) int {
	t.Helper()
	if _, err := b.applier().Apply(t.Context(), first(), "ada"); err != nil {
		t.Fatal(err)
	}
	n := 0
	a := b.applier()
	a.step = func(string) error { n++; return nil }
	if _, err := a.Apply(t.Context(), second(), "bob"); err != nil {
		t.Fatal(err)
	}
	return n
}

func dieAt(n int) func(string) error {
	return func(string) error {
		if n--; n < 0 {
			return errCrash
		}
		return nil
	}
}

// Whoever hears nothing may say that nothing was changed.
func TestAnApplyThatMayHaveChangedSomethingHasSaidSo(t *testing.T) {
	t.Parallel()
	b := newBus(t)
	n := b.steps(t)
	silent, heard := 0, 0
	for at := range n {
		b.reset(t)
		if _, err := b.applier().Apply(t.Context(), first(), "ada"); err != nil {
			t.Fatal(err)
		}
		before, err := b.applier().Current(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		began := false
		dies := b.applier()
		dies.step, dies.Began = dieAt(at), func() { began = true }
		if _, err := dies.Apply(t.Context(), second(), "bob"); !errors.Is(err, errCrash) {
			t.Fatalf("step %d: %v", at, err)
		}
		if began {
			heard++
			continue
		}
		silent++
		if now, err := b.applier().Current(t.Context()); err != nil || now.Version != before.Version || now.Unfinished != "" {
			t.Errorf("step %d: nothing was said, and %+v became %+v (%v)", at, before, now, err)
		}
	}
	if silent == 0 || heard < 10 {
		t.Errorf("%d times nothing was said, %d times something", silent, heard)
	}
}

func TestACrashBetweenAnyTwoStepsIsRepairedByApplyingAgain(t *testing.T) {
	t.Parallel()
	b := newBus(t)
	n := b.steps(t)
	if n < 15 {
		t.Fatalf("only %d points to die at", n)
	}
	for at := range n {
		t.Run(fmt.Sprint(at), func(t *testing.T) {
			b.reset(t)
			if _, err := b.applier().Apply(t.Context(), first(), "ada"); err != nil {
				t.Fatal(err)
			}
			dies := b.applier()
			dies.step = dieAt(at)
			if _, err := dies.Apply(t.Context(), second(), "bob"); !errors.Is(err, errCrash) {
				t.Fatalf("got %v", err)
			}
			// And once more, a step later.
			dies.step = dieAt(2)
			if _, err := dies.Apply(t.Context(), second(), "bob"); err != nil && !errors.Is(err, errCrash) {
				t.Fatalf("got %v", err)
			}
			if _, err := b.applier().Apply(t.Context(), second(), "bob"); err != nil {
				t.Fatal(err)
			}
			b.expect(t, second())
		})
	}
}

func TestAnUnfinishedActIsCompletedBeforeAnother(t *testing.T) {
	t.Parallel()
	b := newBus(t)
	n := b.steps(t)
	third := Merge(second(), &Document{Version: 1, Accounts: []Account{{ID: "late", Plan: "pro"}}})
	for at := range n {
		t.Run(fmt.Sprint(at), func(t *testing.T) {
			b.reset(t)
			if _, err := b.applier().Apply(t.Context(), first(), "ada"); err != nil {
				t.Fatal(err)
			}
			dies := b.applier()
			dies.step = dieAt(at)
			if _, err := dies.Apply(t.Context(), second(), "bob"); !errors.Is(err, errCrash) {
				t.Fatalf("got %v", err)
			}
			other := b.applier()
			if now, err := other.Current(t.Context()); err != nil {
				t.Fatal(err)
			} else if now.Unfinished != "" {
				var busy *BusyError
				if _, err := other.Apply(t.Context(), third, "eve"); !errors.As(err, &busy) || busy.Author != "bob" {
					t.Errorf("while bob's act may go on: %v", err)
				}
			}
			other.Now = func() time.Time { return time.Now().Add(time.Minute) }
			if _, err := other.Apply(t.Context(), third, "eve"); err != nil {
				t.Fatal(err)
			}
			b.expect(t, third)
			// What bob wanted and eve did not mention must not be half there:
			// going back to the first shows it.
			if _, err := b.applier().Apply(t.Context(), first(), "ada"); err != nil {
				t.Fatal(err)
			}
			b.expect(t, first())
		})
	}
}

func TestWhatIsHalfDoneIsFinishedThoughNobodyApplies(t *testing.T) {
	t.Parallel()
	b := newBus(t)
	if err := b.applier().Finish(t.Context()); err != nil {
		t.Fatalf("nothing was ever begun: %v", err)
	}
	if _, err := b.applier().Apply(t.Context(), first(), "ada"); err != nil {
		t.Fatal(err)
	}
	dies := b.applier()
	dies.step = func(step string) error {
		if step == "entries" {
			return errCrash
		}
		return nil
	}
	if _, err := dies.Apply(t.Context(), second(), "bob"); !errors.Is(err, errCrash) {
		t.Fatalf("got %v", err)
	}
	if err := b.applier().Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	now, err := b.applier().Current(t.Context())
	if err != nil || now.Author != "ada" || now.Unfinished != Version(second()) {
		t.Fatalf("an act that may still be going on was taken over: %+v, %v", now, err)
	}
	later := b.applier()
	later.Takeover = time.Nanosecond
	if err := later.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.expect(t, second())
	now, err = b.applier().Current(t.Context())
	if err != nil || now.Author != "bob" || now.Unfinished != "" {
		t.Errorf("got %+v, %v", now, err)
	}
}

func TestWhatIsHalfDoneIsSeenByWhoeverAsksWhatWouldChange(t *testing.T) {
	t.Parallel()
	b := newBus(t)
	if _, err := b.applier().Apply(t.Context(), first(), "ada"); err != nil {
		t.Fatal(err)
	}
	dies := b.applier()
	dies.step = func(step string) error {
		if step == "entries" {
			return errCrash
		}
		return nil
	}
	if _, err := dies.Apply(t.Context(), second(), "bob"); !errors.Is(err, errCrash) {
		t.Fatal(err)
	}
	// What holds is still the first by name, and in the shards no more.
	for name, doc := range map[string]*Document{"going back": first(), "going on": second()} {
		if diff, err := b.applier().Plan(t.Context(), doc); err != nil || diff.Empty() {
			t.Errorf("%s: it says that nothing would change: %v", name, err)
		}
	}
}

func TestChangesMadeAtOnceAreAllMade(t *testing.T) {
	t.Parallel()
	b := newBus(t)
	if _, err := b.applier().Apply(t.Context(), first(), "ada"); err != nil {
		t.Fatal(err)
	}
	want := first()
	extra := func(i int) *Document {
		return &Document{Version: 1, Accounts: []Account{{ID: fmt.Sprint("extra-", i), Plan: "team"}}}
	}
	errs := make(chan error)
	const n = 4
	for i := range n {
		want = Merge(want, extra(i))
		go func() {
			_, err := b.applier().Change(t.Context(), fmt.Sprint(i), func(now *Document) *Document { return Merge(now, extra(i)) })
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	b.expect(t, want)
}

func TestOneWhoWasPausedAndOvertakenDoesNoHarm(t *testing.T) {
	t.Parallel()
	b := newBus(t)
	n := b.steps(t)
	third := first()
	third.Plans[0].Limits[0].Amount = 99
	third.Accounts[3].Keys = append(third.Accounts[3].Keys, Key{ID: "k5", SHA256: HashKey("5")})
	for at := range n {
		t.Run(fmt.Sprint(at), func(t *testing.T) {
			b.reset(t)
			if _, err := b.applier().Apply(t.Context(), first(), "ada"); err != nil {
				t.Fatal(err)
			}
			left := at
			paused := b.applier()
			paused.step = func(step string) error {
				left--
				if left != -1 {
					return nil
				}
				other := b.applier()
				other.Now = func() time.Time { return time.Now().Add(time.Minute) }
				if _, err := other.Apply(t.Context(), third, "eve"); err != nil {
					t.Errorf("at %q: %v", step, err)
				}
				return nil
			}
			_, err := paused.Apply(t.Context(), second(), "bob")
			if err != nil && !errors.Is(err, ErrConflict) {
				t.Errorf("got %v", err)
			}
			b.expect(t, third)
			b.onlyOneDocument(t)
		})
	}
}

func TestTwoWhoCompleteTheSameVersionBothEndWell(t *testing.T) {
	t.Parallel()
	b := newBus(t)
	n := b.steps(t)
	others := map[string]func(context.Context) error{
		"another apply": func(ctx context.Context) error {
			_, err := b.applier().Apply(ctx, second(), "eve")
			return err
		},
		"finished meanwhile": func(ctx context.Context) error {
			other := b.applier()
			other.Takeover = time.Nanosecond
			return other.Finish(ctx)
		},
	}
	for at := range n {
		for name, other := range others {
			t.Run(fmt.Sprint(name, " ", at), func(t *testing.T) {
				b.reset(t)
				if _, err := b.applier().Apply(t.Context(), first(), "ada"); err != nil {
					t.Fatal(err)
				}
				left := at
				paused := b.applier()
				paused.step = func(step string) error {
					if left--; left == -1 {
						if err := other(t.Context()); err != nil {
							t.Errorf("at %q: the other: %v", step, err)
						}
					}
					return nil
				}
				if _, err := paused.Apply(t.Context(), second(), "bob"); err != nil {
					t.Errorf("got %v", err)
				}
				b.expect(t, second())
				b.onlyOneDocument(t)
			})
		}
	}
}

func TestManyWhoApplyTheSameLargeVersionAtOnceAllEndWell(t *testing.T) {
	t.Parallel()
	b := newBus(t)
	doc := first()
	for i := range 3000 {
		doc.Accounts = append(doc.Accounts, Account{ID: fmt.Sprint("a", i), Plan: "free", Keys: []Key{{ID: fmt.Sprint("m", i), SHA256: HashKey(fmt.Sprint("m", i))}}})
	}
	errs := make(chan error)
	const n = 3
	for i := range n {
		go func() {
			a := b.applier()
			if i > 0 {
				a.renewal = time.Duration(i) * time.Millisecond // overtakes others though they live
			}
			_, err := a.Apply(t.Context(), doc, fmt.Sprint(i))
			errs <- err
		}()
	}
	ctx, cancel := context.WithCancel(t.Context())
	kept := make(chan error)
	go func() {
		finisher := b.applier()
		finisher.Takeover = time.Nanosecond
		kept <- finisher.KeepFinished(ctx, 10*time.Millisecond, func(err error) { t.Errorf("finishing: %v", err) })
	}()
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	cancel()
	if err := <-kept; err != nil {
		t.Error(err)
	}
	b.expect(t, doc)
}

func TestWhoeverWritesManyRecordsShowsThatItIsAlive(t *testing.T) {
	t.Parallel()
	b := newBus(t)
	doc := first()
	for i := range 2000 {
		doc.Accounts = append(doc.Accounts, Account{ID: fmt.Sprint("a", i), Plan: "free"})
	}
	s, err := openStore(t.Context(), b.js)
	if err != nil {
		t.Fatal(err)
	}
	a := b.applier()
	a.renewal = time.Nanosecond
	var told []int
	a.Progress = func(done, total int) {
		if total > 0 && (len(told) == 0 || told[len(told)-1] != done) {
			told = append(told, done)
		}
		if done > total {
			t.Errorf("%d of %d", done, total)
		}
	}
	claims := map[uint64]bool{}
	writes := 0
	a.step = func(step string) error {
		if step == "record" {
			writes++
			_, rev, _, err := s.manifest(t.Context(), pendingKey)
			if err != nil {
				t.Error(err)
			}
			claims[rev] = true
		}
		return nil
	}
	if _, err := a.Apply(t.Context(), doc, "ada"); err != nil {
		t.Fatal(err)
	}
	if writes < 4 || len(claims) != writes {
		t.Errorf("%d writes under %d claims: one who looks after 10 seconds would take it for dead", writes, len(claims))
	}
	if !slices.IsSorted(told) || len(told) < 500 {
		t.Errorf("progress was told %d times for %d accounts, in order: %t", len(told), len(doc.Accounts), slices.IsSorted(told))
	}
}

func TestOnlyWhatDoesNotGetOnIsGivenUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := &Applier{Stall: time.Minute}
		w, ctx, end := a.watched(t.Context())
		for i := range 20 {
			time.Sleep(50 * time.Second)
			w.progress(i, 20)
		}
		if ctx.Err() != nil {
			t.Fatal("given up after 1000 s though it got on")
		}
		<-ctx.Done()
		var stalled *StalledError
		if err := end(ctx.Err()); !errors.As(err, &stalled) || stalled.Done != 19 || stalled.Total != 20 || !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		_, ctx, end = a.watched(t.Context())
		if err := end(errCrash); !errors.Is(err, errCrash) || errors.As(err, &stalled) && stalled.Err == errCrash {
			t.Errorf("got %v", err)
		}
		if ctx.Err() == nil {
			t.Error("what was watched goes on")
		}
	})
}

func TestAnAccountKeepsItsRoot(t *testing.T) {
	t.Parallel()
	b := newBus(t)
	if _, err := b.applier().Apply(t.Context(), first(), "ada"); err != nil {
		t.Fatal(err)
	}
	entries := b.fold(t).Entries
	const moved = "version: 1\nplans: [{id: free}, {id: team}]\naccounts:\n- {id: solo}\n- id: acme/search\n  parent: solo\n"
	doc, err := Parse("moved.yaml", []byte(moved))
	if err != nil {
		t.Fatal(err)
	}
	want := `moved.yaml:6:11: the account "acme/search" would move from the root "acme" to "solo": the root of an account never changes: leave it, and open an account of another name under the new root`
	if _, err := b.applier().Plan(t.Context(), doc); err == nil || err.Error() != want {
		t.Errorf("planning: got %v, want %s", err, want)
	}
	if _, err := b.applier().Apply(t.Context(), doc, "ada"); err == nil || err.Error() != want {
		t.Errorf("applying: got %v, want %s", err, want)
	}
	if b.fold(t).Entries != entries {
		t.Error("a refused document wrote entries")
	}
	b.expect(t, first())

	// Also when it was removed in between.
	without := first()
	without.Accounts = slices.Delete(without.Accounts, 1, 2)
	if _, err := b.applier().Apply(t.Context(), without, "ada"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.applier().Apply(t.Context(), doc, "ada"); err == nil || err.Error() != want {
		t.Errorf("after it was removed: got %v, want %s", err, want)
	}
	if _, err := b.applier().Apply(t.Context(), first(), "ada"); err != nil {
		t.Errorf("under its own root it may come back: %v", err)
	}
	b.expect(t, first())
}

func TestManyAccountsGoInBoundedEntries(t *testing.T) {
	t.Parallel()
	b := newBus(t)
	doc := first()
	for i := range 3000 {
		doc.Accounts = append(doc.Accounts, Account{ID: fmt.Sprintf("acme/%s-%d", strings.Repeat("x", 200), i), Parent: "acme", Plan: "free", Keys: []Key{{ID: fmt.Sprint("m", i), SHA256: HashKey(fmt.Sprint("m", i))}}})
	}
	if _, err := b.applier().Apply(t.Context(), doc, "ada"); err != nil {
		t.Fatal(err)
	}
	b.expect(t, doc)
	for _, e := range entries(act{}, nil, doc, testShards) {
		if n := len(e.entry.GetAccountSet().GetAccounts()); n > maxEntryAccounts {
			t.Errorf("an entry of %d accounts", n)
		}
		if n := proto.Size(e.entry); n > maxEntryBytes+1024 {
			t.Errorf("an entry of %d bytes", n)
		}
	}
}

func TestEntriesOfAnActDifferWithinAShard(t *testing.T) {
	t.Parallel()
	doc := first()
	for i := range 2 * maxEntryAccounts {
		doc.Accounts = append(doc.Accounts, Account{ID: fmt.Sprint("acme/", i), Parent: "acme"})
	}
	a := act{ID: actID(7, "", Version(doc), 1_700_000_000_000_000), CreatedAt: 1_700_000_000_000_000}
	seen := map[string]bool{}
	all := entries(a, nil, doc, testShards)
	for _, e := range all {
		id := fmt.Sprint(e.shard, " ", e.entry.GetId())
		if seen[id] {
			t.Errorf("%s twice", id)
		}
		seen[id] = true
	}
	again := entries(a, nil, doc, testShards)
	for i := range all {
		if !proto.Equal(all[i].entry, again[i].entry) {
			t.Fatal("the same act gave other entries")
		}
	}
	var known = map[string]bool{}
	for _, e := range all {
		for _, acc := range e.entry.GetAccountSet().GetAccounts() {
			if acc.GetParent() != "" && !known[acc.GetParent()] {
				t.Fatalf("%s comes before its parent", acc.GetId())
			}
			known[acc.GetId()] = true
		}
	}
}
