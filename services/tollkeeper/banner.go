package tollkeeper

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

// readyWithin is how long the banner waits for all parts: one that takes longer goes on
// trying, and the banner says so.
const readyWithin = 30 * time.Second

// services are the parts that say themselves when they are ready, in the order of their
// start; each has components of readiness by its name.
var services = []string{"aggregator", "historian", "alerter", "auditor", "gateway", "console"}

// banner writes for people how the start gets on, a line a part, and at its end where
// everything is and what to try.
type banner struct{ out io.Writer }

// line writes one; its loss harms nothing.
func (b banner) line(format string, args ...any) { _, _ = fmt.Fprintf(b.out, format+"\n", args...) }

// part says that a part is up.
func (b banner) part(name, state, where string) {
	b.line("%s", strings.TrimRight(fmt.Sprintf("  %-12s %-6s %s", name, state, where), " "))
}

// started writes the line of an engine, which is up when it was started; services are
// awaited.
func (s *stack) started(name string) {
	switch name {
	case "nats":
		s.banner.part("NATS", "up", s.addr.NATS)
	case "clickhouse":
		s.banner.part("ClickHouse", "up", s.addr.ClickHouse)
	case "ledger":
		s.banner.part("ledger", "up", fmt.Sprintf("%d shards", s.shards))
	}
}

// awaitServices writes the line of each service once it is ready.
func (s *stack) awaitServices(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	where := map[string]string{"gateway": web(s.addr.Gateway), "console": web(s.addr.API)}
	for _, name := range services {
		switch {
		case name == "gateway" && s.o.Gateway == nil:
			s.banner.part(name, "none", "--no-demo starts none without --gateway-config FILE")
			continue
		case name == "console" && s.o.APIListen == "":
			s.banner.part(name, "none", "--api-listen is empty")
			continue
		}
		for {
			ready, why := partReady(s.readiness.Status(), name)
			if ready {
				s.banner.part(name, "ready", where[name])
				break
			}
			select {
			case <-tick.C:
				continue
			case <-ctx.Done():
				s.banner.part(name, "waits", why)
			}
			break
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

func web(addr string) string {
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

// summary writes where everything is, and a call to try.
func (s *stack) summary() {
	line := func(what, where string) {
		if where != "" {
			s.banner.line("  %-16s %s", what, where)
		}
	}
	s.banner.line("")
	s.banner.line("Tollkeeper is up.")
	line("console and API", web(s.addr.API))
	line("gateway", web(s.addr.Gateway))
	line("gateway's API", web(s.addr.GatewayAdmin))
	line("NATS", s.addr.NATS)
	line("ClickHouse", s.addr.ClickHouse+" (native)")
	line("", web(s.addr.ClickHouseHTTP))
	line("data", s.o.Engines.DataDir)
	switch {
	case s.upstream != "" && len(s.o.Gateway.Config.Routes) == 0:
		s.banner.line("Try it:")
		s.banner.line("  %s", demoCurl(dialable(s.addr.Gateway)))
		keys := demo.Keys()
		slices.Sort(keys)
		s.banner.line("Demo keys: %s; in most minutes %s is refused with 402 after 60 calls.", strings.Join(keys, ", "), demo.Key(demo.Refused))
	case s.addr.Gateway == "":
		s.banner.line("There is no gateway: --no-demo starts none without --gateway-config FILE (deploy/gateway.example.yaml).")
		if s.addr.API != "" {
			s.banner.line("Try it:")
			s.banner.line("  curl -i http://%s/readyz", dialable(s.addr.API))
		}
	case s.addr.GatewayAdmin != "":
		s.banner.line("Try it:")
		s.banner.line("  curl -i http://%s/readyz", dialable(s.addr.GatewayAdmin))
	}
	s.banner.line("Ctrl-C stops everything in order.")
}

// demoCurl is a call of an account that the demo never refuses.
func demoCurl(gateway string) string {
	return fmt.Sprintf(`curl -i http://%s/v1/chat/completions -H 'Authorization: Bearer %s' -H 'Content-Type: application/json' -d '{"model":"small","messages":[{"role":"user","content":"Hello."}]}'`,
		gateway, demo.Key(demo.Admitted))
}
