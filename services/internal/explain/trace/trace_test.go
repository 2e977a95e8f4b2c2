package trace

import (
	"errors"
	"fmt"
	"testing"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func TestTheNewestRowsAreKept(t *testing.T) {
	t.Parallel()
	r := ring{most: 5}
	show := func() (out []string) {
		for _, row := range r.all() {
			out = append(out, row.String())
		}
		return out
	}
	for n := range uint64(4) {
		r.add(Row{Position: Position{n, 0}})
	}
	if fmt.Sprint(show()) != "[0.0 1.0 2.0 3.0]" || r.dropped {
		t.Errorf("%v, dropped: %v", show(), r.dropped)
	}
	for n := range uint64(8) {
		r.add(Row{Position: Position{n + 4, 0}})
	}
	if fmt.Sprint(show()) != "[7.0 8.0 9.0 10.0 11.0]" || !r.dropped {
		t.Errorf("%v, dropped: %v", show(), r.dropped)
	}
	r.clear()
	if r.add(Row{}); len(r.all()) != 1 || r.dropped {
		t.Errorf("after clearing: %v, dropped: %v", show(), r.dropped)
	}
}

func TestPositionsAreOrderedAndReadBack(t *testing.T) {
	t.Parallel()
	for _, p := range []Position{{1, -1}, {7, 0}, {1 << 60, 4095}, Newest} {
		if got, err := ParsePosition(p.String()); err != nil || got != p {
			t.Errorf("%s: %+v, %v", p, got, err)
		}
	}
	for _, s := range []string{"", "7", "7.", ".7", "7.x", "-1.0", "7.-2", "7.0.0", "99999999999999999999.0"} {
		if p, err := ParsePosition(s); !errors.Is(err, ErrPosition) {
			t.Errorf("%q: %+v, %v", s, p, err)
		}
	}
	if !(Position{1, 5}).Less(Position{2, 0}) || !(Position{2, -1}).Less(Position{2, 0}) || (Position{2, 0}).Less(Position{2, 0}) || !(Position{1, 0}).Less(Newest) {
		t.Error("the order is another one")
	}
}

func TestTheThresholdIsThatOfTheVerdict(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		verdict usage.Verdict
		amount  int64
		percent uint32
		want    int64
	}{
		{usage.Allow, 10, 50, 0}, {usage.Deny, 10, 50, 10}, {usage.Warn, 10, 75, 8}, {usage.Warn, 100, 80, 80}, {usage.Warn, 10, 0, 0},
		{usage.Warn, 1<<63 - 1, 99, 9131138316486228049}, {usage.Warn, 10, 200, 0}, {usage.Warn, -1, 50, 0},
	} {
		if got := Threshold(&usage.Decision{Verdict: c.verdict, Amount: c.amount, WarnPercent: c.percent}); got != c.want {
			t.Errorf("%s of %d at %d percent begins at %d, want %d", c.verdict, c.amount, c.percent, got, c.want)
		}
	}
}
