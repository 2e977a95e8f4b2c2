// Package demo gives a first start something to show: plans, accounts and
// seeded traffic through the gateway.
package demo

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/modelserver"
)

// Plans is the demo's plans file.
//
//go:embed plans.yaml
var Plans []byte

// Key returns the public demo key of an account.
func Key(account string) string { return "tk_demo_" + strings.ReplaceAll(account, "/", "_") }

// Accounts to show: Admitted is of a plan that nobody uses up, Refused calls more often
// than its plan allows.
const (
	Admitted = "contoso"
	Refused  = "litware"
)

// Keys returns the public keys of all accounts that call.
func Keys() []string {
	var keys []string
	for _, c := range clients() {
		keys = append(keys, Key(c.account))
	}
	return keys
}

// client of the demo: an account, how often it calls, and what.
type client struct {
	account string
	rate    float64 // calls a second
	models  []string
	output  int // mean output tokens
}

func clients() []client {
	return []client{
		{"northwind/search", 3.2, []string{"small", "embed"}, 60},
		{"northwind/support", 2.2, []string{"medium"}, 220},
		{"contoso", 6, []string{"small", "medium", "large"}, 180},
		{"fabrikam", 2.4, []string{"medium", "large"}, 260},
		{"tailspin", 1.6, []string{"medium", "large"}, 180},
		{"wingtip", 1.9, []string{"small"}, 80},
		{"litware", 1.4, []string{"small"}, 90},
		{"proseware", 0.8, []string{"small"}, 70},
		{"adatum", 2.6, []string{"small", "embed"}, 40},
	}
}

// Options configure the traffic.
type Options struct {
	// URL of the gateway.
	URL string
	// Seed of the traffic: the same seed gives the same calls.
	Seed   uint64
	Logger zerolog.Logger
}

// inFlight bounds the demo's calls under way.
const inFlight = 32

// Run sends traffic until ctx is done. About 22 calls a second; failures are
// the gateway's to show and are logged once a change.
func Run(ctx context.Context, o Options) error {
	transport := &http.Transport{MaxIdleConnsPerHost: inFlight}
	defer transport.CloseIdleConnections()
	hc := &http.Client{Transport: transport, Timeout: 10 * time.Second}
	slots := make(chan struct{}, inFlight)
	var wg sync.WaitGroup
	var failing sync.Map
	for i, c := range clients() {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(o.Seed, uint64(i)))
			for {
				// A Poisson process: exponential gaps.
				gap := time.Duration(rng.ExpFloat64() / c.rate * float64(time.Second))
				select {
				case <-ctx.Done():
					return
				case <-time.After(gap):
				}
				body, err := json.Marshal(c.request(rng))
				if err != nil {
					o.Logger.Error().Err(err).Msg("demo request")
					return
				}
				select {
				case slots <- struct{}{}:
				case <-ctx.Done():
					return
				}
				wg.Go(func() {
					defer func() { <-slots }()
					err := call(ctx, hc, o.URL, Key(c.account), body)
					if _, was := failing.Load(c.account); err != nil && ctx.Err() == nil && !was {
						failing.Store(c.account, true)
						o.Logger.Warn().Err(err).Str("account", c.account).Msg("demo call got no answer")
					} else if err == nil && was {
						failing.Delete(c.account)
					}
				})
			}
		})
	}
	wg.Wait()
	return nil
}

func (c *client) request(rng *rand.Rand) modelserver.Request {
	output := int(float64(c.output) * (0.3 + 1.4*rng.Float64()))
	input := 40 + int(rng.ExpFloat64()*600)
	m := map[string]string{"input_tokens": fmt.Sprint(input), "output_tokens": fmt.Sprint(output)}
	if rng.IntN(100) < 2 {
		m["status"] = "503" // upstreams fail now and then
	}
	return modelserver.Request{Model: c.models[rng.IntN(len(c.models))], Messages: []modelserver.Message{{Role: "user", Content: "Hello."}}, Metadata: m}
}

func call(ctx context.Context, hc *http.Client, url, key string, body []byte) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/v1/chat/completions", bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("make request: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+key)
	req.Header.Set("Content-Type", "application/json")
	resp, err := hc.Do(req)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<20))
	return errors.Join(err, resp.Body.Close())
}
