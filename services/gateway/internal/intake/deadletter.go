// Package intake takes events of gateways that are not ours: CloudEvents over
// HTTP in, calls for the outbox and dead letters out.
package intake

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

// Bounds of what waits for the dead-letter stream.
const (
	MaxLetters     = 4096
	MaxLetterBytes = 16 << 20
	// MaxPayload bounds what is kept of one bad event; the rest is cut off and
	// TruncatedHeader tells the whole size.
	MaxPayload = 128 << 10
)

// TruncatedHeader holds the size of an event of which only the beginning was kept.
const TruncatedHeader = "Tollkeeper-Truncated-From"

// Letter is a bad event with its reason.
type Letter struct {
	Reason string // a machine code of a bounded set
	Detail string // for people
	Event  []byte
}

// DeadLetters brings bad events to the dead-letter stream, in order, as long as it
// takes. What is in its queue when the process is killed is lost; what was
// answered with "kept" is not in the queue any more.
type DeadLetters struct {
	origin  string
	logger  zerolog.Logger
	letters *prometheus.CounterVec
	kick    chan struct{}

	mu    sync.Mutex
	js    jetstream.JetStream
	queue []*queued
	bytes int
}

type queued struct {
	msg  *nats.Msg
	done chan struct{} // closed when the stream has it
}

// NewDeadLetters returns one that keeps letters until Attach and Run; origin is
// the gateway's name. The registerer may be nil.
func NewDeadLetters(origin string, logger zerolog.Logger, r prometheus.Registerer) (*DeadLetters, error) {
	d := &DeadLetters{
		origin: origin, logger: logger, kick: make(chan struct{}, 1),
		letters: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tollkeeper_gateway_dead_letters_total", Help: "Events that could not be counted, by reason.",
		}, []string{"reason"}),
	}
	if r != nil {
		if err := r.Register(d.letters); err != nil {
			return nil, err
		}
		waiting := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "tollkeeper_gateway_dead_letters_waiting", Help: "Events that wait for the dead-letter stream.",
		}, func() float64 {
			d.mu.Lock()
			defer d.mu.Unlock()
			return float64(len(d.queue))
		})
		if err := r.Register(waiting); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// Attach tells where the stream is.
func (d *DeadLetters) Attach(js jetstream.JetStream) {
	d.mu.Lock()
	d.js = js
	d.mu.Unlock()
	d.wake()
}

func (d *DeadLetters) wake() {
	select {
	case d.kick <- struct{}{}:
	default:
	}
}

// ErrFull says that too many letters wait.
var ErrFull = errors.New("too many events wait for the dead-letter stream")

// Add queues letters, all or none. The returned function waits until the stream
// has them or ctx is done, and reports which.
func (d *DeadLetters) Add(letters []Letter) (kept func(context.Context) bool, err error) {
	batch := make([]*queued, len(letters))
	size := 0
	for i, l := range letters {
		m := &nats.Msg{Subject: ledger.DeadLetterIntake(ksuid.New().String()), Header: nats.Header{}, Data: l.Event}
		m.Header.Set(ledger.ReasonHeader, l.Reason)
		m.Header.Set(ledger.DetailHeader, headerValue(l.Detail))
		m.Header.Set(ledger.OriginHeader, headerValue(d.origin))
		if len(m.Data) > MaxPayload {
			m.Header.Set(TruncatedHeader, itoa(len(m.Data)))
			m.Data = m.Data[:MaxPayload]
		}
		m.Data = append([]byte(nil), m.Data...)
		size += len(m.Data) + 512
		batch[i] = &queued{m, make(chan struct{})}
	}
	d.mu.Lock()
	if len(d.queue)+len(batch) > MaxLetters || d.bytes+size > MaxLetterBytes {
		d.mu.Unlock()
		return nil, ErrFull
	}
	d.queue = append(d.queue, batch...)
	d.bytes += size
	d.mu.Unlock()
	for _, l := range letters {
		d.letters.WithLabelValues(l.Reason).Inc()
	}
	d.wake()
	return func(ctx context.Context) bool {
		for _, q := range batch {
			select {
			case <-q.done:
			case <-ctx.Done():
				return false
			}
		}
		return true
	}, nil
}

// lettersAtOnce bounds the letters in flight.
const lettersAtOnce = 128

// Run sends until ctx is done, then tries once more what still waits, within the
// grace, and returns nil.
func (d *DeadLetters) Run(ctx context.Context, grace time.Duration) error {
	pause := 50 * time.Millisecond
	var retry <-chan time.Time
	said := false
	for {
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
			defer cancel()
			for d.some(last) == nil && d.waiting() > 0 {
			}
			if n := d.waiting(); n > 0 {
				d.logger.Error().Int("events", n).Msg("bad events could not be kept: the dead-letter stream can't be reached")
			}
			return nil
		case <-d.kick:
		case <-retry:
		}
		retry = nil
		for d.waiting() > 0 {
			try, cancel := context.WithTimeout(ctx, 5*time.Second)
			err := d.some(try)
			cancel()
			if err == nil {
				pause, said = 50*time.Millisecond, false
				continue
			}
			if !said && ctx.Err() == nil {
				said = true
				d.logger.Warn().Err(err).Msg("bad events can't be brought to the dead-letter stream: they wait")
			}
			retry = time.After(pause)
			pause = min(2*pause, 2*time.Second)
			break
		}
	}
}

func (d *DeadLetters) waiting() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.queue)
}

var errNotAttached = errors.New("NATS was not reached yet")

// some sends the first letters and takes those off the queue that are stored. A
// letter has a subject of its own, so sending it twice stores it once.
func (d *DeadLetters) some(ctx context.Context) error {
	d.mu.Lock()
	js := d.js
	batch := append([]*queued(nil), d.queue[:min(len(d.queue), lettersAtOnce)]...)
	d.mu.Unlock()
	if js == nil {
		return errNotAttached
	}
	futures := make([]jetstream.PubAckFuture, 0, len(batch))
	var failed error
	for _, q := range batch {
		f, err := js.PublishMsgAsync(q.msg)
		if err != nil {
			failed = err
			break
		}
		futures = append(futures, f)
	}
	stored := 0
	for i, f := range futures {
		select {
		case <-f.Ok():
			if stored == i {
				stored++
			}
		case err := <-f.Err():
			failed = errors.Join(failed, err)
		case <-ctx.Done():
			failed = errors.Join(failed, ctx.Err())
		}
		if failed != nil {
			break
		}
	}
	d.mu.Lock()
	for _, q := range d.queue[:stored] {
		d.bytes -= len(q.msg.Data) + 512
		close(q.done)
	}
	d.queue = append([]*queued(nil), d.queue[stored:]...)
	d.mu.Unlock()
	return failed
}
