package alert

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// about is put before numbers of accounts that are estimates.
func about(a *usage.Alert) string {
	if a.Estimated {
		return "about "
	}
	return ""
}

// firingText is the sentence that wakes somebody.
func (r *Ratio) firingText(a *usage.Alert, kind waveKind) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s%d of %d active accounts (%s) ", about(a), a.Refused, a.Active, percent(a.Value))
	switch kind {
	case began:
		fmt.Fprintf(&b, "began to be refused with 402 within %s", span(r.rule.Window))
	case again:
		b.WriteString("are refused with 402 again since the last wave was over")
	case found:
		b.WriteString("are refused with 402, since before the alerter watched")
	}
	fmt.Fprintf(&b, ", the threshold is %s", percent(a.Threshold))
	for i, c := range a.Codes[:min(len(a.Codes), 3)] {
		b.WriteString([]string{"; codes: ", ", ", ", "}[i])
		fmt.Fprintf(&b, "%s %d", c.Code, c.Accounts)
	}
	if left := a.StillRefused - a.RefusedBefore - a.Refused; left > 0 {
		fmt.Fprintf(&b, "; %s%d of the wave before are still refused", about(a), left)
	}
	r.rest(&b, a)
	return b.String()
}

// resolveText says how many are still refused, and why that is no incident.
func (r *Ratio) resolveText(a *usage.Alert) string {
	var b strings.Builder
	still := a.StillRefused - a.RefusedBefore
	switch {
	case a.Reason == usage.ResolvedNoTraffic:
		fmt.Fprintf(&b, "no calls for %s: whether accounts are still refused is not known", span(r.rule.NoTrafficAfter))
	case a.Reason == usage.ResolvedNewWave:
		fmt.Fprintf(&b, "not over: %s%d accounts are refused with 402; a new wave has begun, with an alert of its own", about(a), still)
	case still <= 0:
		fmt.Fprintf(&b, "no account of this alert gets 402s any more, of %s%d", about(a), a.PeakRefused)
	case still*leftover <= a.PeakRefused:
		fmt.Fprintf(&b, "%s%d accounts are still refused with 402, of %d: at most a tenth is left, which keeps no alert open", about(a), still, a.PeakRefused)
	default:
		fmt.Fprintf(&b, "%s%d accounts are still refused with 402, of %d: an incident has %d or more", about(a), still, a.PeakRefused, r.rule.MinAccounts)
	}
	r.rest(&b, a)
	return b.String()
}

// rest adds what holds of either.
func (r *Ratio) rest(b *strings.Builder, a *usage.Alert) {
	if a.RefusedBefore > 0 && a.Reason != usage.ResolvedNoTraffic {
		fmt.Fprintf(b, "; %s%d others were refused before it began", about(a), a.RefusedBefore)
	}
	if a.LagSeconds > r.rule.MaxLag.Seconds() {
		fmt.Fprintf(b, "; the pipeline is %.0f s behind", a.LagSeconds)
	}
}

// span writes 1m0s as 1m.
func span(d time.Duration) string {
	s := d.String()
	for _, none := range []string{"m0s", "h0m"} {
		if strings.HasSuffix(s, none) {
			s = s[:len(s)-2]
		}
	}
	return s
}

func percent(v float64) string { return strconv.FormatFloat(v*100, 'f', 0, 64) + "%" }
