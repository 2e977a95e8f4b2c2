// Package alerter wakes somebody when many accounts begin to be refused: it
// folds the ledger's calls into rules (pkg/alert), makes every transition of an
// episode durable exactly once, and delivers it to Alertmanagers and webhooks
// until they have taken it.
package alerter

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/alert"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/services/alerter/internal/deliver"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/seen"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// Links are put into alerts for the person who is woken; each may be empty.
type Links struct {
	Runbook, Dashboard string
	// Generator is Alertmanager's generatorURL: the page that shows the source.
	Generator string
}

// Webhook is a receiver by the Standard Webhooks convention.
type Webhook = deliver.Webhook

// Secret signs what a webhook gets; it never prints.
type Secret = deliver.Secret

// ParseSecret reads "whsec_" and base64 of 24 to 64 bytes; several, separated
// by white space, sign side by side. Its errors do not repeat it.
func ParseSecret(text string) (Secret, error) { return deliver.ParseSecret(text) }

// Options configures the alerter. Several alerters with the same options may
// run beside each other: transitions stay single, deliveries are shared.
type Options struct {
	NATS natsconn.Options
	// Rules that are evaluated; alert.DefaultRule when empty. Names are unique.
	Rules []alert.Rule
	// Alertmanagers by base URL, such as http://127.0.0.1:9093; every member of
	// a cluster is named.
	Alertmanagers []string
	Webhooks      []Webhook
	Links         Links

	// RepeatEvery is how often active alerts are repeated to Alertmanagers; 30 s
	// when 0, at most a minute. They end there by themselves EndsAfter later;
	// 5 min when 0.
	RepeatEvery, EndsAfter time.Duration
	// Timeout of one delivery; 10 s when 0. Pauses between attempts grow from
	// RetryMin (1 s when 0) to RetryMax (1 min when 0); attempts never end.
	Timeout, RetryMin, RetryMax time.Duration
	// SaveEvery is how often the position is saved; 5 s when 0. It decides how
	// much is read again after a restart, never what is alerted.
	SaveEvery time.Duration

	Logger zerolog.Logger
	// Registerer of the metrics; a new registry when nil.
	Registerer *prometheus.Registry
	// Readiness that is told; a new one when nil.
	Readiness *telemetry.Readiness
	// AdminListen is "host:port" of /metrics, /healthz and /readyz; "" serves
	// nothing. AdminToken, if set, is asked for, and needed beyond loopback.
	AdminListen, AdminToken string
	// Ready, if set, is called when receivers are known to NATS and reading begins.
	Ready func()
}

func (o *Options) setDefaults() {
	if len(o.Rules) == 0 {
		o.Rules = []alert.Rule{alert.DefaultRule()}
	}
	for _, d := range []struct {
		d     *time.Duration
		value time.Duration
	}{
		{&o.RepeatEvery, 30 * time.Second}, {&o.EndsAfter, 5 * time.Minute}, {&o.Timeout, 10 * time.Second},
		{&o.RetryMin, time.Second}, {&o.RetryMax, time.Minute}, {&o.SaveEvery, 5 * time.Second},
	} {
		if *d.d == 0 {
			*d.d = d.value
		}
	}
	if o.Registerer == nil {
		o.Registerer = telemetry.NewRegistry()
	}
	if o.Readiness == nil {
		o.Readiness = telemetry.NewReadiness()
	}
}

func (o *Options) validate() error {
	var errs []error
	if o.RepeatEvery < 0 || o.RepeatEvery > time.Minute {
		errs = append(errs, fmt.Errorf("active alerts can't be repeated every %s: at most a minute apart", o.RepeatEvery))
	}
	if o.EndsAfter < 2*o.RepeatEvery {
		errs = append(errs, fmt.Errorf("alerts that end after %s and are repeated every %s would end by mistake: at least twice that", o.EndsAfter, o.RepeatEvery))
	}
	if o.Timeout < 0 || o.RetryMin < 0 || o.RetryMax < o.RetryMin || o.SaveEvery < 0 {
		errs = append(errs, errors.New("timeouts and pauses must not be negative, and the longest pause not shorter than the first"))
	}
	names := map[string]bool{}
	for i := range o.Rules {
		errs = append(errs, o.Rules[i].Validate())
		if names[o.Rules[i].Name] {
			errs = append(errs, fmt.Errorf("two alert rules are named %q", o.Rules[i].Name))
		}
		names[o.Rules[i].Name] = true
	}
	for what, link := range map[string]string{"runbook": o.Links.Runbook, "dashboard": o.Links.Dashboard, "generator": o.Links.Generator} {
		if len(link) > 1024 {
			errs = append(errs, fmt.Errorf("the %s link has %d characters, at most 1024 are possible", what, len(link)))
		}
	}
	return errors.Join(errs...)
}

// Run alerts until ctx is done and then returns nil. It waits for NATS, its
// streams and its bucket at the start, and goes on through their absence; it
// returns an error when options are wrong or can't be served.
func Run(ctx context.Context, o Options) error {
	own := o.Readiness == nil
	o.setDefaults()
	if err := o.validate(); err != nil {
		return fmt.Errorf("alerter: %w", err)
	}
	if own {
		if err := o.Registerer.Register(o.Readiness); err != nil {
			return fmt.Errorf("alerter: metrics: %w", err)
		}
	}
	m, err := newMetrics(o.Registerer)
	if err != nil {
		return fmt.Errorf("alerter: %w", err)
	}
	dm, err := deliver.NewMetrics(o.Registerer)
	if err != nil {
		return fmt.Errorf("alerter: %w", err)
	}
	deliveries, err := deliver.New(o.Alertmanagers, o.Webhooks, deliver.Options{
		Timeout: o.Timeout, RetryMin: o.RetryMin, RetryMax: o.RetryMax, RepeatEvery: o.RepeatEvery, EndsAfter: o.EndsAfter,
		Generator: o.Links.Generator, Logger: o.Logger, Metrics: dm,
	})
	if err != nil {
		return fmt.Errorf("alerter: %w", err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	defer wg.Wait()
	if o.AdminListen != "" {
		l, err := telemetry.Listen("admin-listen", o.AdminListen, o.AdminToken != "")
		if err != nil {
			return fmt.Errorf("alerter: %w", err)
		}
		wg.Go(func() {
			handler := telemetry.NewHandler(telemetry.HandlerOptions{Gatherer: o.Registerer, Readiness: o.Readiness})
			if err := telemetry.Serve(ctx, telemetry.ServeOptions{Listener: l, Handler: handler, Token: o.AdminToken}); err != nil {
				cancel(fmt.Errorf("alerter: %w", err))
			}
		})
	}
	err = serve(ctx, &o, m, deliveries)
	if cause := context.Cause(ctx); err == nil && cause != nil && !errors.Is(cause, context.Canceled) && !errors.Is(cause, context.DeadlineExceeded) {
		err = cause
	}
	cancel(nil)
	return err
}

func serve(ctx context.Context, o *Options, m *metrics, deliveries []*deliver.Delivery) error {
	ready := o.Readiness.Component("alerter")
	if o.NATS.Readiness == nil {
		o.NATS.Readiness = o.Readiness.Component("alerter_nats")
	}
	nc, err := natsconn.Connect(ctx, o.NATS)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("alerter: %w", err)
	}
	defer func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if err := natsconn.Close(end, nc); err != nil {
			o.Logger.Debug().Err(err).Msg("NATS connection")
		}
	}()
	js, err := jetstream.New(nc)
	if err != nil {
		return fmt.Errorf("alerter: %w", err)
	}

	e := newEvaluator(o, js, m, ready)
	var from uint64
	// Everything up to here may have to wait for somebody else: the streams are
	// made by whoever provisions the ledger.
	begin := func(ctx context.Context) error {
		kv, err := js.KeyValue(ctx, ledger.AlerterBucket)
		if err != nil {
			return fmt.Errorf("bucket %s: %w", ledger.AlerterBucket, err)
		}
		e.kv, e.journal = kv, &journal{kv: kv, log: alertsLog{js}}
		// Receivers before transitions: a consumer begins with what is appended
		// after it was made.
		for _, d := range deliveries {
			if err := d.Prepare(ctx, js, kv, e.newest); err != nil {
				return err
			}
		}
		if err := deliver.DropOthers(ctx, js, deliveries, o.Logger); err != nil {
			return err
		}
		from, err = e.prepare(ctx)
		return err
	}
	pauses := newPauses()
	for try := 0; ; try++ {
		attempt, cancel := context.WithTimeout(ctx, 10*time.Second)
		err := begin(attempt)
		cancel()
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return nil
		}
		reason := "what alerting needs in NATS is not there yet: " + err.Error()
		ready.NotReady(reason)
		if try == 0 {
			o.Logger.Warn().Msg(reason + ": waiting for it")
		}
		if sleep(ctx, pauses.NextBackOff()) != nil {
			return nil
		}
	}
	if len(deliveries) == 0 {
		o.Logger.Warn().Msg("no receiver is configured: alerts are only stored and shown")
	}
	if o.Ready != nil {
		o.Ready()
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	for _, d := range deliveries {
		wg.Go(func() { d.Run(ctx) })
	}
	wg.Go(func() { e.watchConservation(ctx) })
	err = e.run(ctx, from)
	cancel()
	if err == nil {
		// Beside the deliveries that are under way: NATS may not answer either.
		wg.Go(func() {
			if err := e.shutdown(context.WithoutCancel(ctx)); err != nil {
				// Only more to read again at the next start.
				o.Logger.Debug().Err(err).Msg("last position")
			}
		})
	}
	wg.Wait()
	if err != nil {
		return fmt.Errorf("alerter: %w", err)
	}
	return nil
}

func newEvaluator(o *Options, js jetstream.JetStream, m *metrics, ready readinessSink) *evaluator {
	e := &evaluator{
		js: js, log: o.Logger, ready: ready, metrics: m, links: o.Links, every: o.SaveEvery, now: time.Now,
		known: make([]episodeState, len(o.Rules)), seen: seen.New(0), rules: map[uint32]rules{}, stopped: map[uint32]*quota.NewerError{},
		step: o.Rules[0].Step, maxLag: o.Rules[0].MaxLag,
	}
	for _, r := range o.Rules {
		d, err := alert.NewRatio(r, alert.ScopeGlobal)
		if err != nil {
			panic(err) // validated before
		}
		e.detectors = append(e.detectors, d)
		e.step, e.maxLag, e.lookback = min(e.step, r.Step), min(e.maxLag, r.MaxLag), max(e.lookback, r.Lookback())
	}
	return e
}
