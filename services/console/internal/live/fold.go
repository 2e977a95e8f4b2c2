// Package live folds the tail of the ledger into what the first page shows: calls
// a second, refusals by code, the busiest accounts, the latest refusals. It is
// pure: entries and times in, values out; no clock, no goroutine, no I/O.
package live

import (
	"cmp"
	"slices"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Bounds of what is kept.
const (
	// Window is how many seconds are kept.
	Window = 300
	// maxAccounts that are counted at a time; the quietest make room.
	maxAccounts = 4096
	// maxRefusals that are kept, one for an account and second.
	maxRefusals = 50
	maxGateways = 64
	maxCodes    = 16
	otherCode   = "OTHER"
)

// Second is what happened in one second of the ledger's time.
type Second struct {
	// At is the second, since the Unix epoch.
	At       int64            `json:"t"`
	Admitted int64            `json:"admitted"`
	Refused  map[string]int64 `json:"refused"` // by code; never nil
	Input    int64            `json:"input_tokens"`
	Output   int64            `json:"output_tokens"`
}

// RefusedTotal sums the codes.
func (s *Second) RefusedTotal() int64 {
	var n int64
	for _, v := range s.Refused {
		n += v
	}
	return n
}

// Refusal is a call that was refused.
type Refusal struct {
	Time       usage.Micros `json:"time_unix_micros"`
	Account    string       `json:"account"`
	KeyID      string       `json:"key_id,omitempty"`
	Code       string       `json:"code"`
	Status     int64        `json:"status"`
	DecisionID string       `json:"decision_id,omitempty"`
	Method     string       `json:"method,omitempty"`
	Route      string       `json:"route,omitempty"`
	Model      string       `json:"model,omitempty"`
	RequestID  string       `json:"request_id,omitempty"`
	Gateway    string       `json:"gateway,omitempty"`
	Sequence   uint64       `json:"ledger_sequence"`
	// Count of refusals of the account with this code in this second; the
	// fields are those of the newest.
	Count int64 `json:"count"`
}

// Busy is an account and what it did within the window.
type Busy struct {
	Account  string `json:"account"`
	Shard    uint32 `json:"shard"`
	Admitted int64  `json:"admitted"`
	Refused  int64  `json:"refused"`
}

// Gateway is a gateway that sent frames.
type Gateway struct {
	Name string `json:"name"`
	// SeenAt is the ledger's time of its newest frame.
	SeenAt usage.Micros `json:"seen_at_unix_micros"`
}

// Fold is the state. The zero value is ready. Not safe for concurrent use.
type Fold struct {
	seconds  [Window]Second
	newest   int64 // second; 0 before the first
	accounts map[string]*busy
	refusals []Refusal // newest last
	gateways map[string]usage.Micros
	codes    map[string]bool
	position uint64
	streamAt usage.Micros
}

// busy counts with decay: a minute halves it, so that what was busy long ago
// makes room.
type busy struct {
	shard             uint32
	admitted, refused float64
	decayedAt         int64
}

const halfLife = 60 // seconds

func (b *busy) decay(second int64) {
	for ; b.decayedAt+halfLife <= second; b.decayedAt += halfLife {
		b.admitted /= 2
		b.refused /= 2
		if b.admitted+b.refused < 0.5 {
			b.admitted, b.refused, b.decayedAt = 0, 0, second
			return
		}
	}
}

func (b *busy) weight() float64 { return b.admitted + b.refused }

// Position returns the newest entry that was folded and its ledger time.
func (f *Fold) Position() (sequence uint64, at usage.Micros) { return f.position, f.streamAt }

// Passed takes note of an entry that holds no calls.
func (f *Fold) Passed(sequence uint64, at usage.Micros) {
	f.position, f.streamAt = sequence, max(at, f.streamAt)
	f.advance(int64(at) / 1_000_000)
}

// advance makes room for a second that has begun.
func (f *Fold) advance(second int64) {
	if f.newest == 0 || second-f.newest >= Window {
		f.newest = second - Window
		if f.newest < 0 {
			f.newest = 0
		}
	}
	for f.newest < second {
		f.newest++
		f.seconds[f.newest%Window] = Second{At: f.newest, Refused: map[string]int64{}}
	}
}

// Apply folds a frame that stands at a position of the ledger.
func (f *Fold) Apply(fr *ledger.Frame, sequence uint64, at usage.Micros) {
	f.Passed(sequence, at)
	second := int64(at) / 1_000_000
	if second <= f.newest-Window {
		return // the ledger's clock went far back
	}
	if f.accounts == nil {
		f.accounts, f.gateways, f.codes = map[string]*busy{}, map[string]usage.Micros{}, map[string]bool{}
	}
	s := &f.seconds[second%Window]
	if fr.Gateway != "" {
		if _, ok := f.gateways[fr.Gateway]; ok || len(f.gateways) < maxGateways || f.dropGateway() {
			f.gateways[fr.Gateway] = at
		}
	}
	for i := range fr.N {
		account := fr.Account.At(i)
		if code := fr.Code.At(i); len(code) > 0 {
			name := f.code(string(code))
			s.Refused[name]++
			f.count(account, fr.Shard, second).refused++
			f.refuse(fr, i, sequence)
			continue
		}
		n := int64(1)
		if v, ok := fr.Meters[usage.CallsIndex].Get(i); ok {
			n = v
		}
		s.Admitted += n
		s.Input += fr.Meters[usage.InputTokensIndex].At(i)
		s.Output += fr.Meters[usage.OutputTokensIndex].At(i)
		f.count(account, fr.Shard, second).admitted += float64(n)
	}
}

func (f *Fold) code(c string) string {
	if f.codes[c] {
		return c
	}
	if len(f.codes) >= maxCodes {
		return otherCode
	}
	f.codes[c] = true
	return c
}

func (f *Fold) count(account []byte, shard uint32, second int64) *busy {
	b, ok := f.accounts[string(account)]
	if !ok {
		if len(f.accounts) >= maxAccounts {
			f.dropAccounts(second)
		}
		b = &busy{shard: shard, decayedAt: second}
		f.accounts[string(account)] = b
	}
	b.decay(second)
	return b
}

// dropAccounts drops the quieter half, so that it is rarely done.
func (f *Fold) dropAccounts(second int64) {
	weights := make([]float64, 0, len(f.accounts))
	for _, b := range f.accounts {
		b.decay(second)
		weights = append(weights, b.weight())
	}
	slices.Sort(weights)
	bar := weights[len(weights)/2]
	left := len(f.accounts) / 2
	for id, b := range f.accounts {
		if b.weight() <= bar && left > 0 {
			delete(f.accounts, id)
			left--
		}
	}
}

func (f *Fold) dropGateway() bool {
	oldest, at := "", usage.Micros(0)
	for name, seen := range f.gateways {
		if oldest == "" || seen < at || seen == at && name < oldest {
			oldest, at = name, seen
		}
	}
	delete(f.gateways, oldest)
	return true
}

func (f *Fold) refuse(fr *ledger.Frame, i int, sequence uint64) {
	account, code := fr.Account.At(i), fr.Code.At(i)
	at := usage.Micros(fr.Time.At(i))
	for k := len(f.refusals) - 1; k >= 0 && k >= len(f.refusals)-maxRefusals; k-- {
		r := &f.refusals[k]
		if r.Account == string(account) && r.Code == string(code) && r.Time/1_000_000 == at/1_000_000 {
			r.Count++
			f.describe(r, fr, i, sequence)
			return
		}
	}
	r := Refusal{Account: string(account), Code: string(code), Count: 1}
	f.describe(&r, fr, i, sequence)
	if len(f.refusals) == maxRefusals {
		f.refusals = slices.Delete(f.refusals, 0, 1)
	}
	f.refusals = append(f.refusals, r)
}

func (f *Fold) describe(r *Refusal, fr *ledger.Frame, i int, sequence uint64) {
	r.Time, r.Status, r.Sequence, r.Gateway = usage.Micros(fr.Time.At(i)), fr.Status.At(i), sequence, fr.Gateway
	r.KeyID, r.DecisionID, r.RequestID = string(fr.KeyID.At(i)), string(fr.DecisionID.At(i)), string(fr.RequestID.At(i))
	r.Method, r.Route, r.Model = string(fr.Method.At(i)), string(fr.Route.At(i)), string(fr.Model.At(i))
}

// Seconds returns the n seconds (at most Window) that ended before now, oldest
// first, each of them there even when nothing happened in it. The values are
// copies.
func (f *Fold) Seconds(now usage.Micros, n int) []Second {
	f.advance(max(int64(now)/1_000_000, f.newest))
	last := f.newest - 1
	n = min(n, Window-1)
	out := make([]Second, 0, n)
	for at := last - int64(n) + 1; at <= last; at++ {
		if at < 0 {
			continue
		}
		s := f.seconds[at%Window]
		refused := make(map[string]int64, len(s.Refused))
		if s.At == at {
			for c, v := range s.Refused {
				refused[c] = v
			}
		} else {
			s = Second{At: at}
		}
		s.Refused = refused
		out = append(out, s)
	}
	return out
}

// Busiest returns the n accounts with the most calls of late, most first.
func (f *Fold) Busiest(now usage.Micros, n int) []Busy {
	type ranked struct {
		Busy
		weight float64
	}
	second := max(int64(now)/1_000_000, f.newest)
	all := make([]ranked, 0, len(f.accounts))
	for id, b := range f.accounts {
		b.decay(second)
		if w := b.weight(); w > 0 {
			all = append(all, ranked{Busy{Account: id, Shard: b.shard, Admitted: int64(b.admitted + 0.5), Refused: int64(b.refused + 0.5)}, w})
		} else {
			delete(f.accounts, id)
		}
	}
	slices.SortFunc(all, func(a, b ranked) int {
		return cmp.Or(cmp.Compare(b.weight, a.weight), cmp.Compare(a.Account, b.Account))
	})
	out := make([]Busy, 0, n)
	for i := range min(n, len(all)) {
		out = append(out, all[i].Busy)
	}
	return out
}

// Refusals returns the newest n, newest first.
func (f *Fold) Refusals(n int) []Refusal {
	out := make([]Refusal, 0, n)
	for k := len(f.refusals) - 1; k >= 0 && len(out) < n; k-- {
		out = append(out, f.refusals[k])
	}
	return out
}

// Gateways returns the gateways that were seen, by name.
func (f *Fold) Gateways() []Gateway {
	out := make([]Gateway, 0, len(f.gateways))
	for name, at := range f.gateways {
		out = append(out, Gateway{name, at})
	}
	slices.SortFunc(out, func(a, b Gateway) int { return cmp.Compare(a.Name, b.Name) })
	return out
}
