package usage

import (
	"errors"
	"testing"
)

// A cost is in a currency, and in the ledger's: two currencies are never added.
func TestACostIsInTheLedgersCurrency(t *testing.T) {
	t.Parallel()
	const at = OldestTimeMicros
	for _, c := range []struct {
		name, currency string
		cost           int64 // -1: not reported
		valid, taken   bool  // by itself; in a ledger of USD
	}{
		{"no cost, no currency", "", -1, true, true},
		{"no cost, another currency", "EUR", -1, true, true},
		{"a cost in the ledger's", "USD", 10, true, true},
		{"a cost of 0 in the ledger's", "USD", 0, true, true},
		{"a cost in another", "EUR", 10, true, false},
		{"a cost of 0 in another", "EUR", 0, true, false},
		{"a cost in none", "", 10, false, false},
		{"a cost of 0 in none", "", 0, false, false},
		{"lower case", "usd", 10, false, false},
		{"a sign", "$", 10, false, false},
		{"a name", "US Dollar", 10, false, false},
		{"a blank behind", "USD ", 10, false, false},
		{"four letters", "USDT", 10, false, false},
		{"letters of another alphabet", "ＵＳＤ", 10, false, false},
		{"no cost and no currency's form", "dollar", -1, false, true},
	} {
		for _, code := range []Code{"", QuotaExceeded} {
			call := Call{Time: at, Account: "a", Currency: c.currency, Code: code}
			if c.cost >= 0 {
				call.Quantities.Set(Cost, c.cost)
			}
			for what, got := range map[string]struct {
				err error
				ok  bool
			}{"valid": {call.Validate(at), c.valid}, "taken": {call.CostIn("USD"), c.taken}} {
				var invalid *InvalidError
				if got.ok != (got.err == nil) || !got.ok && (!errors.As(got.err, &invalid) || invalid.Reason != ReasonWrongCurrency) {
					t.Errorf("%s (code %q), %s: %v", c.name, code, what, got.err)
				}
			}
		}
	}
}
