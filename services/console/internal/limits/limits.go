// Package limits brings together what counters and decisions say of a limit, so that the
// API and the page say the same as a refusal does. It is pure.
package limits

import (
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/pkg/window"
)

// Effective is the verdict of a decision at a time: a block ends with its period, at the
// gateways as here.
func Effective(d *usage.Decision, now usage.Micros) usage.Verdict {
	if d.PeriodEnd != 0 && now >= d.PeriodEnd {
		return usage.Allow
	}
	return d.Verdict
}

// Settle makes l how the limit stands at a time, now in the ledger's time. d is the
// decision that gateways hold of it; nil: none. Of counters and decision the newer one is
// right: counters are older while another aggregator takes over, decisions while one is
// on its way.
func Settle(l *ledger.LimitUsage, d *usage.Decision, now usage.Micros) {
	counted := l.Revision
	if l.PeriodEnd != 0 && now >= l.PeriodEnd {
		begin(l, now)
	}
	if d == nil || d.Revision < counted {
		return
	}
	verdict := Effective(d, now)
	l.Verdict = verdict.String()
	if d.Revision == counted || verdict == usage.Allow {
		return
	}
	l.DecisionID, l.Revision = d.ID, d.Revision
	l.Used = max(l.Used, d.Used)
	l.Remaining = min(l.Remaining, max(l.Amount-l.Used, 0))
	if verdict == usage.Deny {
		l.Room = d.Room
		l.Remaining = min(l.Remaining, d.Room)
	}
}

// begin brings a limit whose period has ended into the present one. The shard has counted
// nothing in it: with its first entry the shard's own time would have reached it.
func begin(l *ledger.LimitUsage, now usage.Micros) {
	start, end := window.Bounds(l.Window, now)
	if end == 0 {
		return // a window that this program does not know
	}
	l.PeriodStart, l.PeriodEnd = start, end
	l.Used, l.Remaining, l.Room, l.Lease = 0, max(l.Amount, 0), 0, nil
	l.Verdict, l.DecisionID, l.Revision = usage.Allow.String(), "", 0
}

// Worst is the severest verdict of limits.
func Worst(all []ledger.LimitUsage) usage.Verdict {
	worst := usage.Allow
	for i := range all {
		switch all[i].Verdict {
		case "deny":
			return usage.Deny
		case "warn":
			worst = usage.Warn
		}
	}
	return worst
}
