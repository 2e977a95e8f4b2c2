package books

import (
	"bytes"
	"encoding/gob"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/audit"
	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// snapshot is the form in which books are stored.
type snapshot struct {
	Version                         int
	Ledger                          string
	Position, ClaimsPosition, Floor uint64
	Whole                           bool
	High                            usage.Micros
	Shards                          []shardSnapshot
	Lanes                           []laneSnapshot
	Producers                       map[dedup.Producer]newest
	Rounds                          []roundSnapshot // the open one is the last
	Open                            bool
	Stats                           Stats
}

type shardSnapshot struct {
	Shard    uint32
	Core     uint32 // version of the rules; 0: the ledger has said none, or the writer did not ask
	High     usage.Micros
	Last     uint64
	Set      []byte
	Total    Life
	Accounts map[string]Life
	Dirty    []string
}

type laneSnapshot struct {
	Producer              dedup.Producer
	Shard                 uint32
	Claimed, GaveUp, Last uint64
	Held                  []heldSnapshot
	Waiting               []waitingSnapshot
	Closed, Touched       time.Time
}

type heldSnapshot struct {
	Number uint64
	Minute audit.Minute
	Since  time.Time
	Heard  time.Duration // of claims since then
	Calls  int64
	Cells  []audit.Cell
}

type waitingSnapshot struct {
	From, Through uint64
	Want, Got     []audit.Cell
	Since         time.Time
	Heard         time.Duration // of the ledger since then
	Told          bool
}

type roundSnapshot struct {
	From, To     uint64
	Since, Until usage.Micros
	Cells        []audit.Cell
}

const snapshotVersion = 1

// Marshal writes the books, and rounds that were cut and are still to be
// compared with the history. ledgerID says which ledger they are of.
func (b *Books) Marshal(ledgerID string, rounds []*Round) ([]byte, error) {
	x := snapshot{
		Version: snapshotVersion, Ledger: ledgerID, Position: b.Position, ClaimsPosition: b.ClaimsPosition, Floor: b.Floor,
		Whole: b.Whole, High: b.high, Producers: b.producers, Stats: b.stats, Open: b.round != nil,
	}
	if b.round != nil {
		rounds = append(slices.Clip(rounds), b.round)
	}
	for _, r := range rounds {
		x.Rounds = append(x.Rounds, roundSnapshot{r.From, r.To, r.Since, r.Until, slices.Collect(r.Cells.All())})
	}
	for n, s := range b.shards {
		out := shardSnapshot{Shard: n, Core: s.version, High: s.high, Last: s.last, Set: s.set.AppendBinary(nil), Total: s.total, Accounts: map[string]Life{}, Dirty: s.dirty}
		for id, life := range s.accounts {
			out.Accounts[id] = *life
		}
		x.Shards = append(x.Shards, out)
	}
	for key, l := range b.lanes {
		// A claim of which more is to come is read again from its beginning only
		// by luck: it counts as late.
		out := laneSnapshot{Producer: key.producer, Shard: key.shard, Claimed: l.claimed, GaveUp: l.gaveUp, Last: l.last, Closed: l.closed, Touched: l.touched}
		if l.partial != nil {
			out.GaveUp = max(out.GaveUp, l.partial.Through)
		}
		for i := range l.held {
			f := &l.held[i]
			h := heldSnapshot{Number: f.number, Minute: f.minute, Since: f.since, Heard: b.heard.Claims - f.heard, Calls: f.calls}
			for k := range f.cells {
				h.Cells = append(h.Cells, audit.Cell{Account: f.cells[k].account, Tally: f.cells[k].tally})
			}
			out.Held = append(out.Held, h)
		}
		for _, w := range l.waiting {
			out.Waiting = append(out.Waiting, waitingSnapshot{w.from, w.through, slices.Collect(w.want.All()), slices.Collect(w.got.All()), w.since, b.heard.Ledger - w.heard, w.told})
		}
		x.Lanes = append(x.Lanes, out)
	}
	var buf bytes.Buffer
	if err := gob.NewEncoder(&buf).Encode(&x); err != nil {
		return nil, fmt.Errorf("write the auditor's snapshot: %w", err)
	}
	return buf.Bytes(), nil
}

var errSnapshot = errors.New("the auditor's snapshot can't be used")

// Unmarshal reads what Marshal wrote. A *quota.NewerError says that a newer program
// did, by rules that this one does not know.
func Unmarshal(o Options, ledgerID string, data []byte) (*Books, []*Round, error) {
	var x snapshot
	if err := gob.NewDecoder(bytes.NewReader(data)).Decode(&x); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", errSnapshot, err)
	}
	if x.Version != snapshotVersion || x.Ledger != ledgerID {
		return nil, nil, fmt.Errorf("%w: it is of another version or ledger", errSnapshot)
	}
	b := New(o)
	b.Position, b.ClaimsPosition, b.Floor, b.Whole, b.high, b.stats = x.Position, x.ClaimsPosition, x.Floor, x.Whole, x.High, x.Stats
	if x.Producers != nil {
		b.producers = x.Producers
	}
	for i := range x.Shards {
		in := &x.Shards[i]
		if newer := quota.Newer(in.Shard, 0, in.Core); newer != nil {
			return nil, nil, newer
		}
		set, rest, err := dedup.Read(in.Set)
		if err != nil || len(rest) > 0 || in.Shard >= ledger.MaxShards {
			return nil, nil, errors.Join(errSnapshot, err)
		}
		s := &shard{set: set, version: in.Core, high: in.High, last: in.Last, total: in.Total, accounts: map[string]*Life{}, dirty: in.Dirty}
		for id, life := range in.Accounts {
			s.accounts[id] = &life
		}
		b.accounts += len(s.accounts)
		b.shards[in.Shard] = s
	}
	for i := range x.Lanes {
		in := &x.Lanes[i]
		l := &lane{claimed: in.Claimed, gaveUp: in.GaveUp, last: in.Last, closed: in.Closed, touched: in.Touched}
		for _, h := range in.Held {
			f := heldFrame{number: h.Number, minute: h.Minute, since: h.Since, heard: -h.Heard, calls: h.Calls}
			for k := range h.Cells {
				f.cells = append(f.cells, heldCell{h.Cells[k].Account, h.Cells[k].Tally})
			}
			b.held += len(f.cells)
			l.held = append(l.held, f)
		}
		for _, w := range in.Waiting {
			next := &waiting{from: w.From, through: w.Through, want: b.cells(w.Want), got: b.cells(w.Got), since: w.Since, heard: -w.Heard, told: w.Told}
			b.waiting += next.want.Len()
			l.waiting = append(l.waiting, next)
		}
		b.lanes[laneKey{in.Producer, in.Shard}] = l
	}
	var rounds []*Round
	for _, r := range x.Rounds {
		rounds = append(rounds, &Round{r.From, r.To, r.Since, r.Until, b.cells(r.Cells)})
	}
	if n := len(rounds); x.Open && n > 0 {
		b.round, rounds = rounds[n-1], rounds[:n-1]
	}
	return b, rounds, nil
}

func (b *Books) cells(list []audit.Cell) *audit.Cells {
	c := audit.NewCells(b.o.Cells)
	for i := range list {
		c.Add(&list[i])
	}
	return c
}
