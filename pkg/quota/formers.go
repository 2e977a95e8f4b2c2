package quota

import (
	"encoding/binary"
	"slices"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// former is what gateways hold of an allowance under a name that its limit had
// before: the account has come to another plan with the same limit. They are told
// that this is over, use no more of it than they have, and begin new leases under the
// new name; what they have is reserved there until it is counted or comes back.
type former struct {
	name   string // "<plan>/<limit>"
	escrow *lease.Escrow

	// What this entry brings to it:
	entry   lease.Entry
	ask     lease.Ask
	ended   lease.End
	counted [1]lease.Counted
}

// maxFormers of an allowance. What is out of earlier ones is reserved to the window's
// end.
const maxFormers = 8

// successor is the limit of another plan that goes on counting what one counted, and
// is leased as it was; -1: there is none.
func (s *Shard) successor(old *limit, limits []limit) int {
	if s.core.Version < carriesLeases {
		return -1
	}
	return slices.IndexFunc(limits, func(l limit) bool { return l.leased && s.goesOn(old, &l) })
}

// succeed begins an allowance anew under its limit's new name. The counter is still
// where it was.
func (s *Shard) succeed(x *allowance, o uint32, old, l *limit) {
	x.escrow.Retire()
	x.remember(&former{name: old.fullID, escrow: x.escrow})
	for _, f := range x.formers {
		f.entry.Terms = &l.terms
	}
	x.escrow, x.entry = lease.NewEscrow(l.Amount, termsOf(l, x.key.window)), lease.Entry{}
	if number := s.windows[old.kind].number; x.key.window == number {
		c := &s.counters[s.accounts[x.key.account].first+o]
		c.roll(number)
		x.entry.Outside = c.cur
	}
	s.stir(x)
}

// endNamed tells gateways that what they hold under a name is over.
func (s *Shard) endNamed(x *allowance, name string, l *limit, e *lease.Escrow) {
	for _, a := range e.Resume() {
		a.Revision, a.Verdict, a.Room, a.Recall = s.sequence, lease.Ended, 0, 0
		s.answerOf(x, name, l, a)
	}
}

// formerOf finds what a gateway still holds of an account under the name that it
// says; nil: nothing.
func (s *Shard) formerOf(i uint32, m *LeaseAsk) (*allowance, *former) {
	if s.core.Version < carriesLeases {
		return nil, nil
	}
	def := s.plans.defs[s.accounts[i].plan]
	for k := range def.n {
		l := &s.plans.limits[def.first+k]
		if !l.leased {
			continue
		}
		number := l.kind.Number(m.WindowStart)
		if m.WindowStart != l.kind.Start(number) || number != int64(int32(number)) {
			continue
		}
		if x := s.allowances[allowanceKey{i, k, int32(number)}]; x != nil {
			if f := x.formerOf(m); f != nil {
				return x, f
			}
		}
	}
	list := s.retired[i]
	for at := range list {
		kind := list[at].limit.kind
		for _, x := range list[at].allowances {
			if m.WindowStart != kind.Start(int64(x.key.window)) {
				continue
			}
			if f := x.formerOf(m); f != nil {
				return x, f
			}
		}
	}
	return nil, nil
}

func (x *allowance) formerOf(m *LeaseAsk) *former {
	for _, f := range x.formers {
		if f.name == m.LimitID && f.escrow.Holds(m.Gateway) {
			return f
		}
	}
	return nil
}

// says takes in what a gateway has used and gives back; it gets nothing more.
func (f *former) says(m *lease.Ask) {
	if f.entry.Ask != nil && f.ask.Seq >= m.Seq {
		return
	}
	f.ask, f.entry.Ask = *m, &f.ask
	f.ask.Need, f.ask.Want, f.ask.Renew = 0, 0, false
}

// countFormers takes units that a gateway's calls used as of what it may hold under
// former names, and returns how many.
func (x *allowance) countFormers(g lease.Gateway, units int64) int64 {
	rest := units
	for _, f := range x.formers {
		if n := min(rest, f.escrow.LooseOf(g)-f.counted[0].Units); n > 0 {
			f.counted[0].Gateway = g
			f.counted[0].Units += n
			f.entry.Counted = f.counted[:]
			rest -= n
		}
	}
	return units - rest
}

// settleFormers applies what this entry brought to former names, and reserves what may
// still be used under them.
func (s *Shard) settleFormers(x *allowance, l *limit) {
	if len(x.formers) == 0 {
		return
	}
	exposure := x.escrow.Exposure()
	for _, f := range x.formers {
		exposure += f.escrow.Exposure()
	}
	for _, f := range x.formers {
		exposure -= f.escrow.Exposure()
		f.escrow.Reserve(0, exposure)
		f.entry.Sequence, f.entry.Time = s.sequence, lease.Micros(s.now)
		before := f.escrow.Counts()
		fx := f.escrow.Apply(f.entry)
		after := f.escrow.Counts()
		exposure += f.escrow.Exposure()
		s.effects.Leases.Add(&before, &after)
		if fx.Invalid != "" && s.effects.Invalid == nil {
			s.effects.Invalid = invalid(usage.ReasonMalformed, "an ask of account %q, former limit %s: %s", s.name(x.key.account), f.name, fx.Invalid)
		}
		for _, a := range fx.Answers {
			a.Verdict, a.Room, a.Recall = lease.Ended, 0, 0
			s.answerOf(x, f.name, l, a)
		}
		// What has come back was not used: the calls that were taken for its use were
		// of the present name.
		for _, c := range f.escrow.Uncount() {
			x.entry.Outside -= c.Units
			x.entry.Counted = append(slices.Clip(x.entry.Counted), c)
		}
		f.entry, f.counted[0] = lease.Entry{}, lease.Counted{}
	}
	x.formers = slices.DeleteFunc(x.formers, func(f *former) bool { return f.escrow.Resting() && f.escrow.Loose() == 0 })
	x.reserve()
}

func (x *allowance) reserve() {
	units, exposure := x.forgotten, int64(0)
	for _, f := range x.formers {
		units, exposure = saturated(units, f.escrow.Loose()), saturated(exposure, f.escrow.Exposure())
	}
	x.escrow.Reserve(units, exposure)
}

// appendFormers appends what is held under former names, if anything ever was.
func (x *allowance) appendFormers(out []byte) []byte {
	if len(x.formers) == 0 && x.forgotten == 0 {
		return out
	}
	out = binary.AppendVarint(out, x.forgotten)
	for _, f := range x.formers {
		out = appendString(out, f.name)
		state := f.escrow.Append(nil)
		out = binary.AppendUvarint(out, uint64(len(state)))
		out = append(out, state...)
	}
	return out
}

func readFormers(data []byte, t lease.Terms) (formers []*former, forgotten int64, ok bool) {
	if len(data) == 0 {
		return nil, 0, true
	}
	r := reader{b: data}
	if forgotten = r.varint(); forgotten < 0 {
		return nil, 0, false
	}
	for len(r.b) > 0 && !r.bad {
		f := &former{name: r.string()}
		e, rest, err := lease.Read(r.bytes(), t)
		if err != nil || len(rest) != 0 || r.bad || len(formers) == maxFormers {
			return nil, 0, false
		}
		f.escrow = e
		formers = append(formers, f)
	}
	return formers, forgotten, !r.bad && len(formers)+int(min(forgotten, 1)) > 0
}
