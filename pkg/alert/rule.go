// Package alert holds the pure core of alerting: folds of the ledger's calls
// that say when an episode begins and ends. It knows no clock, no I/O and no
// identity of episodes; time comes in with every call of it.
package alert

import (
	"errors"
	"fmt"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// ScopeGlobal is the scope of a rule that looks at every call.
const ScopeGlobal = "global"

// Rule is the plain rule: accounts that begin to be refused with 402 against
// accounts that make calls. DefaultRule has sensible values for all of it.
type Rule struct {
	// Name is a label of metrics and alerts: letters, digits, '_' and '-'.
	Name string
	// Severity is told to receivers, such as "page" or "ticket".
	Severity string
	// Window slides in steps of Step, which divides it.
	Window, Step time.Duration
	// Threshold that refused/active has to reach, above 0 and at most 1.
	Threshold float64
	// MinAccounts that have to begin to be refused; at least 1.
	MinAccounts int
	// For is how long the breach has to last before it fires; 0 fires at once.
	For time.Duration
	// Hysteresis lowers the threshold (and MinAccounts) for the resolve by this
	// part, 0 to below 1.
	Hysteresis float64
	// ResolveAfter is how long it has to be below that, with traffic.
	ResolveAfter time.Duration
	// NoTrafficAfter resolves an episode, with that reason, when nothing was
	// called for so long; 0 is never.
	NoTrafficAfter time.Duration
	// Quiet is how long an account must not have got a 402 so that its next one
	// counts as a beginning again and not as a retry; at least Window.
	Quiet time.Duration
	// MaxLag is how far the reader may be behind the ledger before a resolve is
	// held back.
	MaxLag time.Duration
	// MaxAccounts bounds the accounts that are remembered; beyond, a sample of
	// them is kept and the numbers are estimates, which is said.
	MaxAccounts int
	// Top is how many accounts and codes an alert names.
	Top int
}

// DefaultRule returns the rule that is used when nothing is configured.
func DefaultRule() Rule {
	return Rule{
		Name: "refused_accounts", Severity: "page",
		Window: time.Minute, Step: time.Second,
		Threshold: 0.2, MinAccounts: 5, For: 5 * time.Second,
		Hysteresis: 0.5, ResolveAfter: 30 * time.Second, NoTrafficAfter: 10 * time.Minute,
		Quiet: 5 * time.Minute, MaxLag: 30 * time.Second,
		MaxAccounts: 500_000, Top: 10,
	}
}

// maxSteps bounds windows and waits in steps.
const maxSteps = 100_000

// Validate reports everything that is wrong with the rule.
func (r *Rule) Validate() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("alert rule %q: "+format, append([]any{r.Name}, args...)...))
	}
	if r.Name == "" || len(r.Name) > 64 {
		bad("its name must have 1 to 64 characters")
	}
	for _, c := range r.Name {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_' && c != '-' {
			bad("its name may have letters, digits, '_' and '-' only")
			break
		}
	}
	if len(r.Severity) > 64 {
		bad("its severity must have at most 64 characters")
	}
	if r.Step < time.Millisecond || r.Window < r.Step || r.Window%r.Step != 0 {
		bad("the window (%s) must be a multiple of the step (%s), and the step at least 1ms", r.Window, r.Step)
	} else {
		for _, d := range []struct {
			name string
			d    time.Duration
		}{
			{"window", r.Window}, {"for", r.For}, {"resolve-after", r.ResolveAfter}, {"no-traffic-after", r.NoTrafficAfter}, {"quiet", r.Quiet},
		} {
			if d.d < 0 || d.d/r.Step > maxSteps {
				bad("%s is %s: it must be between 0 and %d steps", d.name, d.d, maxSteps)
			}
		}
	}
	if !(r.Threshold > 0 && r.Threshold <= 1) {
		bad("the threshold is %g: it must be above 0 and at most 1", r.Threshold)
	}
	if r.MinAccounts < 1 {
		bad("the least number of accounts is %d: it must be at least 1", r.MinAccounts)
	}
	if !(r.Hysteresis >= 0 && r.Hysteresis < 1) {
		bad("the hysteresis is %g: it must be at least 0 and below 1", r.Hysteresis)
	}
	if r.Quiet < r.Window {
		bad("quiet (%s) must not be shorter than the window (%s)", r.Quiet, r.Window)
	}
	if r.MaxLag <= 0 {
		bad("the greatest lag is %s: it must be above 0", r.MaxLag)
	}
	if r.MaxAccounts < 16 {
		bad("it may remember %d accounts: at least 16 are needed", r.MaxAccounts)
	}
	if r.Top < 0 || r.Top > usage.MaxAlertTop {
		bad("it names the top %d: 0 to %d are possible", r.Top, usage.MaxAlertTop)
	}
	return errors.Join(errs...)
}

// Lookback is how much of the ledger before a moment decides about it.
func (r *Rule) Lookback() time.Duration { return r.Window + r.Quiet + r.Step }
