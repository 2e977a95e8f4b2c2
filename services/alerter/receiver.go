package alerter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// consumerPrefix begins the name of every receiver's durable consumer.
const consumerPrefix = "alerter_"

// receiver is somebody who is told of transitions, one at a time.
type receiver interface {
	// name is stable as long as deliveries begun before concern it.
	name() string
	// deliver returns nil only when the receiver has answered 2xx. A refusal
	// is a *refusal. The context's deadline bounds it.
	deliver(ctx context.Context, id string, a *usage.Alert) error
	// refreshEvery is how often refresh is to be called between deliveries; 0
	// is never. refresh repeats what has to be repeated.
	refreshEvery() time.Duration
	refresh(ctx context.Context) error
}

// refusal is an answer other than 2xx, or none.
type refusal struct {
	// outcome is a metric's label: one of a few words.
	outcome string
	// gone says that the receiver wants nothing more.
	gone bool
	// retryAfter is what the receiver asked for; 0 when it did not.
	retryAfter time.Duration
	err        error
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

const (
	maxAnswerBytes = 64 << 10
	maxBodyBytes   = 256 << 10
	// maxRetryAfter bounds what a receiver may ask for.
	maxRetryAfter = time.Hour
)

// post sends a body and returns nil on 2xx, else a *refusal without secrets:
// an address may hold some in its path or query, so only its host is named.
func post(ctx context.Context, client *http.Client, to *url.URL, header http.Header, body []byte, now func() time.Time) error {
	if len(body) > maxBodyBytes {
		return &refusal{outcome: "too_large", err: fmt.Errorf("the alert has %d bytes, at most %d are sent", len(body), maxBodyBytes)}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, to.String(), strings.NewReader(string(body)))
	if err != nil {
		return &refusal{outcome: "invalid", err: fmt.Errorf("post to %s: the request can't be made", to.Host)}
	}
	req.Header = header
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "tollkeeper-alerter")
	res, err := client.Do(req)
	if err != nil {
		var quoted *url.Error
		if errors.As(err, &quoted) {
			err = quoted.Err // without the address
		}
		r := &refusal{outcome: "unreachable", err: fmt.Errorf("post to %s: %w", to.Host, err)}
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			r.outcome = "timeout"
		}
		return r
	}
	defer func() { _ = res.Body.Close() }() // nothing is lost with it
	// Read so that the connection can be used again, up to a bound.
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, maxAnswerBytes))
	if res.StatusCode >= 200 && res.StatusCode <= 299 {
		return nil
	}
	r := &refusal{outcome: "status_" + strconv.Itoa(min(max(res.StatusCode/100, 1), 5)) + "xx", retryAfter: retryAfter(res.Header.Get("Retry-After"), now()), err: fmt.Errorf("%s answered %d", to.Host, res.StatusCode)}
	if res.StatusCode == http.StatusGone {
		r.outcome, r.gone = "gone", true
	}
	return r
}

// retryAfter reads seconds or a date; 0 when there is neither.
func retryAfter(value string, now time.Time) time.Duration {
	if value == "" {
		return 0
	}
	if s, err := strconv.ParseInt(value, 10, 64); err == nil {
		return time.Duration(min(max(s, 0), int64(maxRetryAfter/time.Second))) * time.Second
	}
	if at, err := http.ParseTime(value); err == nil {
		return min(max(at.Sub(now), 0), maxRetryAfter)
	}
	return 0
}

// newClient returns a client that follows no redirect: a signed alert goes
// where it was configured to go.
func newClient(timeout time.Duration) *http.Client {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.MaxIdleConnsPerHost, t.MaxConnsPerHost = 2, 4
	t.ResponseHeaderTimeout = timeout
	return &http.Client{Transport: t, Timeout: timeout, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// delivery carries one receiver's transitions from the ALERTS stream to it.
//
// One message is in flight at a time, and the next comes only after it is
// acknowledged, so that a receiver never hears of a resolve before the firing
// it belongs to, through retries, restarts and several alerters. It is
// acknowledged only after a 2xx. Dying between the 2xx and the acknowledgement
// repeats the delivery under the same id: that is what the id is for.
type delivery struct {
	js       jetstream.JetStream
	kv       jetstream.KeyValue
	to       receiver
	log      zerolog.Logger
	metrics  *metrics
	timeout  time.Duration
	retryMin time.Duration
	retryMax time.Duration
	grace    time.Duration
	now      func() time.Time
	// fingerprint of the configuration that a 410 answers to.
	fingerprint string

	delivered uint64 // sequence of what was delivered and perhaps not acknowledged
	refreshed time.Time
}

// consumer returns the receiver's durable consumer, which begins with what is
// appended after it was first made.
func (d *delivery) consumer(ctx context.Context) (jetstream.Consumer, error) {
	c, err := d.js.CreateOrUpdateConsumer(ctx, ledger.AlertsStream, jetstream.ConsumerConfig{
		Durable: consumerPrefix + d.to.name(), Description: "Tollkeeper: transitions on their way to a receiver.",
		DeliverPolicy: jetstream.DeliverNewPolicy, AckPolicy: jetstream.AckExplicitPolicy,
		// Longer than a delivery may take; what a dead alerter had in hand
		// comes again after it.
		AckWait: d.timeout + 2*time.Second, MaxAckPending: 1, MaxDeliver: -1, MaxWaiting: 16,
	})
	if err != nil {
		return nil, fmt.Errorf("consumer of receiver %s: %w", d.to.name(), err)
	}
	return c, nil
}

// run delivers until ctx is done.
func (d *delivery) run(ctx context.Context) {
	for try := 0; ctx.Err() == nil; try++ {
		err := d.session(ctx, func() { try = 0 })
		if ctx.Err() != nil {
			return
		}
		d.log.Warn().Err(err).Msg("transitions can't be read: trying again")
		if sleep(ctx, backoff(try, 50*time.Millisecond, 2*time.Second)) != nil {
			return
		}
	}
}

func (d *delivery) session(ctx context.Context, progress func()) error {
	if err := d.untilEnabled(ctx); err != nil {
		return err
	}
	setup, cancel := context.WithTimeout(ctx, 5*time.Second)
	c, err := d.consumer(setup)
	cancel()
	if err != nil {
		return err
	}
	it, err := c.Messages(jetstream.PullMaxMessages(1), jetstream.PullExpiry(5*time.Second), jetstream.PullHeartbeat(time.Second))
	if err != nil {
		return fmt.Errorf("consumer of receiver %s: %w", d.to.name(), err)
	}
	defer it.Stop()
	defer context.AfterFunc(ctx, it.Stop)()
	for {
		d.refresh(ctx)
		wait := 5 * time.Second
		if every := d.to.refreshEvery(); every > 0 {
			wait = max(min(wait, every-d.now().Sub(d.refreshed)), time.Millisecond)
		}
		m, err := it.Next(jetstream.NextMaxWait(wait))
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, context.DeadlineExceeded), errors.Is(err, nats.ErrTimeout):
			continue
		case err != nil:
			return fmt.Errorf("consumer of receiver %s: %w", d.to.name(), err)
		}
		progress()
		gone, err := d.one(ctx, m)
		if err != nil {
			return err
		}
		if gone {
			return d.untilEnabled(ctx)
		}
	}
}

// one delivers one message; gone says that the receiver wants nothing more.
func (d *delivery) one(ctx context.Context, m jetstream.Msg) (gone bool, err error) {
	meta, err := m.Metadata()
	if err != nil {
		return false, fmt.Errorf("consumer of receiver %s: %w", d.to.name(), err)
	}
	d.metrics.undelivered.WithLabelValues(d.to.name()).Set(float64(meta.NumPending + 1))
	seq := meta.Sequence.Stream
	if seq != d.delivered {
		var a usage.Alert
		if err := json.Unmarshal(m.Data(), &a); err != nil || a.EpisodeID == "" {
			// Only a foreign hand can have written it, and it will not get better.
			d.log.Error().Err(err).Uint64("sequence", seq).Msg("an entry of the alerts stream is not an alert: left out")
			d.metrics.deliveries.WithLabelValues(d.to.name(), "undecodable").Inc()
			return false, d.ack(ctx, m)
		}
		attempt, cancel := d.attempt(ctx)
		began := d.now()
		err := d.to.deliver(attempt, transitionID(&a), &a)
		cancel()
		d.metrics.took.WithLabelValues(d.to.name()).Observe(d.now().Sub(began).Seconds())
		if err != nil {
			return d.refused(ctx, m, int(min(meta.NumDelivered, 1000)), &a, err)
		}
		d.delivered = seq
		d.metrics.deliveries.WithLabelValues(d.to.name(), "delivered").Inc()
		d.metrics.latency.WithLabelValues(d.to.name()).Observe(d.now().Sub(a.At.Time()).Seconds())
		d.log.Info().Str("episode", a.EpisodeID).Str("transition", string(a.Transition)).Uint64("attempt", meta.NumDelivered).Msg("delivered")
	}
	if err := d.ack(ctx, m); err != nil {
		return false, err
	}
	d.metrics.undelivered.WithLabelValues(d.to.name()).Set(float64(meta.NumPending))
	return false, nil
}

// attempt returns the context of a delivery: an orderly stop lets one that is
// on its way finish, so that its answer is not lost.
func (d *delivery) attempt(ctx context.Context) (context.Context, context.CancelFunc) {
	attempt, cancel := context.WithTimeout(context.WithoutCancel(ctx), d.timeout)
	stop := context.AfterFunc(ctx, func() {
		t := time.NewTimer(d.grace)
		defer t.Stop()
		select {
		case <-t.C:
			cancel()
		case <-attempt.Done():
		}
	})
	return attempt, func() { stop(); cancel() }
}

func (d *delivery) ack(ctx context.Context, m jetstream.Msg) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := m.DoubleAck(ctx); err != nil {
		// It comes again, and is then only acknowledged (d.delivered).
		return fmt.Errorf("acknowledge a delivery to %s: %w", d.to.name(), err)
	}
	return nil
}

func (d *delivery) refused(ctx context.Context, m jetstream.Msg, tries int, a *usage.Alert, err error) (gone bool, _ error) {
	var r *refusal
	if !errors.As(err, &r) {
		r = &refusal{outcome: "failed", err: err}
	}
	d.metrics.deliveries.WithLabelValues(d.to.name(), r.outcome).Inc()
	if r.gone {
		if err := d.disable(ctx); err != nil {
			return false, err
		}
		// It stays unacknowledged, for the receiver that takes this one's place.
		return true, d.nak(m, d.retryMin)
	}
	pause := backoff(tries-1, d.retryMin, d.retryMax)
	if r.retryAfter > pause {
		pause = r.retryAfter
	}
	if ctx.Err() != nil {
		// Stopping: whoever comes next need not wait.
		pause = d.retryMin
	}
	d.log.Warn().Err(err).Str("episode", a.EpisodeID).Str("transition", string(a.Transition)).Int("attempt", tries).Dur("again_in_ms", pause).Msg("not delivered: trying again")
	return false, d.nak(m, pause)
}

func (d *delivery) nak(m jetstream.Msg, pause time.Duration) error {
	if err := m.NakWithDelay(pause); err != nil {
		return fmt.Errorf("postpone a delivery to %s: %w", d.to.name(), err)
	}
	return nil
}

func (d *delivery) refresh(ctx context.Context) {
	every := d.to.refreshEvery()
	if every <= 0 || d.now().Sub(d.refreshed) < every {
		return
	}
	d.refreshed = d.now()
	attempt, cancel := d.attempt(ctx)
	defer cancel()
	if err := d.to.refresh(attempt); err != nil && ctx.Err() == nil {
		d.metrics.refreshes.WithLabelValues(d.to.name(), "failed").Inc()
		d.log.Warn().Err(err).Msg("the active alerts can't be repeated: trying again")
		return
	}
	d.metrics.refreshes.WithLabelValues(d.to.name(), "delivered").Inc()
}

// disabled is the value of a receiver's key in the bucket.
type disabled struct {
	Fingerprint string       `json:"fingerprint"`
	At          usage.Micros `json:"disabled_at_unix_micros"`
}

func receiverKey(name string) string { return "receiver." + name }

// disable remembers that the receiver answered 410.
func (d *delivery) disable(ctx context.Context) error {
	value, err := json.Marshal(disabled{d.fingerprint, usage.At(d.now())})
	if err == nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		_, err = d.kv.Put(ctx, receiverKey(d.to.name()), value)
	}
	if err != nil {
		return fmt.Errorf("remember that receiver %s answered 410: %w", d.to.name(), err)
	}
	d.log.Error().Msgf("the receiver answered 410 Gone and is disabled: NOBODY is told there of alerts until another address is configured or key %s of bucket %s is deleted", receiverKey(d.to.name()), ledger.AlerterBucket)
	return nil
}

// untilEnabled waits as long as the receiver is disabled.
func (d *delivery) untilEnabled(ctx context.Context) error {
	gauge := d.metrics.disabled.WithLabelValues(d.to.name())
	for said := false; ; said = true {
		ask, cancel := context.WithTimeout(ctx, 5*time.Second)
		e, err := d.kv.Get(ask, receiverKey(d.to.name()))
		cancel()
		var v disabled
		switch {
		case errors.Is(err, jetstream.ErrKeyNotFound):
			gauge.Set(0)
			return nil
		case err != nil:
			return fmt.Errorf("read whether receiver %s is disabled: %w", d.to.name(), err)
		case json.Unmarshal(e.Value(), &v) != nil || v.Fingerprint != d.fingerprint:
			// Configured anew since.
			if err := d.kv.Delete(ctx, receiverKey(d.to.name())); err != nil {
				return fmt.Errorf("enable receiver %s again: %w", d.to.name(), err)
			}
			continue
		}
		gauge.Set(1)
		if !said {
			d.log.Error().Time("since", v.At.Time()).Msgf("the receiver is disabled because it answered 410 Gone: configure another address, or delete key %s of bucket %s", receiverKey(d.to.name()), ledger.AlerterBucket)
		}
		if err := sleep(ctx, 10*d.retryMin); err != nil {
			return err
		}
	}
}
