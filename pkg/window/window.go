// Package window cuts time into the windows of limits: calendar windows in
// UTC, and the whole life. It is pure integer arithmetic and knows no clock.
package window

import "github.com/tollkeeper/tollkeeper/pkg/usage"

// Kind of a window; a small number, so that it can index an array.
type Kind uint8

// The kinds of windows.
const (
	Minute Kind = iota
	Hour
	Day
	Week // from Monday
	Month
	Lifetime
	NumKinds
)

var names = [NumKinds]usage.WindowKind{usage.Minute, usage.Hour, usage.Day, usage.Week, usage.Month, usage.Lifetime}

// Parse returns the kind of that name; false when there is none.
func Parse(name usage.WindowKind) (Kind, bool) {
	for k, n := range names {
		if n == name {
			return Kind(k), true
		}
	}
	return 0, false
}

// Name returns the kind's name.
func (k Kind) Name() usage.WindowKind { return names[k] }

const (
	second = 1_000_000
	minute = 60 * second
	hour   = 60 * minute
	day    = 24 * hour
	week   = 7 * day
	// 1970-01-01 was a Thursday, three days after a Monday.
	sinceMonday = 3 * day
)

// Number counts windows of the kind: the one that contains the epoch's first
// microsecond is 0, the next is 1, the one before is -1. A lifetime has one
// window, 0.
func (k Kind) Number(t usage.Micros) int64 {
	switch k {
	case Minute:
		return floorDiv(int64(t), minute)
	case Hour:
		return floorDiv(int64(t), hour)
	case Day:
		return floorDiv(int64(t), day)
	case Week:
		return floorDiv(int64(t)+sinceMonday, week)
	case Month:
		return monthOf(floorDiv(int64(t), day))
	}
	return 0
}

// Start returns the first microsecond of window n; 0 for a lifetime.
func (k Kind) Start(n int64) usage.Micros {
	switch k {
	case Minute:
		return usage.Micros(n * minute)
	case Hour:
		return usage.Micros(n * hour)
	case Day:
		return usage.Micros(n * day)
	case Week:
		return usage.Micros(n*week - sinceMonday)
	case Month:
		return usage.Micros(firstDay(n) * day)
	}
	return 0
}

// Bounds returns the window [start, end) that contains t; 0 and 0 for a
// lifetime.
func (k Kind) Bounds(t usage.Micros) (start, end usage.Micros) {
	n := k.Number(t)
	return k.Start(n), k.End(n)
}

// End returns the first microsecond after window n; 0 for a lifetime.
func (k Kind) End(n int64) usage.Micros { return k.Start(n + 1) }

// Bounds returns the window [start, end) of the named kind that contains t;
// 0 and 0 for a lifetime and for a name that is no window's.
func Bounds(kind usage.WindowKind, t usage.Micros) (start, end usage.Micros) {
	k, ok := Parse(kind)
	if !ok {
		return 0, 0
	}
	return k.Bounds(t)
}

func floorDiv(a, b int64) int64 {
	q := a / b
	if a%b < 0 {
		q--
	}
	return q
}

// The proleptic Gregorian calendar, in years that begin in March so that the
// leap day comes last, and in cycles of 400 years, which all are alike.
const (
	cycleDays  = 146097
	cycleYears = 400
	// Days from 0000-03-01 to 1970-01-01.
	epochDay = 719468
)

// monthOf returns the number of months from 1970-01 to the month of a day
// that is counted from the epoch.
func monthOf(d int64) int64 {
	d += epochDay
	cycle := floorDiv(d, cycleDays)
	dc := d - cycle*cycleDays // day of the cycle
	yc := (dc - dc/1460 + dc/36524 - dc/146096) / 365
	dy := dc - (365*yc + yc/4 - yc/100) // day of the year from March
	m := (5*dy + 2) / 153               // 0 is March
	// March of year 0 is month 2 of that year.
	return (cycle*cycleYears+yc-1970)*12 + m + 2
}

// firstDay returns the day, counted from the epoch, on which month n begins.
func firstDay(n int64) int64 {
	n += 1970*12 - 2 // months from March of year 0
	y := floorDiv(n, 12)
	m := n - y*12
	cycle := floorDiv(y, cycleYears)
	yc := y - cycle*cycleYears
	return cycle*cycleDays + 365*yc + yc/4 - yc/100 + (153*m+2)/5 - epochDay
}
