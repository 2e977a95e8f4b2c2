// Package explain says why a decision was made (law 7): it finds the decision,
// replays its shard of the ledger with the rules that count up to the entry that
// led to it, compares the verdicts, and lists the calls that fed the counter, out
// of the ledger itself. Neither ClickHouse nor an aggregator is needed.
package explain

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/explain/trace"
)

// Bounds of an explanation.
const (
	DefaultPage = 100
	MaxPage     = 1000
	// maxIndexed is how many of the calls that fed a counter are remembered by
	// position between two pages; older ones cost another replay.
	maxIndexed = 1 << 17
	// maxCached is how many explanations are remembered for their next page.
	maxCached = 8
	// maxReplays run at once: each holds the state of a shard.
	maxReplays = 2
)

// Errors about what was asked. Those about the ledger are ledger.ErrPurged (the
// entries that led to the decision are gone) and ledger.ErrRewound.
var (
	ErrID      = errors.New("it is not a decision's id")
	ErrCursor  = errors.New("the cursor is not one of this list")
	ErrUnknown = errors.New("there is no such decision")
)

// Options of an Explainer.
type Options struct {
	JS jetstream.JetStream
	// Horizon of foreign events, as the aggregator has it; 0 means a day. It
	// matters to replays from the ledger's beginning.
	Horizon time.Duration
}

// Explainer explains decisions. Its methods may be called concurrently.
type Explainer struct {
	o     Options
	slots chan struct{}

	mu    sync.Mutex
	cache []*replayed // most recently used last
}

// New returns an explainer.
func New(o Options) *Explainer {
	return &Explainer{o: o, slots: make(chan struct{}, maxReplays)}
}

// Query asks for an explanation.
type Query struct {
	// ID of a decision, or of a request that one has refused.
	ID string
	// Limit bounds the calls of the page, 1 to MaxPage; 0 means DefaultPage.
	Limit int
	// Cursor is the NextCursor of the page before; empty: the newest calls.
	Cursor string
	// Progress, if set, is called about once a second when it takes longer than
	// two; not concurrently.
	Progress func(Progress)
}

// Progress of an explanation that takes long.
type Progress struct {
	// Stage is what is being done, for people.
	Stage string
	// Done of Total positions of the stream.
	Done, Total uint64
}

// Explanation of a decision. Times are microseconds since the Unix epoch, 0 is
// none.
type Explanation struct {
	Decision Decision `json:"decision"`
	// Request that the decision has refused; nil when it was asked for by its own id.
	Request *Call   `json:"request,omitempty"`
	Replay  Replay  `json:"replay"`
	Limit   Limit   `json:"limit"`
	Counter Counter `json:"counter"`
	Reason  Reason  `json:"reason"`
	Entry   Entry   `json:"entry"`
	// Crossing is the call that reached the threshold; nil when no call did.
	Crossing *Call     `json:"crossing_call"`
	Fed      trace.Fed `json:"fed"`
	// Allowance is what gateways held; nil in the tier eventual.
	Allowance *Allowance `json:"allowance,omitempty"`
	// Calls that fed the counter, newest first.
	Calls      []Call `json:"calls"`
	NextCursor string `json:"next_cursor"`
}

// Decision as it was published or, when no copy is kept, as the replay made it.
type Decision struct {
	ID          string       `json:"id"`
	Account     string       `json:"account"`
	LimitID     string       `json:"limit_id"`
	Verdict     string       `json:"verdict"`
	Code        string       `json:"code,omitempty"`
	Revision    uint64       `json:"revision"`
	Shard       uint32       `json:"shard"`
	Epoch       uint64       `json:"epoch,omitempty"`
	Used        int64        `json:"used"`
	Amount      int64        `json:"amount"`
	PeriodStart usage.Micros `json:"period_start_unix_micros"`
	PeriodEnd   usage.Micros `json:"period_end_unix_micros"`
	DecidedAt   usage.Micros `json:"decided_at_unix_micros"`
	Cause       usage.Micros `json:"cause_unix_micros"`
	// Room is how much could still be had although it was denied: one call needed
	// more. Tiers exact and leased only.
	Room int64 `json:"room,omitempty"`
}

// Allowance is how the amount of a limit of the tiers exact and leased was shared
// after the entry that led to the decision.
type Allowance struct {
	// Settled is what was used for certain, Outstanding what gateways held and may
	// have used, Dead the part of it that may not be used any more but was not
	// reported either.
	Settled     int64 `json:"settled"`
	Outstanding int64 `json:"outstanding"`
	Dead        int64 `json:"dead"`
	// Exposure is what was given up to hand it out again (tier leased), Overdraft
	// what was used beyond the amount.
	Exposure  int64   `json:"exposure"`
	Overdraft int64   `json:"overdraft"`
	Waiting   int     `json:"waiting"` // gateways that had asked and had no answer yet
	Leases    []Lease `json:"leases"`
}

// Lease is what one gateway held.
type Lease struct {
	Gateway string `json:"gateway"` // the producer of its frames
	// Granted, Used, Over (used beyond what was granted) and Returned are totals of
	// the window; Outstanding is what is left of Granted.
	Granted     int64 `json:"granted"`
	Used        int64 `json:"used"`
	Over        int64 `json:"over"`
	Returned    int64 `json:"returned"`
	Outstanding int64 `json:"outstanding"`
	// Held is the part of Outstanding that open calls reserve.
	Held     int64        `json:"held"`
	Released int64        `json:"released"`
	Expires  usage.Micros `json:"expires_unix_micros"`
	// State: live, lapsed (it may not be used any more), released or closed.
	State string `json:"state"`
}

// Replay is what replaying the ledger gave.
type Replay struct {
	// Same: the replay came to the very same decision, and the calls that fed
	// the counter add up to it.
	Same bool   `json:"same"`
	Text string `json:"text"`
	// Published: a published copy was there to compare with.
	Published   bool         `json:"published"`
	Differences []Difference `json:"differences"`
	// Snapshot that the replay began with; empty: it began at the ledger's
	// beginning.
	Snapshot string `json:"snapshot,omitempty"`
	// From is the first ledger sequence that was replayed, Entries how many of
	// the shard were.
	From    uint64 `json:"from_sequence"`
	Entries uint64 `json:"entries"`
	// Took in microseconds.
	Took int64 `json:"took_micros"`
}

// Difference between what was published and what the replay gave.
type Difference struct {
	Field     string `json:"field"`
	Published string `json:"published"`
	Replayed  string `json:"replayed"`
}

// Limit as it stood when it was decided.
type Limit struct {
	ID          string           `json:"id"`
	PlanVersion string           `json:"plan_version"`
	Meter       usage.Meter      `json:"meter"`
	Models      []string         `json:"models,omitempty"`
	Routes      []string         `json:"routes,omitempty"`
	Methods     []string         `json:"methods,omitempty"`
	Window      usage.WindowKind `json:"window"`
	Amount      int64            `json:"amount"`
	// WarnAt is the use from which it warns; 0: it does not.
	WarnPercent uint32     `json:"warn_percent,omitempty"`
	WarnAt      int64      `json:"warn_at,omitempty"`
	ActionURL   string     `json:"action_url,omitempty"`
	Tier        usage.Tier `json:"tier"`
}

// Counter's value before and after the entry that led to the decision.
type Counter struct {
	Before int64 `json:"before"`
	After  int64 `json:"after"`
}

// Kinds of reasons.
const (
	ReasonCall       = "call"       // a call reached the threshold
	ReasonPlan       = "plan"       // plans took effect
	ReasonAccount    = "account"    // the account was changed
	ReasonPeriod     = "period"     // a new period began
	ReasonCorrection = "correction" // usage was corrected
	ReasonLease      = "lease"      // what gateways asked for, or said was used, of their leases
	ReasonOpening    = "opening"    // what was used before the limit was there was added
	ReasonStanding   = "standing"   // the counter stood there before, and is told anew
)

// Reason of a decision.
type Reason struct {
	Kind string `json:"kind"`
	Text string `json:"text"`
}

// Entry of the ledger that led to the decision.
type Entry struct {
	Stream     string       `json:"stream"`
	Shard      uint32       `json:"shard"`
	Sequence   uint64       `json:"sequence"`
	StreamTime usage.Micros `json:"stream_time_unix_micros"`
	// Kind: calls, control or lease.
	Kind string `json:"kind"`
	// Of calls:
	Producer string       `json:"producer,omitempty"`
	Frame    uint64       `json:"frame,omitempty"`
	Gateway  string       `json:"gateway,omitempty"`
	SealedAt usage.Micros `json:"sealed_at_unix_micros,omitempty"`
	Calls    int          `json:"calls,omitempty"`
	// Of control:
	ID        string       `json:"id,omitempty"`
	Author    string       `json:"author,omitempty"`
	CreatedAt usage.Micros `json:"created_at_unix_micros,omitempty"`
	What      string       `json:"what,omitempty"`
}

// Call that fed the counter, or with Index -1 a control entry that changed it.
type Call struct {
	Sequence   uint64       `json:"sequence"`
	Index      int          `json:"index"`
	StreamTime usage.Micros `json:"stream_time_unix_micros"`
	// Adds is what it added to the counter, UsedAfter the counter with it.
	Adds      int64        `json:"adds"`
	UsedAfter int64        `json:"used_after"`
	Time      usage.Micros `json:"time_unix_micros"`
	Account   string       `json:"account,omitempty"`
	KeyID     string       `json:"key_id,omitempty"`
	RequestID string       `json:"request_id,omitempty"`
	TraceID   string       `json:"trace_id,omitempty"`
	Method    string       `json:"method,omitempty"`
	Route     string       `json:"route,omitempty"`
	Model     string       `json:"model,omitempty"`
	Region    string       `json:"region,omitempty"`
	Status    uint16       `json:"status,omitempty"`
	// Ending is how it ended, as usage.Ending names it; Estimated: some of what it used
	// is an estimate.
	Ending    string `json:"ending,omitempty"`
	Estimated bool   `json:"estimated,omitempty"`
	Source    string `json:"source,omitempty"`
	EventID   string `json:"event_id,omitempty"`
	Producer  string `json:"producer,omitempty"`
	Frame     uint64 `json:"frame,omitempty"`
	Gateway   string `json:"gateway,omitempty"`
	// Act is the control entry.
	Act *Act `json:"act,omitempty"`
}

// Act is a control entry that changed the counter. The usage that it corrects has
// the call's Time, Account, Method, Route and Model.
type Act struct {
	ID        string       `json:"id"`
	Author    string       `json:"author"`
	CreatedAt usage.Micros `json:"created_at_unix_micros"`
	What      string       `json:"what"`
	Reason    string       `json:"reason,omitempty"`
	Reference string       `json:"reference,omitempty"`
}

// Explain explains a decision, which may be asked for by the id of a request that it
// has refused. Beside ErrID, ErrCursor, ErrUnknown, ErrNotRefused, ledger.ErrPurged
// and ledger.ErrRewound its errors are NATS's and ctx's. A replay that comes to
// something else is no error: Replay says so.
func (x *Explainer) Explain(ctx context.Context, q Query) (*Explanation, error) {
	if !requestID(q.ID) {
		return nil, fmt.Errorf("%q: %w: take the decision_id or the request_id of a refusal", q.ID, ErrID)
	}
	below := trace.Newest
	if q.Cursor != "" {
		var err error
		if below, err = trace.ParsePosition(q.Cursor); err != nil {
			return nil, fmt.Errorf("%q: %w: take the next_cursor of the page before", q.Cursor, ErrCursor)
		}
	}
	limit := q.Limit
	if limit <= 0 {
		limit = DefaultPage
	}
	limit = min(limit, MaxPage)
	r := x.cached(q.ID, below, limit)
	if r == nil {
		select {
		case x.slots <- struct{}{}:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for other explanations: %w", ctx.Err())
		}
		defer func() { <-x.slots }()
		// Somebody else may have asked the same meanwhile.
		if r = x.cached(q.ID, below, limit); r == nil {
			var err error
			if r, err = x.replayed(ctx, q.ID, below, &progress{tell: q.Progress, begin: time.Now()}); err != nil {
				return nil, err
			}
			x.keep(r)
		}
	}
	rows, next := r.page(below, limit)
	calls, err := x.calls(ctx, rows)
	if err != nil {
		return nil, err
	}
	e := r.explanation
	e.Calls, e.NextCursor = calls, next
	return &e, nil
}

// replayed finds the decision of an id and replays it.
func (x *Explainer) replayed(ctx context.Context, text string, below trace.Position, p *progress) (*replayed, error) {
	var why error
	if id, err := ksuid.Parse(text); err == nil {
		r, err := x.replay(ctx, id, below, p)
		if !errors.Is(err, ErrUnknown) {
			return r, err
		}
		why = err
	}
	found, err := x.requestNewest(ctx, text, p)
	if errors.Is(err, ErrUnknown) && why != nil {
		err = why
	}
	if err != nil {
		return nil, err
	}
	r, err := x.replay(ctx, found.decision, below, p)
	if err == nil {
		r.explanation.Request = found.call
	}
	return r, err
}

// cached returns a replay that holds the page, or nil.
func (x *Explainer) cached(id string, below trace.Position, limit int) *replayed {
	x.mu.Lock()
	defer x.mu.Unlock()
	for i, r := range x.cache {
		if e := &r.explanation; (e.Decision.ID == id || e.Request != nil && e.Request.RequestID == id) && r.covers(below, limit) {
			x.cache = append(slices.Delete(x.cache, i, i+1), r)
			return r
		}
	}
	return nil
}

func (x *Explainer) keep(r *replayed) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.cache = append(x.cache, r)
	if len(x.cache) > maxCached {
		x.cache = slices.Delete(x.cache, 0, 1)
	}
}

// progress tells of what takes long.
type progress struct {
	tell        func(Progress)
	begin, last time.Time
	n           uint
}

// Pauses before the first telling and between two.
const (
	firstTelling = 2 * time.Second
	nextTelling  = time.Second
)

func (p *progress) at(stage string, done, total uint64) {
	// The clock is not looked at for every entry.
	if p.n++; p.tell == nil || p.n%64 != 0 {
		return
	}
	now := time.Now()
	if now.Sub(p.begin) < firstTelling || now.Sub(p.last) < nextTelling {
		return
	}
	p.last = now
	p.tell(Progress{Stage: stage, Done: min(done, total), Total: total})
}

// differences compares what was published with what the replay gave. Epochs are
// left out: they say who counted.
func differences(p, r *usage.Decision) []Difference {
	list := []Difference{}
	note := func(field string, a, b any) {
		if x, y := fmt.Sprint(a), fmt.Sprint(b); x != y {
			list = append(list, Difference{field, x, y})
		}
	}
	note("id", p.ID, r.ID)
	note("account", p.Account, r.Account)
	note("limit_id", p.LimitID, r.LimitID)
	note("verdict", p.Verdict, r.Verdict)
	note("code", p.Code, r.Code)
	note("revision", p.Revision, r.Revision)
	note("shard", p.Shard, r.Shard)
	note("used", p.Used, r.Used)
	note("amount", p.Amount, r.Amount)
	note("meter", p.Meter, r.Meter)
	note("window", p.Window, r.Window)
	note("period_start", p.PeriodStart, r.PeriodStart)
	note("period_end", p.PeriodEnd, r.PeriodEnd)
	note("filter", fmt.Sprintf("%q", [][]string{p.Filter.Models, p.Filter.Routes, p.Filter.Methods}), fmt.Sprintf("%q", [][]string{r.Filter.Models, r.Filter.Routes, r.Filter.Methods}))
	note("warn_percent", p.WarnPercent, r.WarnPercent)
	note("plan_version", p.PlanVersion, r.PlanVersion)
	note("decided_at", p.DecidedAt, r.DecidedAt)
	note("cause", p.Cause, r.Cause)
	note("action_url", p.ActionURL, r.ActionURL)
	note("tier", cmp.Or(p.Tier, usage.TierEventual), cmp.Or(r.Tier, usage.TierEventual))
	note("room", p.Room, r.Room)
	return list
}

// moment writes a time for people.
func moment(m usage.Micros) string { return m.Time().Format(time.RFC3339Nano) }

func decisionOf(d *usage.Decision) Decision {
	return Decision{
		ID: d.ID, Account: d.Account, LimitID: d.LimitID, Verdict: d.Verdict.String(), Code: string(d.Code), Revision: d.Revision, Shard: d.Shard,
		Epoch: d.Epoch, Used: d.Used, Amount: d.Amount, PeriodStart: d.PeriodStart, PeriodEnd: d.PeriodEnd, DecidedAt: d.DecidedAt, Cause: d.Cause, Room: d.Room,
	}
}

func limitOf(d *usage.Decision) Limit {
	return Limit{
		ID: d.LimitID, PlanVersion: d.PlanVersion, Meter: d.Meter, Models: d.Filter.Models, Routes: d.Filter.Routes, Methods: d.Filter.Methods,
		Window: d.Window, Amount: d.Amount, WarnPercent: d.WarnPercent, WarnAt: trace.WarnAt(d), ActionURL: d.ActionURL,
		Tier: cmp.Or(d.Tier, usage.TierEventual),
	}
}

// allowanceOf says how an allowance stood; nil where there was none.
func allowanceOf(state *lease.State, holdings []lease.Holding) *Allowance {
	if state == nil {
		return nil
	}
	a := &Allowance{
		Settled: state.Settled, Outstanding: state.Outstanding, Dead: state.Dead, Exposure: state.Exposure, Overdraft: state.Overdraft,
		Waiting: state.Waits, Leases: make([]Lease, 0, len(holdings)),
	}
	for i := range holdings {
		h := &holdings[i]
		l := Lease{
			Gateway: ksuid.KSUID(h.Gateway).String(), Granted: h.Granted, Used: h.Used, Over: h.Over, Returned: h.Returned, Outstanding: h.Outstanding,
			Held: h.Held, Released: h.Released, Expires: usage.Micros(h.Expiry), State: "live",
		}
		switch {
		case h.Closed:
			l.State = "closed"
		case h.Released != 0:
			l.State = "released"
		case h.Lapsed:
			l.State = "lapsed"
		}
		a.Leases = append(a.Leases, l)
	}
	return a
}

// purged says what is missing of a decision that is known.
func purged(d *usage.Decision, first uint64, since usage.Micros) error {
	return fmt.Errorf("the decision is known (%s of %s for %s at %d of %d, entry %d of %s), but the ledger begins at entry %d of %s and no snapshot before the decision is kept: it is older than what can be explained: %w",
		d.Verdict, d.LimitID, d.Account, d.Used, d.Amount, d.Revision, moment(d.DecidedAt), first, moment(since), ledger.ErrPurged)
}
