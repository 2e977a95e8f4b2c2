package demo

import (
	"testing"

	"github.com/tollkeeper/tollkeeper/services/internal/plans"
)

// Every account that the demo's traffic uses has the key that it shows.
func TestTheDemosPlansKnowItsClients(t *testing.T) {
	t.Parallel()
	doc, err := plans.Parse("plans.yaml", Plans)
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string]string{}
	for _, a := range doc.Accounts {
		for _, k := range a.Keys {
			keys[k.SHA256] = a.ID
		}
	}
	for _, c := range clients() {
		if got := keys[plans.HashKey(Key(c.account))]; got != c.account {
			t.Errorf("the key of %s belongs to %q", c.account, got)
		}
	}
}
