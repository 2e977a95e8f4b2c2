package gateway

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// eventOf is the event of an admitted call, as another program posts it.
func eventOf(source, id, account, data string) string {
	return fmt.Sprintf(`{"specversion":"1.0","type":"io.tollkeeper.call.v1","source":%q,"id":%q,"subject":%q,"time":%q,"data":{%s}}`,
		source, id, account, time.Now().UTC().Format(time.RFC3339Nano), data)
}

// Who asks and then posts an event, as openapi.yaml says, has made one call: in whatever
// order the two reach the ledger, however often the event is sent, to whichever gateway,
// also after a restart, and without an event at all.
func TestACallThatWasAskedForAndPostedIsOneCall(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	own := w.exact(
		usage.Limit{ID: "calls", Meter: usage.Calls, Window: usage.Month, Amount: 10, Tier: usage.TierExact},
		usage.Limit{ID: "tokens", Meter: usage.OutputTokens, Window: usage.Month, Amount: 1 << 30},
	)
	first, second := startGateway(t, w.srv.ClientURL()), startGateway(t, w.srv.ClientURL(), func(o *Options) { o.Name = "g2" })
	first.ready()
	second.ready()
	admit := func(r *running) reply {
		return do(t, http.MethodGet, r.admin+"/v1/admit?method=POST&uri=/x", "sk-tight", "")
	}
	post := func(r *running, id, data string) {
		t.Helper()
		if got := do(t, http.MethodPost, r.admin+"/v1/events", "", eventOf("proxy", id, "tight", data), "Content-Type", "application/cloudevents+json"); got.status != 202 {
			t.Fatalf("%+v", got)
		}
	}
	var ids []string
	ask := func() {
		t.Helper()
		got := admit(first)
		if got.status != 200 || got.header.Get(EventIDHeader) == "" {
			t.Fatalf("call %d: %+v", len(ids)+1, got)
		}
		ids = append(ids, got.header.Get(EventIDHeader))
	}
	within(t, 5*time.Second, "the key is known", func() bool { return admit(second).status == 200 }) // the first call, without an event
	within(t, 5*time.Second, "the key is known", func() bool {
		return do(t, http.MethodGet, first.admin+"/v1/admit", "sk-acme", "").status == 200
	})
	for i := range 8 {
		ask()
		switch to, data := []*running{first, second}[i%2], `"status":200,"meters":{"output_tokens":5}`; i {
		case 6:
			post(to, ids[i], `"meters":{"calls":1,"output_tokens":5}`)
		case 7:
			post(to, ids[i], `"meters":{"calls":0,"output_tokens":5}`)
		default:
			post(to, ids[i], data)
			post(second, ids[i], data) // again, to whoever is there
			if got := do(t, http.MethodPost, second.admin+"/v1/events", "", eventOf("another proxy", ids[i], "tight", data), "Content-Type", "application/cloudevents+json"); got.status != 202 {
				t.Fatalf("%+v", got)
			}
		}
	}
	used := func(calls, tokens int64) {
		t.Helper()
		within(t, 10*time.Second, fmt.Sprintf("%d calls and %d tokens are counted", calls, tokens), func() bool {
			l := own.Limit("tight", "of-tight/calls")
			return l.Used == calls && l.Lease != nil && l.Lease.Settled == calls && l.Lease.Counts.Outside == 0 && own.Limit("tight", "of-tight/tokens").Used == tokens
		})
	}
	used(9, 40)
	ask()
	if got := admit(second); got.status != 402 {
		t.Errorf("the 11th of 10: %+v", got)
	}
	// The gateway that admitted it has gone before the event comes.
	if err := first.stop(); err != nil {
		t.Fatal(err)
	}
	post(second, ids[8], `"meters":{"output_tokens":5}`)
	used(10, 45)
	// An id that only looks like one is an event's own; a refused call uses nothing.
	post(second, "admitted-recorded-", `"meters":{"calls":2}`)
	post(second, ids[8]+"x", `"meters":{"calls":3}`)
	within(t, 10*time.Second, "events with ids of their own count their calls", func() bool { return own.Limit("tight", "of-tight/calls").Used == 15 })
}

// Where no limit takes units ahead the event is the call.
func TestACallThatWasOnlyAskedForIsCountedByItsEvent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r := startGateway(t, w.srv.ClientURL())
	r.ready()
	var got reply
	within(t, 5*time.Second, "the key is known", func() bool {
		got = do(t, http.MethodGet, r.admin+"/v1/admit", "sk-acme", "")
		return got.status == 200
	})
	id := got.header.Get(EventIDHeader)
	if got := do(t, http.MethodPost, r.admin+"/v1/events", "", eventOf("proxy", id, "acme", `"status":200`), "Content-Type", "application/cloudevents+json"); got.status != 202 {
		t.Fatalf("%+v", got)
	}
	calls := w.calls(1)
	if n, known := calls[0].Usage(usage.Calls); len(calls) != 1 || n != 1 || !known || calls[0].EventID != id || !strings.HasPrefix(id, "admitted-open-") {
		t.Errorf("%+v", calls)
	}
}
