package console

import (
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/tollkeeper/tollkeeper/services/console/internal/plansapi"
	"github.com/tollkeeper/tollkeeper/services/internal/contracttest"
	"github.com/tollkeeper/tollkeeper/services/internal/openapi"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
)

// etagOf reads the plans that hold, as a client does that is going to change them.
func etagOf(t *testing.T, base string) (tag string, doc *plans.Document) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, base+"/v1/plans", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "application/yaml")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	doc = &plans.Document{}
	if err := yaml.NewDecoder(res.Body, yaml.UseJSONUnmarshaler()).Decode(doc); err != nil || res.StatusCode != 200 {
		t.Fatalf("%s: %v", res.Status, err)
	}
	return res.Header.Get("ETag"), doc
}

func yamlOf(t *testing.T, doc *plans.Document) string {
	t.Helper()
	data, err := yaml.MarshalWithOptions(doc, yaml.UseJSONMarshaler())
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// Two people read the plans, each adds an account and puts the whole back: the second
// lost the first one's account.
func TestAWholeDocumentLosesNoOthersAccount(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(demoPlans())
	base := w.start(Options{})
	c := contracttest.New(t, openapi.Console)
	put := func(match, query string, doc *plans.Document, status int) (out struct {
		plans.Diff
		Text, Code, Detail string
	}) {
		t.Helper()
		header := map[string]string{"Content-Type": "application/yaml"}
		if match != "" {
			header["If-Match"] = match
		}
		decode(t, c.Do(base, contracttest.Exchange{Method: "PUT", Path: "/v1/plans" + query, Header: header, Body: yamlOf(t, doc), Status: status}), &out)
		return out
	}
	tag, anna := etagOf(t, base)
	_, bert := etagOf(t, base)
	anna.Accounts = append(anna.Accounts, plans.Account{ID: "annas", Plan: "free"})
	bert.Accounts = append(bert.Accounts, plans.Account{ID: "berts", Plan: "free"})
	done := put(tag, "", anna, 200)
	if done.Totals.Accounts.Added != 1 || done.Totals.Accounts.Unchanged != len(demoPlans().Accounts) || !strings.Contains(done.Text, "1 added, 0 changed, 0 removed") {
		t.Errorf("%+v: %s", done.Totals, done.Text)
	}
	if p := put(tag, "", bert, 412); p.Code != plansapi.CodeFailed {
		t.Errorf("%+v", p)
	}
	// Who has not heard the answer may send it again.
	put(tag, "", anna, 200)
	// Whatever holds is replaced only by who says so, and nothing is removed unless that is said.
	if p := put("", "", bert, 428); p.Code != plansapi.CodeRequired {
		t.Errorf("%+v", p)
	}
	p := put("*", "", bert, 409)
	if p.Code != plansapi.CodeRemoves || !strings.Contains(p.Detail, "1 account") {
		t.Errorf("%+v", p)
	}
	put("*", "?removals=perhaps", bert, 400)
	put("W/\"weak\"", "", bert, 400)
	put("", "?dry_run=true", bert, 409)
	put(tag, "?dry_run=true", bert, 412)
	if d := put("", "?dry_run=true&removals=keep", bert, 200); d.Totals.Accounts.Added != 1 || d.Totals.Removed() != "" {
		t.Errorf("%+v", d.Totals)
	}
	now, held := etagOf(t, base)
	if now != `"`+done.To+`"` || len(held.Accounts) != len(anna.Accounts) {
		t.Fatalf("refused plans changed what holds: %s, %d accounts", now, len(held.Accounts))
	}
	put(now, "?removals=keep", bert, 200)
	now, held = etagOf(t, base)
	if len(held.Accounts) != len(anna.Accounts)+1 {
		t.Fatalf("%d accounts", len(held.Accounts))
	}
	if d := put(now, "?removals=remove", demoPlans(), 200); d.Totals.Accounts.Removed != 2 {
		t.Errorf("%+v", d.Totals)
	}
}

// Many put at once what they made of the same plans: one wins, all others hear of it.
func TestOfManyWhoPutAtOnceOneWins(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(demoPlans())
	base := w.start(Options{})
	tag, doc := etagOf(t, base)
	var mu sync.Mutex
	var won []string
	var all sync.WaitGroup
	for _, name := range []string{"a", "b", "c", "d", "e", "f"} {
		mine := *doc
		mine.Accounts = append(append([]plans.Account{}, doc.Accounts...), plans.Account{ID: "new-" + name})
		body := yamlOf(t, &mine)
		all.Go(func() {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, base+"/v1/plans", strings.NewReader(body))
			if err != nil {
				t.Error(err)
				return
			}
			req.Header.Set("Content-Type", "application/yaml")
			req.Header.Set("If-Match", tag)
			res, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer res.Body.Close()
			switch res.StatusCode {
			case http.StatusOK:
				mu.Lock()
				defer mu.Unlock()
				won = append(won, "new-"+name)
			case http.StatusPreconditionFailed, http.StatusConflict:
			default:
				t.Errorf("%s", res.Status)
			}
		})
	}
	all.Wait()
	_, held := etagOf(t, base)
	if len(won) != 1 || len(held.Accounts) != len(doc.Accounts)+1 || !strings.Contains(yamlOf(t, held), won[0]) {
		t.Errorf("%v won; %d accounts of %d", won, len(held.Accounts), len(doc.Accounts))
	}
}
