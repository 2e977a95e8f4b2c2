package replay

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/history"
)

// ReadHistory waits until the history has the ledger's newest call of ours, and sums up
// its calls of the accounts.
func ReadHistory(ctx context.Context, h *history.History, accounts []string, fold LedgerFold) (Totals, error) {
	var last uint64
	for _, s := range fold.LastOfShard {
		last = max(last, s)
	}
	for {
		sum, newest, err := askHistory(ctx, h, accounts)
		if err == nil && newest >= last {
			return sum, nil
		}
		// ClickHouse may be away for a moment: that is what a replay may be
		// there to show.
		select {
		case <-ctx.Done():
			return sum, errors.Join(fmt.Errorf("ClickHouse has the ledger up to %d of %d: %w", newest, last, ctx.Err()), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func askHistory(ctx context.Context, h *history.History, accounts []string) (sum Totals, newest uint64, err error) {
	sum = newTotals()
	for chunk := range slices.Chunk(accounts, history.MaxAccounts) {
		t, err := h.Totals(ctx, history.TotalsQuery{Accounts: chunk})
		if err != nil {
			return sum, 0, fmt.Errorf("ClickHouse: %w", err)
		}
		newest = max(newest, t.LastSequence)
		sum.Admitted += t.Admitted
		sum.Refused += t.Refused
		for m, v := range t.Meters {
			sum.Meters[m] += v
		}
	}
	return sum, newest, nil
}
