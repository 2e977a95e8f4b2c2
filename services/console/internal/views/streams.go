package views

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// Beacon is what the owner of a shard said last.
type Beacon struct {
	Shard      uint32       `json:"shard"`
	Epoch      uint64       `json:"epoch"`
	Sequence   uint64       `json:"ledger_sequence"`
	StreamTime usage.Micros `json:"stream_time_unix_micros"`
	// Age since it was heard.
	Age time.Duration `json:"-"`
}

// Beacons keeps the newest beacon of every shard.
type Beacons struct {
	mu      sync.Mutex
	byShard map[uint32]heard
}

type heard struct {
	Beacon
	at time.Time
}

// Hear takes note of a beacon at a time. Its error says that it is not one.
func (b *Beacons) Hear(data []byte, now time.Time) error {
	var p tollkeeperv1.Beacon
	if err := proto.Unmarshal(data, &p); err != nil {
		return fmt.Errorf("beacon: %w", err)
	}
	if p.GetShard() >= ledger.MaxShards {
		return fmt.Errorf("beacon: there is no shard %d", p.GetShard())
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.byShard == nil {
		b.byShard = map[uint32]heard{}
	}
	if old, ok := b.byShard[p.GetShard()]; ok && old.Epoch > p.GetEpoch() {
		return nil // an owner that was replaced
	}
	b.byShard[p.GetShard()] = heard{Beacon{Shard: p.GetShard(), Epoch: p.GetEpoch(), Sequence: p.GetLedgerSequence(), StreamTime: usage.Micros(p.GetStreamTimeUnixMicros())}, now}
	return nil
}

// All returns the newest beacons by shard, with their age.
func (b *Beacons) All(now time.Time) []Beacon {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make([]Beacon, 0, len(b.byShard))
	for _, h := range b.byShard {
		h.Age = max(now.Sub(h.at), 0)
		out = append(out, h.Beacon)
	}
	slices.SortFunc(out, func(x, y Beacon) int { return cmp.Compare(x.Shard, y.Shard) })
	return out
}

// MaxEpisodes that are kept.
const MaxEpisodes = 500

// Alerts keeps the newest transition of every episode.
type Alerts struct {
	mu       sync.Mutex
	episodes []usage.Alert // oldest change first
}

// Hear takes note of an entry of the ALERTS stream.
func (a *Alerts) Hear(data []byte) error {
	var t usage.Alert
	if err := json.Unmarshal(data, &t); err != nil {
		return fmt.Errorf("alert: %w", err)
	}
	if t.EpisodeID == "" {
		return fmt.Errorf("alert: it names no episode")
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if i := slices.IndexFunc(a.episodes, func(e usage.Alert) bool { return e.EpisodeID == t.EpisodeID }); i >= 0 {
		if a.episodes[i].N > t.N {
			return nil
		}
		a.episodes = slices.Delete(a.episodes, i, i+1)
	}
	if len(a.episodes) == MaxEpisodes {
		a.episodes = slices.Delete(a.episodes, 0, 1)
	}
	a.episodes = append(a.episodes, t)
	return nil
}

// Newest returns up to n episodes, firing ones first, then by the time of their
// last change, newest first.
func (a *Alerts) Newest(n int) []usage.Alert {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := slices.Clone(a.episodes)
	if out == nil {
		out = []usage.Alert{}
	}
	slices.Reverse(out)
	slices.SortStableFunc(out, func(x, y usage.Alert) int {
		fx, fy := x.Transition == usage.AlertFiring, y.Transition == usage.AlertFiring
		switch {
		case fx && !fy:
			return -1
		case fy && !fx:
			return 1
		}
		return cmp.Compare(y.At, x.At)
	})
	return out[:min(n, len(out))]
}

// Bounds of dead letters that are kept: whole lines of the newest, reasons of
// all that were counted.
const (
	MaxDeadLetters = 200
	maxReasons     = 32
	maxDetailBytes = 500
)

// DeadLetter is something that could not be counted, without its content.
type DeadLetter struct {
	Sequence uint64    `json:"sequence"`
	Time     time.Time `json:"time"`
	Reason   string    `json:"reason"`
	Detail   string    `json:"detail"`
	Origin   string    `json:"origin"`
	Bytes    int       `json:"bytes"`
}

// DeadLetters keeps the newest dead letters and counts reasons.
type DeadLetters struct {
	mu       sync.Mutex
	newest   []DeadLetter // newest last
	byReason map[string]int64
	counted  int64
}

// Hear takes note of an entry of the dead-letter stream.
func (d *DeadLetters) Hear(m *ledger.Message) {
	l := DeadLetter{
		Sequence: m.Sequence, Time: m.Time.UTC(), Bytes: len(m.Data),
		Reason: m.Header.Get(ledger.ReasonHeader), Detail: cut(m.Header.Get(ledger.DetailHeader)), Origin: cut(m.Header.Get(ledger.OriginHeader)),
	}
	if l.Reason == "" {
		l.Reason = "unknown"
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.byReason == nil {
		d.byReason = map[string]int64{}
	}
	name := l.Reason
	if _, ok := d.byReason[name]; !ok && len(d.byReason) >= maxReasons {
		name = "other"
	}
	d.byReason[name]++
	d.counted++
	if len(d.newest) == MaxDeadLetters {
		d.newest = slices.Delete(d.newest, 0, 1)
	}
	d.newest = append(d.newest, l)
}

func cut(s string) string {
	if len(s) <= maxDetailBytes {
		return s
	}
	return s[:maxDetailBytes] + "…"
}

// ReasonCount is how many dead letters have a reason.
type ReasonCount struct {
	Reason string `json:"reason"`
	Count  int64  `json:"count"`
}

// Newest returns up to n dead letters, newest first, how many were counted, and
// by which reasons, most first.
func (d *DeadLetters) Newest(n int) (letters []DeadLetter, counted int64, reasons []ReasonCount) {
	d.mu.Lock()
	defer d.mu.Unlock()
	letters = make([]DeadLetter, 0, min(n, len(d.newest)))
	for k := len(d.newest) - 1; k >= 0 && len(letters) < n; k-- {
		letters = append(letters, d.newest[k])
	}
	reasons = make([]ReasonCount, 0, len(d.byReason))
	for r, c := range d.byReason {
		reasons = append(reasons, ReasonCount{r, c})
	}
	slices.SortFunc(reasons, func(a, b ReasonCount) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Reason, b.Reason))
	})
	return letters, d.counted, reasons
}
