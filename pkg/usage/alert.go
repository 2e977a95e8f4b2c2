package usage

// AlertTransition is a step in an episode's life.
type AlertTransition string

// The transitions. An episode fires once and resolves once.
const (
	AlertFiring   AlertTransition = "firing"
	AlertResolved AlertTransition = "resolved"
)

// Why an episode resolved.
const (
	// ResolvedRecovered: there was traffic, few accounts began to be refused, and of
	// those that did few are still refused.
	ResolvedRecovered = "recovered"
	// ResolvedNewWave: it is not over, but another wave has begun, which is an episode
	// of its own. Its firing follows at once.
	ResolvedNewWave = "new_wave"
	// ResolvedNoTraffic: nothing was called for long; nobody can say whether it
	// is well.
	ResolvedNoTraffic = "no_traffic"
)

// RuleConservation is the rule of episodes of the conservation audit; their scope
// is the pair of points that do not agree, their value how many findings hold.
const RuleConservation = "conservation"

// MaxAlertTop bounds the lists of an Alert.
const MaxAlertTop = 20

// Alert is one transition of an episode, as it stands in the ALERTS stream on
// alerts.<episode> and in the body of a webhook (JSON). Times are those of the
// ledger.
type Alert struct {
	// EpisodeID is a ksuid in text form, the same for every transition, retry,
	// restart and reader of the same ledger.
	EpisodeID  string          `json:"episode_id"`
	Transition AlertTransition `json:"transition"`
	// N numbers the episode's transitions from 1; (EpisodeID, N) exists once.
	N    int    `json:"n"`
	Rule string `json:"rule"`
	// Scope is what the rule looked at; "global" is everything.
	Scope    string `json:"scope"`
	Severity string `json:"severity"`
	// StartedAt is the first breach, At is this transition.
	StartedAt Micros `json:"started_at_unix_micros"`
	At        Micros `json:"at_unix_micros"`
	// Value is Refused / Active (0 when there is no traffic), Threshold what it
	// fired against.
	Value     float64 `json:"value"`
	Threshold float64 `json:"threshold"`
	// Refused accounts began to get 402s within the window, Active accounts
	// made calls within it, StillRefused got a 402 within it, whenever they
	// began, or were not admitted since their newest one. RefusedBefore of them were
	// refused before the episode, which is not about them; PeakRefused is how many
	// others were at its height so far.
	Refused       int   `json:"refused_accounts"`
	Active        int   `json:"active_accounts"`
	StillRefused  int   `json:"still_refused_accounts"`
	RefusedBefore int   `json:"refused_before_accounts,omitempty"`
	PeakRefused   int   `json:"peak_refused_accounts,omitempty"`
	WindowSeconds int64 `json:"window_seconds"`
	// Reason of a resolve: ResolvedRecovered, ResolvedNewWave or ResolvedNoTraffic.
	Reason string `json:"reason,omitempty"`
	// Accounts that began to be refused, or in a resolve those that still are, most
	// refused calls first, and codes by number of such accounts; at most MaxAlertTop
	// each.
	Accounts []AlertAccount `json:"accounts"`
	Codes    []AlertCode    `json:"codes"`
	// LagSeconds is how far the ledger's reader was behind when it decided.
	LagSeconds float64 `json:"lag_seconds"`
	// Estimated: there were more accounts than are kept; the numbers of
	// accounts are scaled up from a sample.
	Estimated bool `json:"estimated,omitempty"`
	// Summary is one sentence for people.
	Summary      string `json:"summary"`
	RunbookURL   string `json:"runbook_url,omitempty"`
	DashboardURL string `json:"dashboard_url,omitempty"`
}

// TransitionID identifies the transition for JetStream and for receivers, who
// get it again with every retry: "<episode>:<transition>".
func (a *Alert) TransitionID() string { return a.EpisodeID + ":" + string(a.Transition) }

// AlertAccount is an account that an alert is about.
type AlertAccount struct {
	Account string `json:"account"`
	// Code of its first refusal.
	Code Code `json:"code"`
	// Refusals it got since it began to be refused.
	Refusals int64 `json:"refusals"`
}

// AlertCode is how many of an alert's accounts began with a code.
type AlertCode struct {
	Code     Code `json:"code"`
	Accounts int  `json:"accounts"`
}
