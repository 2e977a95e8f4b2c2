package points

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
)

// again is how long to wait before a point is asked again.
const again = 50 * time.Millisecond

func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Counters asks the shards' owners for what they have counted of the accounts,
// once each has counted up to the given sequence of its shard.
func Counters(ctx context.Context, nc *nats.Conn, shards uint32, accounts []string, upTo map[uint32]uint64) (map[string]Sums, error) {
	byShard := map[uint32][]string{}
	for _, a := range accounts {
		s := ledger.ShardOf(a, shards)
		byShard[s] = append(byShard[s], a)
	}
	out := map[string]Sums{}
	for _, shard := range slices.Sorted(maps.Keys(byShard)) {
		for chunk := range slices.Chunk(byShard[shard], ledger.MaxUsageAccounts) {
			reply, err := askUsage(ctx, nc, shard, chunk, upTo[shard])
			if err != nil {
				return nil, err
			}
			for _, a := range reply.Accounts {
				out[a.ID] = Sums{Admitted: a.Own.Admitted, Refused: a.Own.Refused, Meters: a.Own.Meters}
			}
		}
	}
	return out, nil
}

func askUsage(ctx context.Context, nc *nats.Conn, shard uint32, accounts []string, upTo uint64) (ledger.UsageReply, error) {
	req, err := json.Marshal(ledger.UsageRequest{Accounts: accounts})
	if err != nil {
		return ledger.UsageReply{}, fmt.Errorf("marshal usage request: %w", err)
	}
	for {
		var reply ledger.UsageReply
		ask, cancel := context.WithTimeout(ctx, 2*time.Second)
		msg, err := nc.RequestWithContext(ask, ledger.UsageSubject(shard), req)
		cancel()
		if err == nil {
			if err = json.Unmarshal(msg.Data, &reply); err == nil {
				if reply.Sequence >= upTo {
					return reply, nil
				}
				err = fmt.Errorf("it has counted up to %d of %d", reply.Sequence, upTo)
			}
		}
		if waited := wait(ctx, again); waited != nil {
			return ledger.UsageReply{}, errors.Join(waited, fmt.Errorf("counters of shard %d: %w", shard, err))
		}
	}
}

// History is what ClickHouse holds of one traffic.
type History struct {
	// Calls by number, as the ledger's.
	Calls []Held
	// Foreign rows carry the traffic's name and no number that was sent.
	Foreign int64
}

// HistoryOptions say where ClickHouse is.
type HistoryOptions struct {
	// HTTP is its base URL.
	HTTP string
	Open history.Options
	// Run is the traffic's name.
	Run    string
	Number func(requestID string) (int, bool)
}

// ReadHistory reads the traffic's rows once ClickHouse has all up to a sequence
// of the ledger; with an earlier answer only that it may have doubled since is
// not found: it reads everything.
func ReadHistory(ctx context.Context, o HistoryOptions, upTo uint64, want int64) (History, error) {
	var h History
	for {
		newest, rows, err := o.progress(ctx)
		if err == nil && newest >= upTo && rows >= want {
			break
		}
		if err == nil && newest >= upTo {
			// The newest is there and some are missing: they may be in another
			// block that is on its way. What never comes is lost.
			err = fmt.Errorf("it has %d rows of %d", rows, want)
		}
		if waited := wait(ctx, again); waited != nil {
			if err == nil {
				err = fmt.Errorf("it has the ledger up to %d of %d", newest, upTo)
			}
			if newest >= upTo {
				break // what is missing is for the comparison to say
			}
			return h, errors.Join(waited, fmt.Errorf("ClickHouse: %w", err))
		}
	}
	read, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	err := o.query(read, "SELECT request_id, toUInt8(code = '') FROM "+o.Open.Database+".calls WHERE startsWith(request_id, {run:String}) FORMAT TabSeparated", func(fields []string) error {
		if len(fields) != 2 {
			return fmt.Errorf("a row has %d fields", len(fields))
		}
		n, ok := o.Number(fields[0])
		if !ok {
			h.Foreign++
			return nil
		}
		for len(h.Calls) <= n {
			h.Calls = append(h.Calls, make([]Held, 1+len(h.Calls))...)
		}
		if fields[1] == "1" {
			h.Calls[n].Admitted = once(h.Calls[n].Admitted)
		} else {
			h.Calls[n].Refused = once(h.Calls[n].Refused)
		}
		return nil
	})
	return h, err
}

// At returns what is held of a call.
func (h *History) At(n int) Held {
	if n < len(h.Calls) {
		return h.Calls[n]
	}
	return Held{}
}

func (o HistoryOptions) progress(ctx context.Context) (newest uint64, rows int64, err error) {
	err = o.query(ctx, "SELECT max(sequence), count() FROM "+o.Open.Database+".calls WHERE startsWith(request_id, {run:String}) FORMAT TabSeparated", func(fields []string) error {
		if len(fields) != 2 {
			return fmt.Errorf("a row has %d fields", len(fields))
		}
		var err error
		if newest, err = strconv.ParseUint(fields[0], 10, 64); err != nil {
			return err
		}
		rows, err = strconv.ParseInt(fields[1], 10, 64)
		return err
	})
	return newest, rows, err
}

// query asks over HTTP: the identities of single calls are no question that the
// services ask.
func (o HistoryOptions) query(ctx context.Context, query string, row func(fields []string) error) error {
	values := url.Values{"query": {query}, "param_run": {o.Run + "-"}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, o.HTTP+"/?"+values.Encode(), nil)
	if err != nil {
		return err
	}
	req.Header.Set("X-ClickHouse-User", o.Open.User)
	req.Header.Set("X-ClickHouse-Key", o.Open.Password)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("ClickHouse: %w", err)
	}
	defer func() { _ = resp.Body.Close() }() // it is read to its end
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 1000)) // the status says enough
		return fmt.Errorf("ClickHouse: status %d: %s", resp.StatusCode, text)
	}
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if err := row(strings.Split(lines.Text(), "\t")); err != nil {
			return fmt.Errorf("ClickHouse: %w", err)
		}
	}
	return lines.Err()
}

// Rollups returns the accounts' sums out of the hourly rollup, which a
// materialized view fills.
func Rollups(ctx context.Context, o history.Options, accounts []string) (map[string]Sums, error) {
	h, err := history.Open(ctx, o)
	if err != nil {
		return nil, err
	}
	defer func() { _ = h.Close() }() // only read
	out := map[string]Sums{}
	for chunk := range slices.Chunk(accounts, history.MaxAccounts) {
		totals, err := h.AccountTotals(ctx, history.TotalsQuery{Accounts: chunk, Rollup: true})
		if err != nil {
			return nil, err
		}
		for _, t := range totals {
			out[t.Account] = Sums{Admitted: t.Admitted, Refused: t.Refused, Meters: t.Meters}
		}
	}
	return out, nil
}

// Audit is how Tollkeeper's own audit stands.
type Audit struct {
	Position  uint64          `json:"ledger_position"`
	Calls     int64           `json:"calls"`
	Claimed   int64           `json:"claimed_calls"`
	Unclaimed int64           `json:"unclaimed_calls"`
	Open      int             `json:"open"`
	Findings  json.RawMessage `json:"findings,omitempty"`
}

// ReadAudit returns what the auditor says once it has read up to a sequence of the
// ledger. What it finds open then it is given time to see healed, until ctx is
// done: then it is the answer.
func ReadAudit(ctx context.Context, js jetstream.JetStream, upTo uint64) (Audit, error) {
	var last Audit
	for {
		a, err := readAudit(ctx, js)
		if err == nil {
			if last = a; a.Position >= upTo && a.Open == 0 {
				return a, nil
			}
			err = fmt.Errorf("it has read up to %d of %d", a.Position, upTo)
		}
		if waited := wait(ctx, 4*again); waited != nil {
			if last.Position >= upTo {
				return last, nil
			}
			return last, errors.Join(waited, fmt.Errorf("the audit: %w", err))
		}
	}
}

func readAudit(ctx context.Context, js jetstream.JetStream) (a Audit, err error) {
	kv, err := js.KeyValue(ctx, ledger.AuditBucket)
	if err != nil {
		return a, err
	}
	e, err := kv.Get(ctx, ledger.AuditStatusKey)
	if err != nil {
		return a, err
	}
	return a, json.Unmarshal(e.Value(), &a)
}
