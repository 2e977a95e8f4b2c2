package freshness

import (
	"errors"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func TestACopyIsAsOldAsTheMomentItsSourceWasLost(t *testing.T) {
	t.Parallel()
	begin := time.Unix(1000, 0)
	at := func(s int) time.Time { return begin.Add(time.Duration(s) * time.Second) }
	var f Feed
	if got := f.At(at(0)); got.Current || got.Age != -1 || got.Reason == "" {
		t.Errorf("before it was read: %+v", got)
	}
	f.Note(errors.New("no leader"), at(1))
	if got := f.At(at(2)); got.Current || got.Age != -1 || got.Reason != "no leader" {
		t.Errorf("it never could be read: %+v", got)
	}
	f.Note(nil, at(3))
	if got := f.At(at(9)); !got.Current || got.Age != 0 || got.AsOf != usage.At(at(9)) {
		t.Errorf("while it is read: %+v", got)
	}
	f.Note(errors.New("lost"), at(10))
	f.Note(errors.New("still lost"), at(20))
	if got := f.At(at(40)); got.Current || got.Age != 30 || got.AsOf != usage.At(at(10)) || got.Reason != "still lost" {
		t.Errorf("after it was lost for 30 s: %+v", got)
	}
	f.Note(nil, at(41))
	if got := f.At(at(42)); !got.Current || got.Reason != "" {
		t.Errorf("after it came back: %+v", got)
	}
}

func TestAnAnswerIsAsOldAsItsOldestPart(t *testing.T) {
	t.Parallel()
	now := time.Unix(1000, 0)
	old, older := Since(now.Add(-5*time.Second), now, "a"), Since(now.Add(-9*time.Second), now, "b")
	never := Since(time.Time{}, now, "c")
	for _, c := range []struct {
		parts []Freshness
		want  Freshness
	}{
		{[]Freshness{Now(now)}, Now(now)},
		{[]Freshness{Now(now), old}, old},
		{[]Freshness{old, Now(now), older}, older},
		{[]Freshness{old, never, older}, never},
	} {
		if got := Worst(c.parts...); got != c.want {
			t.Errorf("%+v, want %+v", got, c.want)
		}
	}
}

func TestAReaderOfAStreamIsHeldAgainstItsNewestEntry(t *testing.T) {
	t.Parallel()
	now := time.Unix(1000, 0)
	var r Reader
	for _, step := range []struct {
		what           string
		last, position uint64
		err            error
		current        bool
	}{
		{"it has begun to read", 50, 0, nil, false},
		{"it has read all", 50, 50, nil, true},
		{"what came just now is on its way", 70, 50, nil, true},
		{"that was not read", 70, 50, nil, false},
		{"the stream can't be asked", 0, 70, errors.New("no leader"), false},
		{"it is quiet, and all is read", 70, 70, nil, true},
		{"the stream was made anew", 3, 70, nil, true},
	} {
		r.Look(step.last, step.position, step.err, now)
		if got := r.At(now); got.Current != step.current {
			t.Errorf("%s: %+v", step.what, got)
		}
	}
}

// A history that does not get on is told with its age; one that is on its way is current.
func TestAHistoryThatIsBehindSaysSo(t *testing.T) {
	t.Parallel()
	now := time.Unix(10_000, 0)
	for name, w := range map[string]struct {
		position, calls uint64
		moved           time.Duration
		current         bool
	}{
		"up to date":            {50, 50, time.Hour, true},
		"a block is on its way": {50, 60, time.Second, true},
		"stuck":                 {50, 60, 30 * time.Second, false},
	} {
		got := Behind(w.position, w.calls, now.Add(-w.moved), now)
		if got.Current != w.current || !w.current && got.Age != w.moved.Seconds() {
			t.Errorf("%s: %+v", name, got)
		}
	}
}
