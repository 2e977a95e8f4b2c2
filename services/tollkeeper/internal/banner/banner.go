// Package banner writes for people how everything gets on at its start, a line a part,
// and at its end where everything is and what to try.
package banner

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/demo"
)

// readyWithin is how long Services waits for all of them: one that takes longer goes on
// trying, and its line says so.
const readyWithin = 30 * time.Second

// Banner writes to Out.
type Banner struct{ Out io.Writer }

// line writes one; its loss harms nothing.
func (b Banner) line(format string, args ...any) { _, _ = fmt.Fprintf(b.Out, format+"\n", args...) }

// Part says how a part is.
func (b Banner) Part(name, state, where string) {
	b.line("%s", strings.TrimRight(fmt.Sprintf("  %-12s %-6s %s", name, state, where), " "))
}

// Service is a part that says itself when it is ready: it has components of readiness
// by its name.
type Service struct {
	Name, Where string
	// None says why there is none; empty: there is one.
	None string
}

// Services writes the line of each once it is ready.
func (b Banner) Services(ctx context.Context, r *telemetry.Readiness, services []Service) {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for _, s := range services {
		if s.None != "" {
			b.Part(s.Name, "none", s.None)
			continue
		}
		ready, why := partReady(r.Status(), s.Name)
		for !ready && ctx.Err() == nil {
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
			ready, why = partReady(r.Status(), s.Name)
		}
		if ready {
			b.Part(s.Name, "ready", s.Where)
		} else {
			b.Part(s.Name, "waits", why)
		}
	}
}

// partReady reports whether a part is ready, and what keeps it.
func partReady(status telemetry.ReadinessStatus, part string) (ready bool, why string) {
	why = "starting"
	for _, c := range status.Components {
		if c.Name != part && !strings.HasPrefix(c.Name, part+"_") {
			continue
		}
		if !c.OK {
			return false, c.Reason
		}
		ready = true
	}
	return ready, why
}

// Web is the URL of an address; empty: there is none.
func Web(addr string) string {
	if addr == "" {
		return ""
	}
	return "http://" + addr
}

// dialable is an address that a client of this machine can use: a listener's may be of
// all interfaces.
func dialable(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}

// Summary is where everything is.
type Summary struct {
	API, Gateway, GatewayAdmin, NATS, ClickHouse, ClickHouseHTTP, DataDir string
	// Demo: the gateway has the demo's route and keys.
	Demo bool
}

// NoGateway says why there is no gateway.
const NoGateway = "--no-demo starts none without --gateway-config FILE"

// Up writes where everything is, and a call to try.
func (b Banner) Up(s Summary) {
	line := func(what, where string) {
		if where != "" {
			b.line("  %-16s %s", what, where)
		}
	}
	b.line("")
	b.line("Tollkeeper is up.")
	line("console and API", Web(s.API))
	line("gateway", Web(s.Gateway))
	line("gateway's API", Web(s.GatewayAdmin))
	line("NATS", s.NATS)
	line("ClickHouse", s.ClickHouse+" (native)")
	line("", Web(s.ClickHouseHTTP))
	line("data", s.DataDir)
	if s.Gateway == "" {
		b.line("There is no gateway: %s (deploy/gateway.example.yaml).", NoGateway)
	}
	try := ""
	switch {
	case s.Demo:
		try = demoCurl(dialable(s.Gateway))
	case s.GatewayAdmin != "":
		try = "curl -i http://" + dialable(s.GatewayAdmin) + "/readyz"
	case s.API != "":
		try = "curl -i http://" + dialable(s.API) + "/readyz"
	}
	if try != "" {
		b.line("Try it:")
		b.line("  %s", try)
	}
	if s.Demo {
		keys := demo.Keys()
		slices.Sort(keys)
		b.line("Demo keys: %s; in most minutes %s is refused with 402 after 60 calls.", strings.Join(keys, ", "), demo.Key(demo.Refused))
	}
	b.line("Ctrl-C stops everything in order.")
}

// demoCurl is a call of an account that the demo never refuses.
func demoCurl(gateway string) string {
	return fmt.Sprintf(`curl -i http://%s/v1/chat/completions -H 'Authorization: Bearer %s' -H 'Content-Type: application/json' -d '{"model":"small","messages":[{"role":"user","content":"Hello."}]}'`,
		gateway, demo.Key(demo.Admitted))
}
