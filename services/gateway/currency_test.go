package gateway

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Two currencies are never added: what is not in the ledger's is refused at the door,
// with the reason, and kept in the dead letters.
func TestACostInAnotherCurrencyIsRefusedAtTheDoor(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	g := startGateway(t, w.srv.ClientURL(), func(*Options) {})
	g.ready()
	bad := []string{"EUR", "", "usd", "$"}
	var events []string
	for i, currency := range append([]string{"USD"}, bad...) {
		events = append(events, eventOf("rater", fmt.Sprint(i), "acme", fmt.Sprintf(`"meters":{"cost":10000000000},"currency":%q`, currency)))
	}
	got := do(t, http.MethodPost, g.admin+"/v1/events", "", "["+strings.Join(events, ",")+"]", "Content-Type", "application/cloudevents-batch+json")
	var doc struct {
		Accepted int
		Rejected []struct {
			Index          int
			Reason, Detail string
			Kept           bool
		}
	}
	if err := json.Unmarshal([]byte(got.body), &doc); err != nil || doc.Accepted != 1 || len(doc.Rejected) != len(bad) {
		t.Fatalf("%d %s: %v", got.status, got.body, err)
	}
	for i, r := range doc.Rejected {
		if r.Index != i+1 || r.Reason != usage.ReasonWrongCurrency || !strings.Contains(r.Detail, "USD") || !r.Kept {
			t.Errorf("%+v", r)
		}
	}
	for _, l := range w.deadLetters(len(bad)) {
		if l.Header.Get(ledger.ReasonHeader) != usage.ReasonWrongCurrency {
			t.Errorf("%+v", l.Header)
		}
	}
	if err := g.stop(); err != nil {
		t.Fatal(err)
	}
	if calls := w.calls(1); len(calls) != 1 || calls[0].EventID != "0" {
		t.Errorf("%+v", calls)
	}
}
