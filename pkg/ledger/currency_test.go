package ledger

import (
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Whoever reads the ledger adds costs up; so what is not in its currency is refused by
// all of them alike, in every form that a call can have.
func TestAFrameWithACostInAnotherCurrencyIsRefused(t *testing.T) {
	t.Parallel()
	call := func(cost int64, currency string) usage.Call {
		c := usage.Call{Time: usage.OldestTimeMicros, Account: "a", Source: "s", EventID: currency, Currency: currency}
		if c.EventID == "" {
			c.EventID = "none"
		}
		if cost >= 0 {
			c.Quantities.Set(usage.Cost, cost)
		}
		return c
	}
	for name, c := range map[string]struct {
		calls []usage.Call
		taken bool
	}{
		"the ledger's":                         {[]usage.Call{call(1, "EUR"), call(2, "EUR")}, true},
		"another":                              {[]usage.Call{call(1, "USD")}, false},
		"another behind the ledger's":          {[]usage.Call{call(1, "EUR"), call(1, "USD")}, false},
		"none beside the ledger's":             {[]usage.Call{call(1, "EUR"), call(1, "")}, false},
		"a cost of 0 in another":               {[]usage.Call{call(1, "EUR"), call(0, "USD")}, false},
		"another where nothing was reported":   {[]usage.Call{call(1, "EUR"), call(-1, "USD")}, true},
		"nowhere a cost":                       {[]usage.Call{call(-1, "USD"), call(-1, "")}, true},
		"the ledger's and calls without costs": {[]usage.Call{call(-1, ""), call(3, "EUR")}, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			forms := map[string][]byte{CodecColumnar: seal(exampleHeader(), c.calls)}
			var err error
			if forms[CodecProtobuf], err = MarshalProtobuf(exampleHeader(), c.calls); err != nil {
				t.Fatal(err)
			}
			if len(c.calls) == 1 {
				forms[CodecCloudEvent] = cloudEventOf(t, &c.calls[0])
			}
			f := Frame{CostsIn: "EUR"}
			for codec, data := range forms {
				for range 2 { // a frame that is used again still knows its ledger
					err := DecodeCalls(&f, CallsSubject(exampleHeader().Shard), nats.Header{CodecHeader: {codec}}, data)
					if c.taken && err != nil {
						t.Errorf("%s: %v", codec, err)
					}
					if !c.taken {
						invalid(t, err, usage.ReasonWrongCurrency)
					}
				}
			}
		})
	}
}
