package table

import (
	"slices"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Key is a record of the directory: whose API key it is.
type Key struct {
	Hash    KeyHash
	KeyID   string
	Account string
	// Seq is the position of the record in its stream.
	Seq uint64
}

// AccountRecord is a record of the directory: where an account belongs.
type AccountRecord struct {
	ID string
	// Path from the account itself up to its root, both included.
	Path []string
	Plan string
	// Leased are the limits on the path that calls are admitted by from leases.
	Leased []LeasedLimit
	// Eventual: there are limits of the other tier on the path.
	Eventual bool
	// Counted are the built-in meters that the limits on the path count, of any tier:
	// bit i is meter i.
	Counted uint8
	Seq     uint64
}

// LeasedLimit is a limit of the tiers exact and leased.
type LeasedLimit struct {
	Account string // of the path, which it belongs to
	LimitID string // "<plan>/<limit>"
	usage.Limit
}

// Keyed is a decision with the KV key it stands under.
type Keyed struct {
	Key string
	Seq uint64
	usage.Decision
}

// SetKey stores a key's record unless a newer one is there.
func (t *Table) SetKey(k Key) {
	old := t.keys.get(&k.Hash, hashKey(&k.Hash))
	if old != nil {
		if old.seq > k.Seq {
			return
		}
		old.account.keys--
	} else {
		t.keyCount.Add(1)
	}
	a := t.handle(k.Account)
	a.keys++
	t.keys.put(&cell[KeyHash]{key: k.Hash, account: a, keyID: &k.KeyID, seq: k.Seq})
}

// DeleteKey forgets a key unless a newer record is there.
func (t *Table) DeleteKey(h KeyHash, seq uint64) {
	old := t.keys.get(&h, hashKey(&h))
	if old == nil || old.seq > seq {
		return
	}
	old.account.keys--
	t.keyCount.Add(-1)
	t.keys.put(&cell[KeyHash]{key: h, seq: seq})
}

// SetAccount stores an account's record unless a newer one is there.
func (t *Table) SetAccount(r AccountRecord) {
	a := t.handle(r.ID)
	if a.record.Load() != nil && a.seq > r.Seq {
		return
	}
	t.setRecord(a, r)
}

func (t *Table) setRecord(a *Account, r AccountRecord) {
	if len(r.Path) == 0 || r.Path[0] != r.ID {
		r.Path = slices.Insert(slices.Clone(r.Path), 0, r.ID)
	}
	root := r.Path[len(r.Path)-1]
	rec := &record{plan: r.Plan, shard: &t.shards[t.lookup(root)]}
	for i, id := range r.Path {
		p := t.handle(id)
		if i < inlinePath {
			rec.path[i], rec.n = p, int32(i+1)
		} else {
			rec.rest = append(rec.rest, p)
		}
	}
	rec.eventual, rec.leases, rec.counted = r.Eventual, len(r.Leased) > 0, r.Counted
	for i := range r.Leased {
		d := t.draw(&r.Leased[i], rec.shard.number, r.Seq)
		rec.leased = append(rec.leased, d)
		rec.measured = rec.measured || d.Limit.Meter != usage.Calls
	}
	if len(rec.leased) == 1 && !rec.measured {
		if d := &rec.leased[0]; d.first {
			rec.only = d.owner
			if !d.plain {
				rec.filter = &d.Limit.Filter
			}
		}
	}
	if old := a.record.Load(); old == nil {
		t.accounts.Add(1)
	} else {
		old.leave(a)
	}
	for i := range int(rec.n) + len(rec.rest) {
		if p := rec.at(i); p != a {
			p.below++
		}
	}
	a.seq = r.Seq
	a.record.Store(rec)
}

// leave takes note that the record of a is not in use any more.
func (r *record) leave(a *Account) {
	for i := range int(r.n) + len(r.rest) {
		if p := r.at(i); p != a {
			p.below--
		}
	}
}

// Handle returns the account's handle, nil when nobody has asked for it. Writer only.
func (t *Table) Handle(id string) *Account {
	if c := t.ids.get(&id, t.hashID(&id)); c != nil {
		return c.account
	}
	return nil
}

// HasKey reports whether the key is in the table. Writer only.
func (t *Table) HasKey(h *KeyHash) bool { return t.keys.get(h, hashKey(h)) != nil }

// HasBelow reports whether the account is on the path of another. Writer only.
func (a *Account) HasBelow() bool { return a.below > 0 }

// Below returns the ids of all accounts with a record on whose path, themselves
// included, there is one that of chooses. Writer only.
func (t *Table) Below(of func(*Account) bool) []string {
	var ids []string
	t.ids.each(func(c *cell[string]) {
		r := c.account.record.Load()
		if r == nil {
			return
		}
		for i := range int(r.n) + len(r.rest) {
			if of(r.at(i)) {
				ids = append(ids, c.key)
				return
			}
		}
	})
	return ids
}

// DeleteAccount forgets an account's record unless a newer one is there. Its
// decisions stay, they come from another feed.
func (t *Table) DeleteAccount(id string, seq uint64) {
	c := t.ids.get(&id, t.hashID(&id))
	if c == nil || c.account.record.Load() == nil || c.account.seq > seq {
		return
	}
	c.account.record.Load().leave(c.account)
	c.account.record.Store(nil)
	t.accounts.Add(-1)
}

// handle returns the account's handle and makes it when there is none.
func (t *Table) handle(id string) *Account {
	if c := t.ids.get(&id, t.hashID(&id)); c != nil {
		return c.account
	}
	a := &Account{id: id}
	t.ids.put(&cell[string]{key: id, account: a})
	return a
}

// DirectoryRead says that the directory was read as a whole, and that the table has
// what holds of all that it had before.
func (t *Table) DirectoryRead() {
	t.purge()
	t.directoryMirror = mirror{loaded: true}
	t.directory.Store(true)
}

// purge drops the handles that nothing points to any more.
func (t *Table) purge() {
	onPath := make(map[*Account]struct{})
	t.ids.each(func(c *cell[string]) {
		if r := c.account.record.Load(); r != nil {
			for i := range int(r.n) + len(r.rest) {
				onPath[r.at(i)] = struct{}{}
			}
		}
	})
	var empty []string
	t.ids.each(func(c *cell[string]) {
		if _, ok := onPath[c.account]; !ok && c.account.keys == 0 && c.account.states == nil {
			empty = append(empty, c.key)
		}
	})
	for _, id := range empty {
		t.ids.put(&cell[string]{key: id})
	}
}

// DirectoryStale says that the directory may be behind from now on.
func (t *Table) DirectoryStale(now usage.Micros) { t.directoryMirror.goStale(now) }

// DecisionsStale says that the decisions may be behind from now on.
func (t *Table) DecisionsStale(now usage.Micros) { t.decisionsMirror.goStale(now) }

func (m *mirror) goStale(now usage.Micros) {
	if !m.stale {
		m.stale, m.since = true, now
	}
}

// Apply takes one decision and reports whether it changed anything: an older
// revision never replaces a newer one (law 6), nor an older change of the same
// key a newer one.
func (t *Table) Apply(k Keyed) bool {
	s := t.states[k.Key]
	if s == nil {
		s = &state{account: t.handle(k.Account)}
		s.next, s.account.states = s.account.states, s
		t.states[k.Key] = s
	} else if k.Revision < s.revision || k.Seq < s.seq {
		return false
	}
	s.set(&k)
	t.publish(s.account)
	return true
}

func (s *state) set(k *Keyed) {
	s.revision, s.seq, s.decision = k.Revision, k.Seq, nil
	if k.Verdict == usage.Deny || k.Verdict == usage.Warn {
		d := k.Decision
		d.Code = refusal(&d)
		s.decision = &d
	}
}

// refusal makes sure that a deny has a code that answers something.
func refusal(d *usage.Decision) usage.Code {
	if d.Verdict == usage.Deny && d.Code.Status() == 0 {
		return usage.QuotaExceeded
	}
	return d.Code
}

// Delete takes the deletion of a KV key. What it held is void; its revision is
// kept, so that nothing older comes back.
func (t *Table) Delete(key string, seq uint64) bool {
	s := t.states[key]
	if s == nil || seq < s.seq {
		return false
	}
	s.seq, s.decision = seq, nil
	t.publish(s.account)
	return true
}

// ResetDecisions replaces all decisions, except that for a key of which a newer
// revision is known that one stays.
func (t *Table) ResetDecisions(all []Keyed) {
	touched := make(map[*Account]struct{})
	old := t.states
	for _, s := range old {
		s.account.states = nil
		touched[s.account] = struct{}{}
	}
	t.states = make(map[string]*state, len(all))
	for i := range all {
		k := &all[i]
		if t.states[k.Key] != nil {
			continue // a bucket has a key once
		}
		s := old[k.Key]
		if s == nil || k.Revision >= s.revision {
			s = &state{account: t.handle(k.Account)}
			s.set(k)
		}
		s.next, s.account.states = s.account.states, s
		t.states[k.Key] = s
		touched[s.account] = struct{}{}
	}
	for a := range touched {
		t.publish(a)
	}
	t.decisionsMirror = mirror{loaded: true}
}

// publish shows readers what is held against an account after one of its
// decisions changed.
func (t *Table) publish(a *Account) {
	var list []*usage.Decision
	for s := a.states; s != nil; s = s.next {
		if s.decision != nil {
			list = append(list, s.decision)
		}
	}
	t.hold(a, list)
}

func (t *Table) hold(a *Account, list []*usage.Decision) {
	was := a.held.Load() != nil
	if len(list) == 0 {
		a.held.Store(nil)
	} else {
		slices.SortFunc(list, compare)
		a.held.Store(&list)
	}
	switch is := len(list) > 0; {
	case is && !was:
		t.exceptional.Add(1)
	case was && !is:
		t.exceptional.Add(-1)
	}
}
