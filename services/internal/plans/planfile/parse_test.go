package planfile

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/schemas"
)

const hashA = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

func good(t *testing.T) *Document {
	t.Helper()
	data, err := os.ReadFile("testdata/good.yaml")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := Parse("good.yaml", data)
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

func TestAFileBecomesADocument(t *testing.T) {
	t.Parallel()
	want := &Document{
		Version: 1,
		Plans: []Plan{
			{ID: "free", Limits: []Limit{
				{ID: "calls-per-minute", Meter: "calls", Window: "minute", Amount: 60, Code: "RATE_LIMITED"},
				{ID: "tokens-per-month", Meter: "output_tokens", Window: "month", Amount: 1_000_000, WarnPercent: 80, ActionURL: "https://example.com/billing",
					Filter: &Filter{Models: []string{"large", "small"}, Methods: []string{"POST"}}},
			}},
			{ID: "team", Limits: []Limit{{ID: "spend", Meter: "cost", Window: "month", Amount: 50_000_000_000, Code: "SPEND_CAP_REACHED"}}},
		},
		Accounts: []Account{
			{ID: "acme", Plan: "team"},
			{ID: "acme/search", Parent: "acme", Plan: "free", Keys: []Key{{ID: "search-1", SHA256: HashKey("test-key")}}},
			{ID: "solo", Plan: "free"},
		},
	}
	want.Accounts[1].Keys[0].SHA256 = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"
	got := good(t)
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Document{})); diff != "" {
		t.Error(diff)
	}
	asJSON, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Parse("good.json", asJSON)
	if err != nil {
		t.Fatalf("the same as JSON: %v", err)
	}
	if Version(again) != Version(got) {
		t.Error("the same content as JSON has another version")
	}
}

func TestTheVersionIsOfTheContent(t *testing.T) {
	t.Parallel()
	parse := func(s string) *Document {
		t.Helper()
		doc, err := Parse("plans.yaml", []byte(s))
		if err != nil {
			t.Fatal(err)
		}
		return doc
	}
	a := parse("version: 1\nplans: [{id: p, limits: [{id: a, meter: calls, window: day, amount: 1}, {id: b, meter: calls, window: hour, amount: 1}]}, {id: q}]\naccounts: [{id: x, plan: p}, {id: y}]\n")
	b := parse("accounts: [{id: y, keys: []}, {plan: p, id: x}]\nplans:\n- id: q\n  limits: []\n- id: p\n  limits:\n  - {id: b, meter: calls, window: hour, amount: 1, tier: eventual, warn_percent: 0, filter: {models: []}}\n  - {id: a, meter: calls, window: day, amount: 1, code: QUOTA_EXCEEDED}\nversion: 1\n")
	if Version(a) != Version(b) {
		t.Errorf("order and written-out defaults made another version: %s, %s", Version(a), Version(b))
	}
	if !Compare(a, b).Empty() {
		t.Errorf("and a difference:\n%s", Compare(a, b))
	}
	c := parse("version: 1\nplans: [{id: p, limits: [{id: a, meter: calls, window: day, amount: 2}, {id: b, meter: calls, window: hour, amount: 1}]}, {id: q}]\naccounts: [{id: x, plan: p}, {id: y}]\n")
	if Version(a) == Version(c) || PlansVersion(a) == PlansVersion(c) {
		t.Error("another amount must make another version")
	}
	d := parse("version: 1\nplans: [{id: p, limits: [{id: a, meter: calls, window: day, amount: 1}, {id: b, meter: calls, window: hour, amount: 1}]}, {id: q}]\naccounts: [{id: x}, {id: y}]\n")
	if Version(a) == Version(d) || PlansVersion(a) != PlansVersion(d) {
		t.Error("another account makes another version, but not of the plans")
	}
}

func TestABadFileSaysWhereWhyAndWhatToDo(t *testing.T) {
	t.Parallel()
	limit := func(fields string) string {
		return "version: 1\nplans:\n  - id: p\n    limits:\n      - {" + fields + "}\n"
	}
	for name, c := range map[string]struct{ file, want string }{
		"empty":           {"", "f.yaml:1:1: the file is empty: begin with 'version: 1'"},
		"only a comment":  {"# nothing\n", "f.yaml:1:1: the file is empty: begin with 'version: 1'"},
		"no version":      {"plans: []\n", "f.yaml:1:1: the file has no version: add it"},
		"other version":   {"version: 2\n", "f.yaml:1:10: version is 2: this program knows 1 only"},
		"unknown field":   {"version: 1\nplan: []\n", `f.yaml:2:1: "plan" is not a field of the file: known are version, plans, accounts`},
		"unknown deep":    {limit("id: a, meter: calls, window: day, amount: 5, ammount: 6"), `f.yaml:5:64: "ammount" is not a field of a limit: known are id, meter, window, amount, tier, warn_percent, code, action_url, filter, lease`},
		"unknown key":     {"version: 1\naccounts:\n- id: a\n  keys:\n  - {id: k, sha256: " + hashA + ", key: s}\n", `f.yaml:5:92: "key" is not a field of a key: known are id, sha256`},
		"no meter":        {limit("id: a, window: day, amount: 5"), "f.yaml:5:10: a limit has no meter: add it"},
		"amount 0":        {limit("id: a, meter: calls, window: day, amount: 0"), "f.yaml:5:52: amount is below 1: write a number from 1 on"},
		"amount negative": {limit("id: a, meter: calls, window: day, amount: -3"), "f.yaml:5:52: amount is below 1: write a number from 1 on"},
		"amount too big":  {limit("id: a, meter: calls, window: day, amount: 90000000000000001"), "f.yaml:5:52: amount is above 90000000000000000: write a number up to 90000000000000000"},
		"amount fraction": {limit("id: a, meter: calls, window: day, amount: 1.5"), "f.yaml:5:52: amount is a number, not a whole number: write a whole number"},
		"amount text":     {limit("id: a, meter: calls, window: day, amount: many"), "f.yaml:5:52: amount is text, not a whole number: write a whole number"},
		"window":          {limit("id: a, meter: calls, window: fortnight, amount: 5"), `f.yaml:5:39: window "fortnight" is not known: use one of minute, hour, day, week, month, lifetime`},
		"code":            {limit("id: a, meter: calls, window: day, amount: 5, code: NO"), `f.yaml:5:61: code "NO" is not known: use one of QUOTA_EXCEEDED, SPEND_CAP_REACHED, CREDITS_DEPLETED, CREDITS_INSUFFICIENT, SUBSCRIPTION_EXPIRED, TRIAL_ENDED, PAYMENT_FAILED, PLAN_REQUIRED, RATE_LIMITED, COST_EXCEEDS_LIMIT`},
		"tier":            {limit("id: a, meter: calls, window: day, amount: 5, tier: strict"), `f.yaml:5:61: tier "strict" is not known: use one of eventual, exact, leased`},
		"meter":           {limit("id: a, meter: 'my meter', window: day, amount: 5"), "f.yaml:5:24: meter has characters or a length that a name must not have: use letters, digits, '_', '.', '-'"},
		"action url":      {limit("id: a, meter: calls, window: day, amount: 5, action_url: 'javascript:alert(1)'"), "f.yaml:5:67: action_url is neither an http or https URL nor a path: write it like https://example.com/billing or /billing"},
		"number as id":    {"version: 1\naccounts: [{id: 42}]\n", "f.yaml:2:17: id is a number, not text: put it in quotes"},
		"a key, no hash":  {"version: 1\naccounts: [{id: a, keys: [{id: k, sha256: sk-secret}]}]\n", "f.yaml:2:43: sha256 is not 64 lower-case hex digits: write the SHA-256 of the key, never the key itself"},
		"plan twice":      {"version: 1\nplans:\n- id: p\n- id: p\n", `f.yaml:4:7: the plan "p" is there twice (first on line 3): rename or remove one`},
		"limit twice":     {"version: 1\nplans:\n- id: p\n  limits:\n  - {id: a, meter: calls, window: day, amount: 1}\n  - {id: a, meter: calls, window: hour, amount: 1}\n", `f.yaml:6:10: the plan "p" has two limits "a" (first on line 5): rename or remove one`},
		"account twice":   {"version: 1\naccounts:\n- id: a\n- id: a\n", `f.yaml:4:7: the account "a" is there twice (first on line 3): rename or remove one`},
		"unknown plan":    {"version: 1\nplans: [{id: free}]\naccounts:\n- {id: a, plan: fre}\n", `f.yaml:4:17: there is no plan "fre", but there is "free": add the plan or correct its name`},
		"unknown parent":  {"version: 1\naccounts:\n- {id: a, parent: b}\n", `f.yaml:3:19: there is no account "b": add the account or correct its name`},
		"own parent":      {"version: 1\naccounts:\n- {id: a, parent: a}\n", `f.yaml:3:19: the account "a" is its own ancestor: break the circle of parents`},
		"circle":          {"version: 1\naccounts:\n- {id: a, parent: b}\n- {id: b, parent: c}\n- {id: c, parent: b}\n", `f.yaml:4:19: the account "b" is its own ancestor: break the circle of parents`},
		"key twice":       {"version: 1\naccounts:\n- {id: a, keys: [{id: k, sha256: " + hashA + "}]}\n- {id: b, keys: [{id: l, sha256: " + hashA + "}]}\n", `f.yaml:4:34: the key "l" of account "b" is also the key "k" of account "a" (first on line 3): a key belongs to one account: remove one`},
		"key id twice":    {"version: 1\naccounts:\n- {id: a, keys: [{id: k, sha256: " + hashA + "}]}\n- {id: b, keys: [{id: k, sha256: b" + hashA[1:] + "}]}\n", `f.yaml:4:23: the key id "k" is there twice (first on line 3): rename one: events tell keys apart by it`},
		"field twice":     {"version: 1\nplans: []\nplans: []\n", `f.yaml:3:1: it is not YAML: mapping key "plans" already defined at [2:1]: correct the indentation, brackets or quotes there`},
		"anchor":          {"version: 1\nplans:\n- &p {id: p}\n- *p\n", "f.yaml:3:3: anchors, aliases and merge keys are not part of the format: write the value out\nf.yaml:4:3: anchors, aliases and merge keys are not part of the format: write the value out"},
		"merge key":       {"version: 1\nplans:\n- <<: {id: p}\n", "f.yaml:3:3: a field's name must be plain text: write fields out; merge keys are not part of the format"},
		"tag":             {"version: !!int 1\n", "f.yaml:1:10: tags are not part of the format: leave it out"},
		"two documents":   {"version: 1\n---\nversion: 1\n", "f.yaml:3:1: a second YAML document begins here: keep everything in one, without '---'"},
		"not a mapping":   {"- 1\n", "f.yaml:1:1: the file is a list, not a mapping: write a mapping"},
		"bracket":         {"version: 1\nplans: [{id: p]\n", "f.yaml:2:15: it is not YAML: ',' or '}' must be specified: correct the indentation, brackets or quotes there"},
		"tab":             {"version: 1\nplans:\n\t- id: p\n", "f.yaml:3:1: it is not YAML: found character '\t' that cannot start any token: correct the indentation, brackets or quotes there"},
		"nested":          {"version: 1\nplans: " + strings.Repeat("[", 300), "f.yaml:2:1: brackets are nested too deeply: the format needs six levels"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			doc, err := Parse("f.yaml", []byte(c.file))
			var bad *Error
			if !errors.As(err, &bad) || doc != nil {
				t.Fatalf("got %v, %v", doc, err)
			}
			if err.Error() != c.want {
				t.Errorf("\n got %s\nwant %s", err, c.want)
			}
		})
	}
}

func TestProblemsAreBounded(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	b.WriteString("version: 1\naccounts:\n")
	for i := range 100 {
		fmt.Fprintf(&b, "- {id: a%d, plan: nowhere}\n", i)
	}
	_, err := Parse("f.yaml", []byte(b.String()))
	var bad *Error
	if !errors.As(err, &bad) || len(bad.Problems) != maxProblems || bad.More != 100-maxProblems {
		t.Fatalf("got %v", err)
	}
	if !strings.HasSuffix(err.Error(), "\nand 80 more") {
		t.Errorf("the message ends with %q", err.Error()[len(err.Error())-20:])
	}
}

func TestDepthIsBounded(t *testing.T) {
	t.Parallel()
	chain := func(n int) *Document {
		d := &Document{Version: 1}
		for i := range n {
			a := Account{ID: fmt.Sprintf("a%d", i)}
			if i > 0 {
				a.Parent = fmt.Sprintf("a%d", i-1)
			}
			d.Accounts = append(d.Accounts, a)
		}
		// The answer must not depend on the order of the file.
		slices.Reverse(d.Accounts)
		return d
	}
	if err := Check(chain(MaxDepth)); err != nil {
		t.Errorf("%d accounts: %v", MaxDepth, err)
	}
	err := Check(chain(MaxDepth + 1))
	if want := `/accounts/0/parent: the account "a16" has 16 accounts above it: nest at most 16 accounts`; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestWhatWouldNotFitARecordIsRefused(t *testing.T) {
	t.Parallel()
	crowd := &Document{Version: 1}
	for i := range 4 {
		a := Account{ID: strings.Repeat("a", 250) + fmt.Sprint(i)}
		for k := range 500 {
			// Whoever chooses hashes can have them all in one record.
			id := fmt.Sprint(i, "-", k)
			a.Keys = append(a.Keys, Key{ID: id + strings.Repeat("k", 250-len(id)), SHA256: "0000" + HashKey(id)[4:]})
		}
		crowd.Accounts = append(crowd.Accounts, a)
	}
	if err := Check(crowd); err == nil || !strings.Contains(err.Error(), "make a record of keys of") {
		t.Errorf("got %v", err)
	}
	crowd.Accounts = crowd.Accounts[:2]
	if err := Check(crowd); err != nil {
		t.Errorf("half of it fits: %v", err)
	}

	d := &Document{Version: 1}
	for i := range MaxDepth {
		p := Plan{ID: fmt.Sprintf("p%d", i)}
		for k := range 64 {
			p.Limits = append(p.Limits, Limit{ID: fmt.Sprintf("l%d", k), Meter: "calls", Window: "day", Amount: 1})
		}
		d.Plans = append(d.Plans, p)
	}
	for _, p := range d.Plans {
		p.Limits[0].ActionURL = "/" + strings.Repeat("x", 1000)
		for k := range p.Limits {
			p.Limits[k].ActionURL = p.Limits[0].ActionURL
		}
	}
	if err := Check(d); err == nil || !strings.Contains(err.Error(), "bytes as one ledger entry") {
		t.Errorf("got %v", err)
	}
}

func TestWhatTheCoreWouldRefuseIsRefusedBefore(t *testing.T) {
	t.Parallel()
	long := func(n int) (list []string) {
		for i := range n {
			list = append(list, fmt.Sprintf("%04d", i)+strings.Repeat("x", 250))
		}
		return list
	}
	d := &Document{Version: 1, Plans: []Plan{{ID: "p", Limits: []Limit{{ID: "l", Meter: "calls", Window: "day", Amount: 1, Filter: &Filter{Models: long(64), Routes: long(64), Methods: long(64)}}}}}}
	if err := Check(d); err == nil || !strings.HasPrefix(err.Error(), "/plans/0/id: counting can't take this plan: ") {
		t.Errorf("a limit that fits no decision: %v", err)
	}
	if err := Check(&Document{Version: 1, Accounts: []Account{{ID: quota.OverflowAccount}}}); err == nil {
		t.Error("an account that the core has for itself was taken")
	}
}

func TestTheSchemaKnowsTheFieldsThatErrorsName(t *testing.T) {
	t.Parallel()
	type object struct {
		Properties map[string]json.RawMessage `json:"properties"`
		Closed     *bool                      `json:"additionalProperties"`
	}
	var schema struct {
		object
		Defs map[string]object `json:"$defs"`
	}
	if err := json.Unmarshal(schemas.Plans, &schema); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path []any
		in   object
	}{
		{nil, schema.object},
		{[]any{"plans", "0"}, schema.Defs["plan"]},
		{[]any{"plans", "0", "limits", "0"}, schema.Defs["limit"]},
		{[]any{"plans", "0", "limits", "0", "filter"}, schema.Defs["filter"]},
		{[]any{"plans", "0", "limits", "0", "lease"}, schema.Defs["lease"]},
		{[]any{"accounts", "0"}, schema.Defs["account"]},
		{[]any{"accounts", "0", "keys", "0"}, schema.Defs["key"]},
	} {
		want := slices.Sorted(maps.Keys(c.in.Properties))
		got := slices.Sorted(slices.Values(fields(c.path)))
		if diff := cmp.Diff(want, got); diff != "" || len(want) == 0 {
			t.Errorf("%v: %s", c.path, diff)
		}
		if c.in.Closed == nil || *c.in.Closed {
			t.Errorf("%v: unknown fields must be refused", c.path)
		}
	}
}

func FuzzParse(f *testing.F) {
	data, err := os.ReadFile("testdata/good.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte("version: 1\naccounts: [{id: a, parent: a}]"))
	f.Add([]byte("? [a]\n: b\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		doc, err := Parse("f.yaml", data)
		if err != nil {
			var bad *Error
			if !errors.As(err, &bad) || len(bad.Problems) == 0 {
				t.Fatalf("an error without a problem: %v", err)
			}
			return
		}
		if err := Check(doc); err != nil {
			t.Fatalf("it was read, but does not pass: %v", err)
		}
		if Version(doc) != Version(doc.Canonical()) {
			t.Fatal("the canonical form has another version")
		}
	})
}

func BenchmarkParse(b *testing.B) {
	var s strings.Builder
	s.WriteString("version: 1\nplans: [{id: free, limits: [{id: a, meter: calls, window: day, amount: 5}]}]\naccounts:\n")
	for i := range 10_000 {
		fmt.Fprintf(&s, "- id: account-%d\n  plan: free\n  keys:\n  - {id: key-%d, sha256: %q}\n", i, i, HashKey(fmt.Sprint(i)))
	}
	data := []byte(s.String())
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		if _, err := Parse("f.yaml", data); err != nil {
			b.Fatal(err)
		}
	}
}
