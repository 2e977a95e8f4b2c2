package simulation

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Options of a run. The zero value of a fault means that it does not happen.
type Options struct {
	Seed uint64
	// Trouble lasts so long before everything works.
	Trouble time.Duration
	// Kills, Ends (of gateways, in order), Stops, Cuts and Takeovers are how often,
	// on average, a second of trouble sees one.
	Kills, Ends, Stops, Cuts, Takeovers float64
	// Loss is the part of the messages that are lost, and as many are doubled.
	Loss float64
	// Trace takes a line for whatever happens; nil: nobody looks.
	Trace func(line string)
}

// Report says what a run has seen, so that nobody takes a run in which nothing
// happened for a proof.
type Report struct {
	Seed                                uint64
	Calls, Answered, Refused, Unknown   int // as the clients saw them
	Entries, Decisions, Grants, Denials int
	// Warm takeovers went on with what was folded already.
	Warm                                  int
	Kills, Ends, Stops, Cuts, Takeovers   int
	DuplicateFrames, Blocks, RepeatedRows int
	// Unsent calls were answered by gateways that did not spool before, and died.
	Unsent int
	// Returned units of killed gateways' leases came back by their marks.
	Returned int64
}

// Add sums reports up.
func (r *Report) Add(o *Report) {
	r.Calls += o.Calls
	r.Answered += o.Answered
	r.Refused += o.Refused
	r.Unknown += o.Unknown
	r.Entries += o.Entries
	r.Decisions += o.Decisions
	r.Grants += o.Grants
	r.Denials += o.Denials
	r.Kills += o.Kills
	r.Ends += o.Ends
	r.Stops += o.Stops
	r.Cuts += o.Cuts
	r.Takeovers += o.Takeovers
	r.Warm += o.Warm
	r.DuplicateFrames += o.DuplicateFrames
	r.Blocks += o.Blocks
	r.RepeatedRows += o.RepeatedRows
	r.Unsent += o.Unsent
	r.Returned += o.Returned
}

func (r *Report) String() string {
	return fmt.Sprintf("%d calls: %d answered, %d refused, %d unknown, %d never sent; %d entries, %d frames twice, %d decisions, %d grants, %d denials, %d units back by marks; %d blocks, %d of them sent again; %d kills, %d ends, %d stops, %d cuts, %d takeovers, %d of them warm",
		r.Calls, r.Answered, r.Refused, r.Unknown, r.Unsent, r.Entries, r.DuplicateFrames, r.Decisions, r.Grants, r.Denials, r.Returned, r.Blocks, r.RepeatedRows, r.Kills, r.Ends, r.Stops, r.Cuts, r.Takeovers, r.Warm)
}

// event is something that happens at a moment.
type event struct {
	at    usage.Micros
	order uint64 // of two at the same moment
	do    func()
}

type agenda []event

func (a agenda) Len() int { return len(a) }
func (a agenda) Less(i, j int) bool {
	return a[i].at < a[j].at || a[i].at == a[j].at && a[i].order < a[j].order
}
func (a agenda) Swap(i, j int) { a[i], a[j] = a[j], a[i] }
func (a *agenda) Push(x any)   { *a = append(*a, x.(event)) }
func (a *agenda) Pop() any {
	old := *a
	e := old[len(old)-1]
	old[len(old)-1] = event{}
	*a = old[:len(old)-1]
	return e
}

// world is everything that there is.
type world struct {
	o      Options
	r      *rand.Rand
	now    usage.Micros
	agenda agenda
	order  uint64
	calm   bool // nothing goes wrong any more
	// changed: plans or usage were, by hand.
	changed bool
	broken  []string
	report  Report

	nats       *natsServer
	clickhouse *clickhouse
	gateways   []*gateway
	members    []*member
	historian  *historian
	procs      []*proc

	accounts []*account
	calls    []*call
	byID     map[string]*call
}

func (w *world) chance(p float64) bool { return w.r.Float64() < p }

// between returns a span of microseconds, evenly.
func (w *world) between(from, to usage.Micros) usage.Micros {
	return from + usage.Micros(w.r.Int64N(int64(to-from)+1))
}

func (w *world) trace(format string, args ...any) {
	if w.o.Trace != nil {
		w.o.Trace(fmt.Sprintf("%9.3f ", float64(w.now-begin)/1e6) + fmt.Sprintf(format, args...))
	}
}

// fail notes that a law is broken; the run ends.
func (w *world) fail(format string, args ...any) {
	if len(w.broken) < 8 {
		w.broken = append(w.broken, fmt.Sprintf("at %.3f s: ", float64(w.now-begin)/1e6)+fmt.Sprintf(format, args...))
	}
}

func (w *world) err() error {
	if len(w.broken) == 0 {
		return nil
	}
	return fmt.Errorf("seed %d: %s", w.o.Seed, strings.Join(w.broken, "; "))
}

func (w *world) after(d usage.Micros, do func()) {
	w.order++
	heap.Push(&w.agenda, event{w.now + max(d, 0), w.order, do})
}

// run lets everything happen that happens before a moment.
func (w *world) run(until usage.Micros) {
	for len(w.agenda) > 0 && w.agenda[0].at <= until && len(w.broken) == 0 {
		e := heap.Pop(&w.agenda).(event)
		w.now = e.at
		e.do()
	}
	w.now = max(w.now, until)
}

// proc is a process: what it has scheduled does not outlive it, and waits while
// it is stopped.
type proc struct {
	w       *world
	name    string
	life    int
	up      bool
	stopped bool
	cut     bool // from NATS
	frozen  []func()
	start   func()
	killed  func()
}

// after schedules what the process does.
func (p *proc) after(d usage.Micros, do func()) {
	life := p.life
	p.w.after(d, func() { p.act(life, do) })
}

func (p *proc) act(life int, do func()) {
	switch {
	case !p.up || p.life != life:
	case p.stopped:
		p.frozen = append(p.frozen, func() { p.act(life, do) })
	default:
		do()
	}
}

func (p *proc) kill() {
	if !p.up {
		return
	}
	p.w.trace("%s is killed", p.name)
	p.w.report.Kills++
	p.up, p.stopped, p.frozen = false, false, nil
	p.life++
	if p.killed != nil {
		p.killed()
	}
}

// exit is a process's own end.
func (p *proc) exit() {
	p.w.trace("%s has ended", p.name)
	p.up, p.stopped, p.frozen = false, false, nil
	p.life++
	if p.killed != nil {
		p.killed()
	}
}

func (p *proc) rise() {
	if p.up {
		return
	}
	p.w.trace("%s starts", p.name)
	p.up = true
	p.start()
}

func (p *proc) stop() {
	if p.up && !p.stopped {
		p.w.trace("%s is stopped", p.name)
		p.w.report.Stops++
		p.stopped = true
	}
}

func (p *proc) wake() {
	if !p.stopped {
		return
	}
	p.w.trace("%s goes on", p.name)
	p.stopped = false
	frozen := p.frozen
	p.frozen = nil
	for _, do := range frozen {
		// In the order in which they came; one may kill or stop it again.
		do()
	}
}

const callTimeout = usage.Micros(1_000_000)

// ask carries out do at the NATS server and then done here, exactly once: with
// ok false when no answer has come in time, whether it was carried out or not.
func (p *proc) ask(do func() any, done func(result any, ok bool)) {
	w := p.w
	answered := false
	finish := func(result any, ok bool) {
		if !answered {
			answered = true
			done(result, ok)
		}
	}
	p.after(callTimeout, func() { finish(nil, false) })
	if p.cut || w.lost() {
		return
	}
	life := p.life
	deliver := func() {
		if !w.nats.proc.up || w.nats.proc.stopped {
			return
		}
		result := do()
		if p.cut || w.lost() {
			return
		}
		w.after(w.delay(), func() { p.act(life, func() { finish(result, true) }) })
	}
	// Late, but not twice: a connection doubles nothing, who tries again does.
	w.after(w.delay(), deliver)
}

func (w *world) lost() bool { return !w.calm && w.chance(w.o.Loss) }

// delay of a message on its way.
func (w *world) delay() usage.Micros {
	if !w.calm && w.chance(0.02) {
		return w.between(20_000, 600_000)
	}
	return w.between(50, 3_000)
}

// tell sends a message that nobody acknowledges.
func (w *world) tell(from, to *proc, receive func()) {
	copies := 1
	if w.lost() {
		copies--
	}
	if w.lost() {
		copies++
	}
	if from.cut || to.cut || !w.nats.proc.up {
		return
	}
	life := to.life
	for range copies {
		w.after(w.delay(), func() {
			if !to.cut {
				to.act(life, receive)
			}
		})
	}
}
