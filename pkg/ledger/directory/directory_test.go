package directory

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// draw draws ids that crowd few parts, so that parts have several entries.
func draw(t *rapid.T, label string) (accounts []Account, keys []Key) {
	id := rapid.SampledFrom([]string{"a", "b/ü", strings.Repeat("long", 64), "c c", "\x01", "acme", "d", "e"})
	for i := range rapid.IntRange(0, 40).Draw(t, label+" accounts") {
		accounts = append(accounts, Account{ID: fmt.Sprint(id.Draw(t, "id"), i), Parent: rapid.SampledFrom([]string{"", "p"}).Draw(t, "parent"), Plan: rapid.SampledFrom([]string{"", "q"}).Draw(t, "plan")})
	}
	for i := range rapid.IntRange(0, 40).Draw(t, label+" keys") {
		h := sha256.Sum256([]byte{byte(i)})
		h[0], h[1] = 0, byte(rapid.IntRange(0, 255).Draw(t, "part"))
		keys = append(keys, Key{Hash: h, ID: fmt.Sprint("k", i), Account: id.Draw(t, "owner")})
	}
	return accounts, keys
}

// Any program can read the records with the published schema alone.
func TestTheRecordsAreThePublishedMessages(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		accounts, keys := draw(t, "all")
		records, err := Records([]usage.Plan{{ID: "q", Limits: []usage.Limit{{ID: "l", Meter: usage.Calls, Amount: 1}}}}, accounts, keys)
		if err != nil {
			t.Fatal(err)
		}
		var gotAccounts []Account
		var gotKeys []Key
		for key, value := range records {
			switch kind, part := ParseKey(key); kind {
			case Plans:
				if plans, err := ReadPlans(value); err != nil || len(plans) != 1 || plans[0].Limits[0].ID != "l" {
					t.Errorf("plans %v %v", plans, err)
				}
			case AccountsPart:
				var m tollkeeperv1.DirectoryAccounts
				if err := proto.Unmarshal(value, &m); err != nil {
					t.Fatal(err)
				}
				for _, a := range m.GetAccounts() {
					gotAccounts = append(gotAccounts, Account{a.GetId(), a.GetParent(), a.GetPlan()})
				}
				again, err := proto.MarshalOptions{Deterministic: true}.Marshal(&m)
				if err != nil || !bytes.Equal(again, value) {
					t.Errorf("the message is %x, written is %x (%v)", again, value, err)
				}
				p, err := ReadAccounts(part, value)
				if err != nil || p.Len() != len(m.GetAccounts()) {
					t.Fatalf("%d accounts are read of %d: %v", p.Len(), len(m.GetAccounts()), err)
				}
				for _, a := range m.GetAccounts() {
					if got, ok := p.Account(a.GetId()); !ok || got != (Account{a.GetId(), a.GetParent(), a.GetPlan()}) {
						t.Errorf("found %+v, %v for %v", got, ok, a)
					}
				}
				if _, ok := p.Account("nobody"); ok {
					t.Error("an account that is not there is found")
				}
			case KeysPart:
				var m tollkeeperv1.DirectoryKeys
				if err := proto.Unmarshal(value, &m); err != nil {
					t.Fatal(err)
				}
				p, err := ReadKeys(part, value)
				if err != nil {
					t.Fatal(err)
				}
				for _, k := range m.GetKeys() {
					got, ok := p.Key(Hash(k.GetSha256()))
					if !ok || !p.Has(got.Hash) || got.ID != k.GetKeyId() || got.Account != k.GetAccount() {
						t.Errorf("found %+v, %v for %v", got, ok, k)
					}
					gotKeys = append(gotKeys, got)
				}
				if p.Has(Hash{1: byte(part << 6), 5: 1}) {
					t.Error("a key that is not there is found")
				}
			default:
				t.Errorf("a record %q", key)
			}
		}
		byID := func(a, b Account) int { return strings.Compare(a.ID, b.ID) }
		byHash := func(a, b Key) int { return bytes.Compare(a.Hash[:], b.Hash[:]) }
		slices.SortFunc(accounts, byID)
		slices.SortFunc(gotAccounts, byID)
		slices.SortFunc(keys, byHash)
		slices.SortFunc(gotKeys, byHash)
		if d := cmp.Diff(accounts, gotAccounts); d != "" {
			t.Error(d)
		}
		if d := cmp.Diff(keys, gotKeys); d != "" {
			t.Error(d)
		}
	})
}

func TestDifferencesOfTwoPartsAreAllFound(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		of := func(label string) (*Part, map[string]Key) {
			keys := map[string]Key{}
			for i := range 12 {
				if n := rapid.IntRange(0, 3).Draw(t, label); n > 0 {
					h := Hash{31: byte(i)}
					keys[string(h[:])] = Key{Hash: h, ID: "k", Account: fmt.Sprint(n)}
				}
			}
			records, err := Records(nil, nil, slices.Collect(maps.Values(keys)))
			if err != nil {
				t.Fatal(err)
			}
			p, err := ReadKeys(0, records[KeysKey(0)])
			if err != nil {
				t.Fatal(err)
			}
			return p, keys
		}
		old, before := of("old")
		next, after := of("next")
		want := map[string]bool{}
		for h := range before {
			want[h] = after[h] != before[h]
		}
		for h := range after {
			want[h] = after[h] != before[h]
		}
		maps.DeleteFunc(want, func(_ string, differs bool) bool { return !differs })
		got := map[string]bool{}
		Differ(old, next, func(first []byte) { got[string(first)] = true })
		if d := cmp.Diff(want, got); d != "" {
			t.Error(d)
		}
	})
}

func TestWhatIsNoPartIsRefused(t *testing.T) {
	t.Parallel()
	entry := func(id string) []byte { return appendEntry(nil, []byte(id), "", "") }
	part := AccountPart("a")
	twin := "" // another id of the same part
	for i := 0; twin == ""; i++ {
		if id := fmt.Sprint("b", i); AccountPart(id) == part {
			twin = id
		}
	}
	good := append(entry("a"), entry(twin)...)
	if _, err := ReadAccounts(part, good); err != nil {
		t.Fatal(err)
	}
	if p, err := ReadAccounts(part, append(slices.Clone(good), 0x78, 1)); err != nil || p.Len() != 2 {
		t.Errorf("a field of a newer writer is not skipped: %v", err)
	}
	for name, data := range map[string][]byte{
		"cut": good[:len(good)-1], "the wrong part": entry("not of this part"), "twice": append(entry("a"), entry("a")...),
		"out of order": append(entry(twin), entry("a")...), "no id": entry(""), "no protobuf": []byte("\xff"), "a cut entry": {0x0a, 2, 0x0a, 9},
	} {
		if _, err := ReadAccounts(part, data); err == nil {
			t.Errorf("%s: it is read", name)
		}
	}
	if _, err := ReadKeys(0, appendEntry(nil, []byte("short"), "k", "a")); err == nil {
		t.Error("a short hash is read")
	}
	for _, key := range []string{"", "accounts", "accounts.", "accounts.-1", "accounts.1024", "accounts.07", "keys.x", "plan", "key.00"} {
		if kind, _ := ParseKey(key); kind != Other {
			t.Errorf("%q is taken for a record", key)
		}
	}
}

func FuzzReadAccounts(f *testing.F) {
	f.Add([]byte("\x0a\x03\x0a\x01a"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := ReadAccounts(AccountPart("a"), data)
		if err != nil {
			return
		}
		Differ(nil, p, func(id []byte) {
			if a, ok := p.Account(string(id)); !ok || a.ID != string(id) {
				t.Errorf("%q is not found", id)
			}
		})
	})
}
