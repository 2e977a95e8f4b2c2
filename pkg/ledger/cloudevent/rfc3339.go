package cloudevent

import (
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// parseTime reads a date-time of RFC 3339, by its grammar and nothing else: T and Z
// in either case, any number of digits in the fraction (those below a microsecond are
// cut off), an offset of up to 23:59. time.Parse is no judge of it: it takes a comma in
// the fraction, and refuses lower case and leap seconds.
//
// A leap second (:60, only at the end of a UTC month) is the last microsecond of the
// second before it: it stays in the minute, day and month that it names, which a
// window's limit counts.
func parseTime(s string) (usage.Micros, bool) {
	p := timeParser{s: s, ok: true}
	year := p.digits(4)
	p.one("-")
	month := p.digits(2)
	p.one("-")
	day := p.digits(2)
	p.one("Tt")
	hour := p.digits(2)
	p.one(":")
	minute := p.digits(2)
	p.one(":")
	second := p.digits(2)
	micros := p.fraction()
	offset := p.offset()
	if !p.ok || p.s != "" || month < 1 || month > 12 || day < 1 || hour > 23 || minute > 59 || second > 60 {
		return 0, false
	}
	leap := second == 60
	if leap {
		second, micros = 59, 999_999
	}
	local := time.Date(year, time.Month(month), day, hour, minute, second, micros*1000, time.UTC)
	if local.Day() != day { // the 30th of February is the 2nd of March there
		return 0, false
	}
	at := local.Add(-time.Duration(offset) * time.Minute)
	if leap && (at.Hour() != 23 || at.Minute() != 59 || at.AddDate(0, 0, 1).Day() != 1) {
		return 0, false
	}
	return usage.At(at), true
}

type timeParser struct {
	s  string
	ok bool
}

func (p *timeParser) digits(n int) int {
	v := 0
	for range n {
		if p.s == "" || p.s[0] < '0' || p.s[0] > '9' {
			p.ok = false
			return 0
		}
		v, p.s = v*10+int(p.s[0]-'0'), p.s[1:]
	}
	return v
}

// one takes one of these characters and returns it.
func (p *timeParser) one(of string) byte {
	if p.s != "" {
		for i := range len(of) {
			if p.s[0] == of[i] {
				p.s = p.s[1:]
				return of[i]
			}
		}
	}
	p.ok = false
	return 0
}

// fraction takes an optional fraction of a second and returns its microseconds.
func (p *timeParser) fraction() int {
	if p.s == "" || p.s[0] != '.' {
		return 0
	}
	p.s = p.s[1:]
	v, n := 0, 0
	for ; p.s != "" && p.s[0] >= '0' && p.s[0] <= '9'; n++ {
		if n < 6 {
			v = v*10 + int(p.s[0]-'0')
		}
		p.s = p.s[1:]
	}
	if n == 0 {
		p.ok = false
	}
	for ; n < 6; n++ {
		v *= 10
	}
	return v
}

// offset takes the offset from UTC and returns its minutes.
func (p *timeParser) offset() int {
	sign := 1
	switch p.one("Zz+-") {
	case '-':
		sign = -1
	case '+':
	default:
		return 0
	}
	hours := p.digits(2)
	p.one(":")
	minutes := p.digits(2)
	if hours > 23 || minutes > 59 {
		p.ok = false
	}
	return sign * (hours*60 + minutes)
}
