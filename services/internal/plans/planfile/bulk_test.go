package planfile

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/services/internal/plans/planfile/bulk"
)

// both reads a file account by account and with the parser alone.
func both(t testing.TB, data string) (one *Document, oneErr error, all *Document, allErr error) {
	t.Helper()
	f, ok := bulk.Split([]byte(data))
	if !ok {
		t.Fatalf("it is not read account by account:\n%s", data)
	}
	one, oneErr = parseBulk("f.yaml", []byte(data), f)
	all, allErr = parseAll("f.yaml", []byte(data))
	return one, oneErr, all, allErr
}

const someHash = "5c2b0000000000000000000000000000000000000000000000000000000000aa"

// However a large file writes its accounts, it says what the parser says that it does.
func TestALargeFileIsReadAsTheParserReadsIt(t *testing.T) {
	t.Parallel()
	h := func(n int) string { return fmt.Sprintf("%x", n) + someHash[len(fmt.Sprintf("%x", n)):] }
	for name, data := range map[string]string{
		"block":               "version: 1\nplans:\n- id: p\naccounts:\n  - id: a\n    plan: p\n    keys:\n      - id: k\n        sha256: " + h(1) + "\n  - id: b\n    parent: a\n",
		"dashes at the left":  "version: 1\naccounts:\n- id: a\n  keys:\n  - id: k\n    sha256: " + h(1) + "\n  - sha256: " + h(2) + "\n    id: l\n- id: b\nplans:\n- id: p\n",
		"keys before":         "version: 1\naccounts:\n- keys:\n  - id: k\n    sha256: " + h(1) + "\n  id: a\n  plan: p\nplans: [{id: p}]\n",
		"flow entries":        "version: 1\naccounts:\n  - {id: a, keys: [{id: k, sha256: " + h(1) + "}]}\n  - {\"id\": \"b\", parent: a}\n",
		"flow keys":           "version: 1\naccounts:\n  - id: a\n    keys: [{id: k, sha256: " + h(1) + "}, {id: l, sha256: '" + h(2) + "'}]\n  - id: b\n    keys: []\n  - id: c\n    keys:\n    - {id: m, sha256: " + h(3) + "}\n",
		"comments":            "# top\nversion: 1\naccounts:\n# of the accounts\n\n  - id: a # its name\n    # inside\n    plan: p\n\n  # between\n  - id: b\n# after\nplans:\n- id: p # x\n",
		"wide":                "version: 1\naccounts:\n    -    id: a\n         keys:\n             -  id: k\n                sha256: " + h(1) + "\n    -    id: b\n",
		"carriage returns":    "version: 1\r\naccounts:\r\n  - id: a\r\n    plan: p\r\n  - id: b\r\nplans:\r\n  - id: p\r\n",
		"dash alone":          "version: 1\naccounts:\n  -\n    id: a\n  - id: b\n",
		"quotes":              "version: 1\naccounts:\n  - id: \"a b\"\n    parent: 'c d'\n  - id: 'c d'\n  - id: \"q\\\"x\"\n  - id: 'it''s'\n  - id: \"42\"\n",
		"words that are text": "version: 1\naccounts:\n- id: org:123\n- id: a-1\n- id: 123e4567-e89b-12d3-a456-426614174000\n- id: mail@example.com\n- id: a/b\n- id: nullify\n- id: e5\n- id: team.x\n- id: 0g\n- id: ü\n- id: a b\n- id: inf\n- id: 2001-01-02\n",
		"several lines":       "version: 1\naccounts:\n  - id: |-\n      a\n  - id: >-\n      b\n      c\n  - id: \"d\n      e\"\n  - {id: f,\n     plan: p}\nplans:\n- id: p\n",
		"JSON":                `{"version":1,"plans":[{"id":"p"}],"accounts":[{"id":"a","plan":"p","keys":[{"id":"k","sha256":"` + h(1) + `"}]},{"id":"b","parent":"a"}]}`,
		"JSON in lines":       "{\n  \"version\": 1,\n  \"accounts\": [\n    {\n      \"id\": \"a\\u00fc\",\n      \"keys\": []\n    } ,\n    {\"id\": \"b, {\"}\n  ],\n  \"plans\": []\n}\n",
		// What is wrong is told as the parser tells it, with its place.
		"a number as id":     "version: 1\naccounts:\n- id: a\n- id: 42\n- id: 1e5\n- id: 0x1f\n- id: 0b1\n- id: 1_000\n- id: true\n- id: .5\n- id: ~\n",
		"a number as a hash": "version: 1\naccounts:\n- id: a\n  keys:\n  - id: k\n    sha256: " + strings.Repeat("1", 64) + "\n",
		"a hash too short":   "version: 1\naccounts:\n- id: a\n- id: b\n  keys:\n  - {id: k, sha256: sk-secret}\n",
		"an unknown field":   "version: 1\naccounts:\n  - id: a\n    plam: p\n  - id: b\n",
		"no id":              "version: 1\naccounts:\n  - plan: p\n  - id: b\nplans: [{id: p}]\n",
		"an empty id":        "version: 1\naccounts:\n  - id: \"\"\n  - id: b\n",
		"twice":              "version: 1\naccounts:\n  - id: a\n  - id: b\n  - id: a\n",
		"a key twice":        "version: 1\naccounts:\n  - {id: a, keys: [{id: k, sha256: " + h(1) + "}]}\n  - {id: b, keys: [{id: l, sha256: " + h(1) + "}]}\n",
		"no such plan":       "version: 1\naccounts:\n  - id: a\n    plan: p\nplans:\n  - id: q\n",
		"wrong plans after":  "version: 1\naccounts:\n  - id: a\n\n  - id: b\nplans:\n  - id: q\n    x: 1\n",
		"an anchor":          "version: 1\naccounts:\n  - &x\n    id: a\n  - id: b\n",
		"JSON, wrong":        "{\"version\": 1, \"accounts\": [\n {\"id\": \"a\"},\n {\"id\": 7}]}",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			one, oneErr, all, allErr := both(t, data)
			if fmt.Sprint(oneErr) != fmt.Sprint(allErr) {
				t.Fatalf("account by account: %v\nthe parser: %v", oneErr, allErr)
			}
			if allErr != nil {
				return
			}
			if d := cmp.Diff(all, one, cmpopts.IgnoreUnexported(Document{})); d != "" {
				t.Error(d)
			}
		})
	}
}

// What is not surely a plain list is the parser's alone.
func TestAFileThatIsWrittenInAnotherWayIsTheParsers(t *testing.T) {
	t.Parallel()
	for _, data := range []string{
		"", "version: 1\n", "version: 1\naccounts: [{id: a}]\n", "version: 1\naccounts: &x\n- id: a\n", "version: 1\n---\naccounts:\n- id: a\n",
		"version: 1\naccounts:\n", "version: 1\naccounts:\n  a: b\n", "version: 1\naccounts:\n\t- id: a\n", "  accounts:\n  - id: a\n", `{version: 1, accounts: [{id: a}]}`,
		`{"accounts":[{"id":"a"}],"accounts":[{"id":"b"}]}`, `{"accounts":[{"id":"a"} {"id":"b"}]}`, `{"accounts":[{"id":"a"},]}`, `{"accounts":[7,{"id":"a"}]}`, `{"accounts":[{"id":"a"}]`, `{"accounts":[]}`,
	} {
		if f, ok := bulk.Split([]byte(data)); ok {
			t.Errorf("%q is split into %d accounts and %q", data, len(f.Items), f.Rest)
		}
	}
}

func TestALargeFileSaysTheSameInEveryStyle(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		id := rapid.SampledFrom([]string{"a", "b-1", "c/d", "0", "12", "null", "e", "x y", "1-1", "1e-5", "0b1", "0o7", "1:20", "a:b", "a:", "-a", "a#b", "a #b", "1.5", "#", "a,b", "{a", "ü", "\"", "'", "\\", "yes", "0xac", "1_0", "@a", "a@", ".a", "-", "~"})
		var b strings.Builder
		b.WriteString("version: 1\naccounts:\n")
		for i := range rapid.IntRange(1, 6).Draw(r, "accounts") {
			text := id.Draw(r, "id")
			switch rapid.IntRange(0, 3).Draw(r, "style") {
			case 0:
				fmt.Fprintf(&b, "  - id: %s\n", text)
			case 1:
				fmt.Fprintf(&b, "  - id: n%d\n    keys:\n    - {id: %s, sha256: %064x}\n", i, text, rapid.Uint64().Draw(r, "hash"))
			case 2:
				quoted, err := json.Marshal(text)
				if err != nil {
					r.Fatal(err)
				}
				fmt.Fprintf(&b, "  - {id: %s}\n", quoted)
			default:
				fmt.Fprintf(&b, "  - {id: %s}\n", text)
			}
		}
		data := b.String()
		f, ok := bulk.Split([]byte(data))
		if !ok {
			return
		}
		one, oneErr := parseBulk("f.yaml", []byte(data), f)
		all, allErr := parseAll("f.yaml", []byte(data))
		// Of a file with problems the parser's are told; one without must be the same.
		if oneErr == nil && allErr != nil {
			r.Fatalf("it is read, and the parser says: %v\n%s", allErr, data)
		}
		if oneErr == nil && !cmp.Equal(all, one, cmpopts.IgnoreUnexported(Document{})) {
			r.Fatalf("%s\n%s", cmp.Diff(all, one, cmpopts.IgnoreUnexported(Document{})), data)
		}
		if allErr == nil && oneErr != nil {
			r.Fatalf("it is refused, and the parser reads it: %v\n%s", oneErr, data)
		}
	})
}

// A file beyond what the parser is given is read, and its problems have their places.
func TestAFileOfManyAccountsIsReadAndItsProblemsHaveTheirPlace(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	b.WriteString("version: 1\nplans:\n- id: p\naccounts:\n")
	const accounts = 20_000
	for i := range accounts {
		fmt.Fprintf(&b, "- id: account-%d\n  plan: p\n  keys:\n  - id: key-%d\n    sha256: %s\n", i, i, HashKey(fmt.Sprint(i)))
	}
	doc, err := Parse("f.yaml", []byte(b.String()))
	if err != nil || len(doc.Accounts) != accounts || doc.Accounts[accounts-1].Keys[0].ID != fmt.Sprint("key-", accounts-1) {
		t.Fatalf("%v", err)
	}
	if doc.tree.items == nil {
		t.Error("it was given to the parser")
	}
	doc.Accounts[7].Plan = "q"
	if err := Check(doc); err == nil || err.Error() != `f.yaml:41:9: there is no plan "q": add the plan or correct its name` {
		t.Errorf("got %v", err)
	}
	b.WriteString("- id: account-5\n")
	if _, err := Parse("f.yaml", []byte(b.String())); err == nil || !strings.Contains(err.Error(), `f.yaml:100005:7: the account "account-5" is there twice (first on line 30)`) {
		t.Errorf("got %v", err)
	}
}
