// Package terms is how a plans file says by which rules gateways share the amount
// of a limit of the tiers exact and leased. It is pure.
package terms

import (
	"fmt"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Lease says how gateways share the amount of a limit of the tiers exact and
// leased; see usage.LeaseTerms. Spans of time are written as time.Duration
// prints them.
type Lease struct {
	Term         string `json:"term,omitempty"`     // usage.DefaultLeaseTerm when empty
	Patience     string `json:"patience,omitempty"` // usage.DefaultLeasePatience when empty
	ReleaseAfter string `json:"release_after,omitempty"`
	MaxExposure  int64  `json:"max_exposure,omitempty"`
}

// Usage converts the terms of a checked limit; a nil receiver has the defaults.
func (l *Lease) Usage() usage.LeaseTerms {
	t := usage.LeaseTerms{Term: usage.DefaultLeaseTerm, Patience: usage.DefaultLeasePatience}
	if l == nil {
		return t
	}
	t.MaxExposure = l.MaxExposure
	for _, f := range [...]struct {
		text string
		into *usage.Micros
	}{{l.Term, &t.Term}, {l.Patience, &t.Patience}, {l.ReleaseAfter, &t.ReleaseAfter}} {
		if d, err := time.ParseDuration(f.text); err == nil {
			*f.into = usage.Micros(d.Microseconds())
		}
	}
	return t
}

// Canonical writes the defaults out, and each span in one way; a nil receiver has
// the defaults.
func (l *Lease) Canonical() *Lease {
	t := l.Usage()
	c := &Lease{Term: span(t.Term), Patience: span(t.Patience), MaxExposure: t.MaxExposure}
	if t.ReleaseAfter != 0 {
		c.ReleaseAfter = span(t.ReleaseAfter)
	}
	return c
}

func span(m usage.Micros) string { return (time.Duration(m) * time.Microsecond).String() }

// Bounds of a lease's terms beside usage.MaxLeaseSpan. A term holds while asks
// and answers pass several times, and patience while one does.
const (
	minLeaseTerm     = time.Second
	minLeasePatience = 50 * time.Millisecond
	minReleaseAfter  = time.Second
	maxLeased        = lease.MaxUnits
	maxLeaseSpan     = time.Duration(usage.MaxLeaseSpan) * time.Microsecond
)

// Check tells of what is wrong with the lease of a limit, which may be nil: why,
// what to do, and the field of the limit.
func (l *Lease) Check(tier string, amount int64, tell func(reason, do string, field ...any)) {
	terms := l
	if !usage.Tier(tier).Leased() {
		if terms != nil {
			tell("a limit of the tier eventual has no lease", "leave it out, or write tier: exact or tier: leased", "lease")
		}
		return
	}
	if terms == nil {
		terms = &Lease{}
	}
	if amount > maxLeased {
		tell(fmt.Sprintf("an amount of %d can't be handed out in leases", amount), fmt.Sprintf("write at most %d, or tier: eventual", maxLeased), "amount")
	}
	at := func(field, reason, do string) { tell(reason, do, "lease", field) }
	read := func(field, text string, absent, least time.Duration) (time.Duration, bool) {
		if text == "" {
			return absent, true
		}
		d, err := time.ParseDuration(text)
		switch {
		case err != nil:
			at(field, field+" is not a span of time", "write it like 5s, 400ms or 1m30s")
		case d < least:
			at(field, fmt.Sprintf("%s is %s", field, text), fmt.Sprintf("write at least %s", least))
		case d > maxLeaseSpan:
			at(field, fmt.Sprintf("%s is %s", field, text), fmt.Sprintf("write at most %s", maxLeaseSpan))
		case d%time.Microsecond != 0:
			at(field, fmt.Sprintf("%s is %s", field, text), "write whole microseconds")
		default:
			return d, true
		}
		return 0, false
	}
	term, ok := read("term", terms.Term, time.Duration(usage.DefaultLeaseTerm)*time.Microsecond, minLeaseTerm)
	patience, ok2 := read("patience", terms.Patience, time.Duration(usage.DefaultLeasePatience)*time.Microsecond, minLeasePatience)
	if ok && ok2 && patience >= term {
		at("patience", fmt.Sprintf("patience is %s and the term %s", patience, term), "write a patience below the term")
	}
	read("release_after", terms.ReleaseAfter, 0, minReleaseAfter)
	if terms.MaxExposure < 0 {
		at("max_exposure", fmt.Sprintf("max_exposure is %d", terms.MaxExposure), "write a number from 1 on")
	}
	for _, f := range [...]struct {
		name  string
		given bool
	}{{"release_after", terms.ReleaseAfter != ""}, {"max_exposure", terms.MaxExposure != 0}} {
		switch {
		case tier == string(usage.TierLeased) && !f.given:
			tell("the lease has no "+f.name, "add it, or write tier: exact: a silent gateway's share is then never handed out twice", "tier")
		case tier == string(usage.TierExact) && f.given:
			at(f.name, f.name+" would let an exact limit be exceeded", "leave it out, or write tier: leased")
		}
	}
}
