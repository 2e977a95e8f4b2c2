// Package deliver carries the transitions of episodes from the ALERTS stream to
// their receivers, Alertmanagers and webhooks, until they have taken them.
package deliver

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
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

// Options say how receivers are told.
type Options struct {
	// Timeout of one attempt. Pauses between attempts grow from RetryMin to
	// RetryMax.
	Timeout, RetryMin, RetryMax time.Duration
	// RepeatEvery is how often active alerts are repeated to Alertmanagers,
	// where they end by themselves EndsAfter later.
	RepeatEvery, EndsAfter time.Duration
	// Generator is Alertmanager's generatorURL; may be empty.
	Generator string
	Logger    zerolog.Logger
	Metrics   *Metrics
}

// receiver is somebody who is told of transitions, one at a time.
type receiver interface {
	// name is stable as long as deliveries begun before concern it.
	name() string
	// deliver returns nil only when the receiver has answered 2xx. A refusal
	// is a *refusal. The context's deadline bounds it.
	deliver(ctx context.Context, a *usage.Alert) error
	// refreshEvery is how often refresh is to be called between deliveries; 0
	// is never. refresh repeats what has to be repeated.
	refreshEvery() time.Duration
	refresh(ctx context.Context) error
}

// maxReceivers bounds connections, consumers and metrics' labels.
const maxReceivers = 32

// New returns a delivery for each Alertmanager, by base URL, and webhook.
func New(alertmanagers []string, webhooks []Webhook, o Options) ([]*Delivery, error) {
	if n := len(alertmanagers) + len(webhooks); n > maxReceivers {
		return nil, fmt.Errorf("%d receivers: at most %d are possible", n, maxReceivers)
	}
	var all []*Delivery
	seen := map[string]bool{}
	add := func(to receiver, client *http.Client, host, fingerprint string) error {
		if seen[to.name()] {
			return fmt.Errorf("receiver %s is configured twice", to.name())
		}
		seen[to.name()] = true
		sum := sha256.Sum256([]byte(fingerprint))
		all = append(all, &Delivery{
			to: to, client: client, log: o.Logger.With().Str("receiver", to.name()).Str("host", host).Logger(), metrics: o.Metrics,
			timeout: o.Timeout, retryMin: o.RetryMin, retryMax: o.RetryMax, grace: 2 * time.Second, now: time.Now,
			fingerprint: hex.EncodeToString(sum[:8]),
		})
		o.Metrics.undelivered.WithLabelValues(to.name()).Set(0)
		o.Metrics.disabled.WithLabelValues(to.name()).Set(0)
		return nil
	}
	for _, base := range alertmanagers {
		client := newClient(o.Timeout)
		am, err := newAlertmanager(base, client, time.Now)
		if err != nil {
			return nil, err
		}
		am.every, am.endsAfter, am.generator = o.RepeatEvery, o.EndsAfter, o.Generator
		if err := add(am, client, am.to.Host, base); err != nil {
			return nil, err
		}
	}
	for _, w := range webhooks {
		client := newClient(o.Timeout)
		wh, err := newWebhook(w, client, time.Now)
		if err != nil {
			return nil, err
		}
		if err := add(wh, client, wh.to.Host, w.URL); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// DropOthers deletes the consumers of receivers that are not configured any
// more: one that comes back after months must not be told of all of them.
func DropOthers(ctx context.Context, js jetstream.JetStream, deliveries []*Delivery, log zerolog.Logger) error {
	stream, err := js.Stream(ctx, ledger.AlertsStream)
	if err != nil {
		return fmt.Errorf("stream %s: %w", ledger.AlertsStream, err)
	}
	configured := map[string]bool{}
	for _, d := range deliveries {
		configured[consumerPrefix+d.to.name()] = true
	}
	list := stream.ListConsumers(ctx)
	for info := range list.Info() {
		if !strings.HasPrefix(info.Name, consumerPrefix) || configured[info.Name] {
			continue
		}
		log.Warn().Str("receiver", strings.TrimPrefix(info.Name, consumerPrefix)).Uint64("undelivered", info.NumPending+uint64(info.NumAckPending)).
			Msg("the receiver is not configured any more: what was not delivered to it never will be")
		if err := stream.DeleteConsumer(ctx, info.Name); err != nil && !errors.Is(err, jetstream.ErrConsumerNotFound) {
			return fmt.Errorf("delete the consumer of a receiver that is not configured any more: %w", err)
		}
	}
	if err := list.Err(); err != nil {
		return fmt.Errorf("list the consumers of %s: %w", ledger.AlertsStream, err)
	}
	return nil
}

// Delivery carries one receiver's transitions from the ALERTS stream to it.
//
// One message is in flight at a time, and the next comes only after it is
// acknowledged, so that a receiver never hears of a resolve before the firing
// it belongs to, through retries, restarts and several alerters. It is
// acknowledged only after a 2xx. Dying between the 2xx and the acknowledgement
// repeats the delivery under the same id: that is what the id is for.
type Delivery struct {
	js       jetstream.JetStream
	kv       jetstream.KeyValue
	to       receiver
	client   *http.Client // the receiver's own
	log      zerolog.Logger
	metrics  *Metrics
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

// Newest reads the newest transition of every rule and scope that has one.
type Newest func(context.Context) ([]usage.Alert, error)

// Name identifies the receiver; it is a label of metrics.
func (d *Delivery) Name() string { return d.to.name() }

// Prepare makes the receiver's durable consumer, which begins with what is
// appended after it was first made. It is called before Run, and may be called
// again.
func (d *Delivery) Prepare(ctx context.Context, js jetstream.JetStream, kv jetstream.KeyValue, newest Newest) error {
	d.js, d.kv = js, kv
	if am, ok := d.to.(*alertmanager); ok {
		am.newest = newest
	}
	_, err := d.consumer(ctx)
	return err
}

func (d *Delivery) consumer(ctx context.Context) (jetstream.Consumer, error) {
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

// Run delivers until ctx is done. It goes on through the absence of NATS and of
// the receiver.
func (d *Delivery) Run(ctx context.Context) {
	defer d.client.CloseIdleConnections()
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

func (d *Delivery) session(ctx context.Context, progress func()) error {
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
func (d *Delivery) one(ctx context.Context, m jetstream.Msg) (gone bool, err error) {
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
		// A refresh may have kept it waiting: its time begins now, or another
		// alerter gets it while this one still tries, and the episode's next
		// transition could overtake it.
		if err := m.InProgress(); err != nil {
			return false, fmt.Errorf("begin a delivery to %s: %w", d.to.name(), err)
		}
		attempt, cancel := d.attempt(ctx)
		began := d.now()
		err := d.to.deliver(attempt, &a)
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
func (d *Delivery) attempt(ctx context.Context) (context.Context, context.CancelFunc) {
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

func (d *Delivery) ack(ctx context.Context, m jetstream.Msg) error {
	within := 2 * time.Second
	if ctx.Err() != nil {
		within = time.Second // stopping, and the delivery has had its grace
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), within)
	defer cancel()
	if err := m.DoubleAck(ctx); err != nil {
		// It comes again, and is then only acknowledged (d.delivered).
		return fmt.Errorf("acknowledge a delivery to %s: %w", d.to.name(), err)
	}
	return nil
}

func (d *Delivery) refused(ctx context.Context, m jetstream.Msg, tries int, a *usage.Alert, err error) (gone bool, _ error) {
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

func (d *Delivery) nak(m jetstream.Msg, pause time.Duration) error {
	if err := m.NakWithDelay(pause); err != nil {
		return fmt.Errorf("postpone a delivery to %s: %w", d.to.name(), err)
	}
	return nil
}

func (d *Delivery) refresh(ctx context.Context) {
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
func (d *Delivery) disable(ctx context.Context) error {
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
func (d *Delivery) untilEnabled(ctx context.Context) error {
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

// backoff is the pause after a number of failed tries: it doubles from first to
// last, and is shortened by up to half, so that alerters don't come in step.
func backoff(try int, first, last time.Duration) time.Duration {
	d := last
	if try < 30 && first<<try > 0 {
		d = min(first<<try, last)
	}
	return d - time.Duration(rand.Int64N(int64(d)/2+1))
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
