package gate

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/gate/internal/ticket"
	"github.com/tollkeeper/tollkeeper/pkg/gate/table"
	"github.com/tollkeeper/tollkeeper/pkg/gate/wallet"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Leases say how the limits of the tiers exact and leased are dealt with.
type Leases struct {
	// Wait is how long a call waits for units that have to be fetched, after which
	// it is refused with BILLING_STATE_UNKNOWN; wallet.DefaultWait when 0.
	Wait time.Duration
	// Skew is by how much the estimate of the ledger's time is wrong at most;
	// wallet.DefaultSkew when 0. Leases are not used so long before they end, nor
	// are windows: calls that come then wait for the next one.
	Skew time.Duration
	// Name of the gateway in the ledger, for people.
	Name string
	// MaxPurses, MaxShelved, MaxWaiting and MaxReservations are bounds; 0 means the
	// wallet's defaults. What is beyond is refused with BILLING_STATE_UNKNOWN: beyond
	// MaxShelved, purses that nobody needs now stay among the others.
	MaxPurses, MaxShelved, MaxWaiting, MaxReservations int
	// PassUnknown lets calls that nobody answered for pass where all the limits
	// that could not be asked are of the tier leased, as Options.Unknown says. Calls
	// under a limit of the tier exact never pass unknown.
	PassUnknown bool
}

// Cost bounds what a call can use; nil: one call, and nothing that has a limit in
// the tiers exact and leased.
type Cost struct {
	// Bounds by meter. What is not known here can't be bounded, and is refused
	// where a limit of these tiers counts it. Calls is 1 when it is not known.
	Bounds usage.Quantities
	// Lifetime bounds how long the call takes. What it reserved stays held until it
	// is settled, also after that.
	Lifetime time.Duration
	// Voidable calls may turn out not to have reached anybody: what limits on calls
	// take is held, and not used, until the call is sent (Ticket.Sending), settled or
	// voided.
	Voidable bool
}

// defaultLifetime of a call whose Cost does not say.
const defaultLifetime = 10 * time.Minute

type (
	// Ticket is what an admitted call has taken of leases.
	Ticket = ticket.Ticket
	// Sending hears that the call of a Voidable ticket is on its way.
	Sending = ticket.Sending
)

// Measured returns the meters, besides calls, that Take needs bounds of for such a
// call: limits of the tiers exact and leased count them. It is empty for almost all
// accounts and then does not allocate.
func (g *Gate) Measured(a *Account, req Request) []usage.Meter {
	var out []usage.Meter
	for i, draws := 0, a.Leased(); i < len(draws); i++ {
		if m := draws[i].Limit.Meter; m != usage.Calls && draws[i].Concerns(req) {
			out = append(out, m)
		}
	}
	return out
}

// Take admits a call as Admit does and, where limits of the tiers exact and leased
// concern it, takes what it costs from leases: of every such limit on its path, or
// of none. What is not at hand is fetched, within Leases.Wait. The call's event
// must then be stamped (Ticket.Stamp), and the ticket settled when the call is
// over.
//
// It takes no lock and does not allocate where the limits count calls and their
// units are at hand, nor where there are none of these tiers.
func (g *Gate) Take(ctx context.Context, a *Account, req Request, cost *Cost) (Verdict, Ticket) {
	t := g.table.Load()
	if t == nil {
		return g.decide(nil, a, req), Ticket{}
	}
	if t.Fine(a) {
		return Verdict{Allowed: true}, Ticket{}
	}
	w := g.wallet.Load()
	if w != nil && (cost == nil || !cost.Voidable && !cost.ofCalls()) {
		now := w.Clock()
		if taken, low := t.TakeOne(a, &req, now, false); taken {
			if low {
				w.Low(a.Leased())
			}
			return Verdict{Allowed: true}, ticket.New(usage.Micros(now), nil)
		}
	}
	return g.take(ctx, t, w, a, req, cost)
}

// ofCalls: the bound says that it is not one call.
func (c *Cost) ofCalls() bool {
	n, known := c.Bounds.BuiltIn(usage.CallsIndex)
	return known && n != 1
}

func (g *Gate) take(ctx context.Context, t *table.Table, w *wallet.Wallet, a *Account, req Request, cost *Cost) (Verdict, Ticket) {
	var parts []wallet.Part
	var bounds *usage.Quantities
	if cost != nil {
		bounds = &cost.Bounds
	}
	reserve := cost != nil && cost.Voidable
	for i, draws := 0, a.Leased(); i < len(draws); i++ {
		d := &draws[i]
		if !d.Concerns(req) {
			continue
		}
		units, v := d.Units(bounds)
		if !v.Allowed {
			g.metrics.refused(v.Code)
			return v, Ticket{}
		}
		reserve = reserve || d.Limit.Meter != usage.Calls || units != 1
		parts = append(parts, wallet.Part{Draw: *d, Units: units})
	}
	if len(parts) == 0 {
		return g.decide(t, a, req), Ticket{}
	}
	v := t.DecideLeased(a, req, usage.At(g.now()))
	if !v.Allowed {
		g.metrics.refused(v.Code)
		return v, Ticket{}
	}
	var k Ticket
	if w == nil {
		v = g.unanswered(t, a, parts, v)
	} else {
		if !reserve {
			// Only what is held against the call, a warning, was in the way before.
			now := w.Clock()
			if taken, low := t.TakeOne(a, &req, now, true); taken {
				if low {
					w.Low(a.Leased())
				}
				return v, ticket.New(usage.Micros(now), nil)
			}
		}
		lifetime := defaultLifetime
		if cost != nil && cost.Lifetime > 0 {
			lifetime = cost.Lifetime
		}
		switch r := w.Take(ctx, parts, reserve, lifetime); r.Standing {
		case wallet.Taken:
			k = ticket.New(r.Time, r.Hold)
		case wallet.Denied, wallet.DeniedEarly:
			v = parts[r.At].Denied(r.Decision, r.Start, parts[r.At].Units)
		default:
			v = g.unanswered(t, a, parts, v)
			if !v.Allowed && r.Bound != wallet.Unbounded {
				v.Detail = fmt.Sprintf("This gateway has reached its bound of %s, and could not ask whether this call is paid for: try again later.", r.Bound)
			}
		}
	}
	switch {
	case !v.Allowed:
		g.metrics.refused(v.Code)
	case v.Unknown:
		g.metrics.unknownPassed.Inc()
	}
	return v, k
}

// unanswered applies the policy for what could not be known.
func (g *Gate) unanswered(t *table.Table, a *Account, parts []wallet.Part, v Verdict) Verdict {
	if g.o.Leases.PassUnknown && g.o.Unknown.Mode == PassUnknown && !v.Unknown {
		exact := false
		for i := range parts {
			exact = exact || parts[i].Limit.Tier != usage.TierLeased
		}
		if !exact && t.PassUnknown(a) {
			return Verdict{Allowed: true, Unknown: true, Decision: v.Decision}
		}
	}
	return Verdict{Unknown: true, Code: usage.BillingStateUnknown}
}

// openWallet makes the purses of this run.
func (g *Gate) openWallet(nc *nats.Conn, js jetstream.JetStream, out Outbox, shards uint32) (*wallet.Wallet, error) {
	w, err := wallet.New(wallet.Options{
		Conn: nc, JS: js, Gateway: out.Producer(), Name: g.o.Leases.Name, Shards: shards, Now: g.LedgerNow, TestClock: g.table.Load().TestClock(),
		Skew: g.o.Leases.Skew, Wait: g.o.Leases.Wait,
		MaxPurses: g.o.Leases.MaxPurses, MaxShelved: g.o.Leases.MaxShelved, MaxWaiting: g.o.Leases.MaxWaiting, MaxHolds: g.o.Leases.MaxReservations,
		Logger: g.o.Logger, Registerer: g.o.Registerer, Journal: wallet.JournalOf(out),
	})
	if err != nil {
		return nil, fmt.Errorf("gate: %w", err)
	}
	return w, nil
}

// closeWallet brings the purses' last words into the ledger, before the outbox
// says that this producer has ended.
func (g *Gate) closeWallet(ctx context.Context, w *wallet.Wallet) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), g.o.CloseTimeout/2)
	defer cancel()
	if err := w.Close(ctx); err != nil {
		g.o.Logger.Warn().Err(err).Msg("not every lease was closed")
	}
}
