package soak

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/traffic"
)

// probeLimit is how much the accounts of crossings may use, once for all time.
const probeLimit = 5

// probes are accounts that each can cross their limit once, beside those that
// there are.
func probes(n int, doc *plans.Document, accounts []traffic.Account) (*plans.Document, []traffic.Account) {
	more, clients := people("probe", n, "soak-probe")
	doc.Plans = append(doc.Plans, plans.Plan{ID: "soak-probe", Limits: []plans.Limit{{ID: "all", Meter: "calls", Window: "lifetime", Amount: probeLimit}}})
	doc.Accounts = append(doc.Accounts, more...)
	return doc, append(accounts, clients...)
}

// errUndecided says that a crossing had no consequence.
var errUndecided = errors.New("nobody is refused")

// cross uses up a fresh account's limit through one gateway, and returns how long
// after the last answer another one refuses.
func (w *world) cross(ctx context.Context, account, from, at int) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for used := 0; used < probeLimit; {
		a := w.traffic.Call(ctx, traffic.Shape{Account: account, Gateway: from, Output: 1})
		switch a.Outcome {
		case traffic.Passed:
			used++
			continue
		case traffic.Refused:
			return 0, fmt.Errorf("%s is refused after %d of %d calls: %s", w.accounts[account].ID, used, probeLimit, a.Body)
		default:
		}
		if err := pause(ctx, 20*time.Millisecond); err != nil {
			return 0, fmt.Errorf("%s can't use up its limit: %w", w.accounts[account].ID, err)
		}
	}
	crossed := time.Now()
	for {
		a := w.traffic.Call(ctx, traffic.Shape{Account: account, Gateway: at, Output: 1})
		if a.Outcome == traffic.Refused {
			return time.Since(crossed), nil
		}
		if err := pause(ctx, time.Millisecond); err != nil {
			return 0, fmt.Errorf("%s has used up its limit: %w (status %d)", w.accounts[account].ID, errUndecided, a.Status)
		}
	}
}

// crossNext lets the next probe cross; there must be one.
func (w *world) crossNext(ctx context.Context) (time.Duration, error) {
	if w.probe == len(w.accounts) {
		return 0, errors.New("there are too few probes")
	}
	account := w.probe
	w.probe++
	n := len(w.fleet.GatewayURLs())
	return w.cross(ctx, account, account%n, (account+1)%n)
}
