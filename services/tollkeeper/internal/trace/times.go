package trace

import (
	"fmt"
	"math/big"
	"strconv"
	"strings"
	"time"
)

// Times say how the times of a trace are written.
type Times struct {
	// Layout is one of package time, or one of Epochs; empty tries ISO 8601 and
	// RFC 3339 in their usual spellings, the time of access logs, and numbers since
	// the epoch, whose size tells seconds, milli-, micro- and nanoseconds apart.
	Layout string
	// Zone of times that name none.
	Zone *time.Location
}

// epochs are the units of numbers since 1970-01-01, in nanoseconds.
var epochs = map[string]int64{"unix": 1e9, "unix_ms": 1e6, "unix_us": 1e3, "unix_ns": 1}

// CheckLayout refuses a layout that can't be one.
func CheckLayout(layout string) error {
	if layout == "" || epochs[layout] != 0 {
		return nil
	}
	// A layout that writes two moments alike misses the date or the hour.
	a, b := time.Date(2006, 11, 22, 13, 14, 15, 0, time.UTC), time.Date(2009, 1, 3, 4, 5, 6, 0, time.UTC)
	if a.Format(layout) == b.Format(layout) {
		return fmt.Errorf("--time-layout %q: write a layout of Go, such as 2006-01-02 15:04:05, or unix, unix_ms, unix_us or unix_ns", layout)
	}
	return nil
}

// naive and zoned spellings; fractions of a second are read without being named.
var (
	zoned = [...]string{
		time.RFC3339Nano, "2006-01-02 15:04:05Z07:00", "2006-01-02 15:04:05 Z07:00", "2006-01-02 15:04:05 -0700", "2006-01-02 15:04:05-0700",
		"2006-01-02T15:04:05-0700", "2006-01-02T15:04:05Z07", "2006-01-02 15:04:05Z07", "02/Jan/2006:15:04:05 -0700", time.RFC1123Z,
	}
	naive = [...]string{"2006-01-02 15:04:05", "2006-01-02T15:04:05", "2006/01/02 15:04:05", "2006-01-02 15:04", "2006-01-02T15:04", "20060102T150405", "2006-01-02"}
)

func (t *Times) parse(s string) (time.Time, error) {
	s = strings.TrimSpace(s)
	switch {
	case s == "":
		return time.Time{}, fmt.Errorf("the time is empty")
	case epochs[t.Layout] != 0:
		return epoch(s, epochs[t.Layout], t.Layout)
	case t.Layout != "":
		at, err := time.ParseInLocation(t.Layout, s, t.Zone)
		if err != nil {
			return at, fmt.Errorf("%q is not a time of the layout %q", s, t.Layout)
		}
		return real(at, s, t.Layout)
	}
	if number(s) {
		return guess(s)
	}
	s = strings.TrimSuffix(strings.Replace(s, ",", ".", 1), " UTC") + zoneOf(s)
	for _, l := range zoned {
		if at, err := time.Parse(l, s); err == nil {
			return at.UTC(), nil
		}
	}
	for _, l := range naive {
		if at, err := time.ParseInLocation(l, s, t.Zone); err == nil {
			return real(at, s, l)
		}
	}
	return time.Time{}, fmt.Errorf("%q is not a time that is known; give --time-layout", s)
}

func zoneOf(s string) string {
	if strings.HasSuffix(s, " UTC") {
		return "Z"
	}
	return ""
}

// real refuses a local time that its zone leaves out when clocks are put forward.
// One that is there twice, when they are put back, is taken for the first of the two.
func real(at time.Time, s, layout string) (time.Time, error) {
	if zone := at.Location(); zone != time.UTC {
		if again, err := time.ParseInLocation(layout, at.Format(layout), time.UTC); err == nil {
			if said, err := time.ParseInLocation(layout, s, time.UTC); err == nil && !again.Truncate(time.Second).Equal(said.Truncate(time.Second)) {
				return at, fmt.Errorf("%q is no time in %s: clocks were put forward over it", s, zone)
			}
		}
		if before := at.Add(-time.Hour); before.Format(layout) == at.Format(layout) {
			at = before
		}
	}
	return at.UTC(), nil
}

func number(s string) bool {
	for i, c := range s {
		if (c < '0' || c > '9') && c != '.' && (c != '-' || i > 0) {
			return false
		}
	}
	return len(s) > 8 || !strings.Contains(s, "-") // 2024-01-01 has digits and dashes alone
}

// guess takes a number since the epoch in the unit that gives a year from 1973 to
// 5138.
func guess(s string) (time.Time, error) {
	whole, _, _ := strings.Cut(s, ".")
	digits := len(strings.TrimLeft(strings.TrimPrefix(whole, "-"), "0"))
	switch {
	case digits <= 11:
		return epoch(s, 1e9, "unix")
	case digits <= 14:
		return epoch(s, 1e6, "unix_ms")
	case digits <= 17:
		return epoch(s, 1e3, "unix_us")
	}
	return epoch(s, 1, "unix_ns")
}

// epoch reads a decimal number of units exactly, which a float would not.
func epoch(s string, unit int64, name string) (time.Time, error) {
	if n, err := strconv.ParseInt(s, 10, 64); err == nil && n < (1<<62)/unit && n > -(1<<62)/unit {
		return time.Unix(0, n*unit).UTC(), nil
	}
	r, ok := new(big.Rat).SetString(s)
	if !ok || len(s) > 40 || strings.ContainsAny(s, "/eEpPxX_") {
		return time.Time{}, fmt.Errorf("%q is not a number of %s", s, name)
	}
	r.Mul(r, new(big.Rat).SetInt64(unit))
	ns := new(big.Int).Quo(r.Num(), r.Denom())
	if !ns.IsInt64() {
		return time.Time{}, fmt.Errorf("%q is out of the range of times", s)
	}
	return time.Unix(0, ns.Int64()).UTC(), nil
}
