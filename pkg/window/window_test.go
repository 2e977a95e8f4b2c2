package window

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// moments from the year 1600 to 2900, with a liking for the edges of months.
var moments = rapid.Custom(func(t *rapid.T) usage.Micros {
	year := rapid.IntRange(1600, 2900).Draw(t, "year")
	month := time.Month(rapid.IntRange(1, 12).Draw(t, "month"))
	at := usage.At(time.Date(year, month, 1, 0, 0, 0, 0, time.UTC))
	return at + usage.Micros(rapid.Int64Range(-40*day, 40*day).Draw(t, "beside"))
})

// calendar says by the standard library where the window of t begins and ends.
func calendar(kind usage.WindowKind, t time.Time) (time.Time, time.Time) {
	switch kind {
	case usage.Minute:
		start := time.Date(t.Year(), t.Month(), t.Day(), t.Hour(), t.Minute(), 0, 0, time.UTC)
		return start, start.Add(time.Minute)
	case usage.Hour:
		start := time.Date(t.Year(), t.Month(), t.Day(), t.Hour(), 0, 0, 0, time.UTC)
		return start, start.Add(time.Hour)
	case usage.Day:
		start := time.Date(t.Year(), t.Month(), t.Day(), 0, 0, 0, 0, time.UTC)
		return start, start.AddDate(0, 0, 1)
	case usage.Week:
		start := time.Date(t.Year(), t.Month(), t.Day()-(int(t.Weekday())+6)%7, 0, 0, 0, 0, time.UTC)
		return start, start.AddDate(0, 0, 7)
	default:
		start := time.Date(t.Year(), t.Month(), 1, 0, 0, 0, 0, time.UTC)
		return start, start.AddDate(0, 1, 0)
	}
}

func TestCalendarWindowsAreThoseOfTheStandardLibrary(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		at := moments.Draw(t, "at")
		for k := Minute; k < Lifetime; k++ {
			start, end := Bounds(k.Name(), at)
			wantStart, wantEnd := calendar(k.Name(), at.Time())
			if start.Time() != wantStart || end.Time() != wantEnd {
				t.Fatalf("%s of %s: [%s, %s), want [%s, %s)", k.Name(), at.Time(), start.Time(), end.Time(), wantStart, wantEnd)
			}
		}
	})
}

func TestWindowsFollowEachOtherWithoutGapOrOverlap(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		at := moments.Draw(t, "at")
		for k := Minute; k < Lifetime; k++ {
			n := k.Number(at)
			start, end := k.Bounds(at)
			switch {
			case start > at || at >= end:
				t.Fatalf("%s: %d is not in [%d, %d)", k.Name(), at, start, end)
			case k.Number(start) != n || k.Number(end-1) != n || k.Number(end) != n+1 || k.Number(start-1) != n-1:
				t.Fatalf("%s: the numbers around [%d, %d) are not those around %d", k.Name(), start, end, n)
			case k.Start(n) != start || k.End(n) != end:
				t.Fatalf("%s: window %d is [%d, %d), not [%d, %d)", k.Name(), n, k.Start(n), k.End(n), start, end)
			}
		}
	})
}

func TestALifetimeHasNoBounds(t *testing.T) {
	t.Parallel()
	for _, kind := range []usage.WindowKind{usage.Lifetime, "fortnight", ""} {
		if start, end := Bounds(kind, 1_700_000_000_000_000); start != 0 || end != 0 {
			t.Errorf("%q: [%d, %d)", kind, start, end)
		}
	}
	if _, ok := Parse("fortnight"); ok {
		t.Error("a fortnight is no window")
	}
}

func BenchmarkBounds(b *testing.B) {
	for k := Minute; k < NumKinds; k++ {
		b.Run(string(k.Name()), func(b *testing.B) {
			var sum usage.Micros
			at := usage.Micros(1_700_000_000_000_000)
			for b.Loop() {
				start, end := Bounds(k.Name(), at)
				sum += start + end
				at += 977
			}
			_ = sum
		})
	}
}
