package seen

import (
	"testing"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func TestForeignEventsAreKnownAgainWhoeverBringsThem(t *testing.T) {
	t.Parallel()
	var b ledger.Builder
	for range 3 {
		b.Add(&usage.Call{Time: usage.OldestTimeMicros, Account: "a", Source: "s", EventID: "1"})
	}
	var f ledger.Frame
	if err := f.Decode(b.Seal(ledger.Header{Producer: ksuid.KSUID{1}, Number: 1})); err != nil {
		t.Fatal(err)
	}
	s := New(0).Pass(0, usage.OldestTimeMicros)
	if got := s.Calls(&f, nil); len(got.Keep) != 1 || got.Foreign != 2 {
		t.Errorf("of three copies of one event %v were kept, %d were left out", got.Keep, got.Foreign)
	}
	if got := s.Calls(&f, nil); got.Verdict != dedup.Duplicate {
		t.Errorf("the same frame again is %v", got.Verdict)
	}
	f.Number = 2
	if got := s.Calls(&f, nil); got.Keep == nil || len(got.Keep) != 0 || got.Foreign != 3 {
		t.Errorf("a frame of events that are all known keeps %v", got.Keep)
	}
}
