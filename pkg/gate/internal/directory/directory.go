// Package directory is a gateway's copy of the directory. All of it stands in memory
// as it came, some hundred bytes an account; what a call needs of it is worked out
// when an account is first asked for, and put into the table, which answers from then
// on. So a gateway that starts with a million accounts is ready as soon as it has
// read them, and pays for those that call.
package directory

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/tollkeeper/tollkeeper/pkg/gate/table"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	wire "github.com/tollkeeper/tollkeeper/pkg/ledger/directory"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// maxDepth of accounts: what the plans file allows.
const maxDepth = 16

// Directory answers who a caller is. Reset and Apply must not be called at once;
// ByKey and ByID may be called by any number of goroutines meanwhile.
type Directory struct {
	table *table.Table
	// write is the table's writers' lock; it guards what is below it, too.
	write *sync.Mutex
	state atomic.Pointer[state]

	sequence uint64 // of what is put into the table
	// unresolved accounts were asked for, and something on their path is still to come.
	unresolved map[string]struct{}
}

// state is all that the bucket says. It never changes.
type state struct {
	accounts, keys         [wire.Parts]*wire.Part
	plans                  map[string]*plan
	accountCount, keyCount int
}

type plan struct {
	leased   []table.LeasedLimit // without their account
	eventual bool
	counted  uint8 // table.AccountRecord has what it means
}

// New returns a directory that nothing is known of, in front of a table; write is
// held by all who change the table.
func New(t *table.Table, write *sync.Mutex) *Directory {
	d := &Directory{table: t, write: write, unresolved: make(map[string]struct{})}
	d.state.Store(&state{plans: make(map[string]*plan)})
	return d
}

// Size returns how many accounts and keys there are.
func (d *Directory) Size() (accounts, keys int) {
	s := d.state.Load()
	return s.accountCount, s.keyCount
}

// ByKey finds who owns the key with this hash. It takes no lock and does not
// allocate, except for the first time that an account is asked for.
func (d *Directory) ByKey(h *table.KeyHash) (table.Caller, table.Lookup) {
	c, found := d.table.ByKey(h)
	if found == table.Found && c.Account.Known() {
		return c, found
	}
	part := d.state.Load().keys[wire.KeyPart(*h)]
	if !part.Has(*h) {
		return c, found
	}
	d.write.Lock()
	defer d.write.Unlock()
	d.refreshKey(h)
	return d.table.ByKey(h)
}

// ByID finds an account. It takes no lock and does not allocate, except for the first
// time that the account is asked for.
func (d *Directory) ByID(id string) (*table.Account, table.Lookup) {
	a, found := d.table.ByID(id)
	if found == table.Found {
		return a, found
	}
	if _, ok := d.state.Load().account(id); !ok {
		return a, found
	}
	d.write.Lock()
	defer d.write.Unlock()
	d.refresh(id)
	if a, found := d.table.ByID(id); found == table.Found {
		return a, found
	}
	return nil, table.CannotTell // something on its path is still to come
}

func (s *state) account(id string) (wire.Account, bool) {
	return s.accounts[wire.AccountPart(id)].Account(id)
}

// resolve works out what the table has to know of an account; false when it is not
// there, or when something on its path is not.
func (s *state) resolve(id string) (r table.AccountRecord, ok bool) {
	r.ID = id
	for at := id; ; {
		a, ok := s.account(at)
		if !ok || len(r.Path) == maxDepth {
			return r, false
		}
		r.Path = append(r.Path, at)
		if at == id {
			r.Plan = a.Plan
		}
		if a.Plan != "" {
			p, ok := s.plans[a.Plan]
			if !ok {
				return r, false
			}
			r.Eventual, r.Counted = r.Eventual || p.eventual, r.Counted|p.counted
			for _, l := range p.leased {
				l.Account = at
				r.Leased = append(r.Leased, l)
			}
		}
		if a.Parent == "" {
			return r, true
		}
		at = a.Parent
	}
}

// refresh puts what holds of an account into the table.
func (d *Directory) refresh(id string) {
	d.sequence++
	s := d.state.Load()
	if r, ok := s.resolve(id); ok {
		r.Seq = d.sequence
		d.table.SetAccount(r)
		delete(d.unresolved, id)
		return
	}
	d.table.DeleteAccount(id, d.sequence)
	if _, there := s.account(id); there {
		d.unresolved[id] = struct{}{}
	} else {
		delete(d.unresolved, id)
	}
}

// refreshKey puts what holds of a key, and of its account, into the table.
func (d *Directory) refreshKey(h *table.KeyHash) {
	d.sequence++
	k, ok := d.state.Load().keys[wire.KeyPart(*h)].Key(*h)
	if !ok {
		d.table.DeleteKey(*h, d.sequence)
		return
	}
	d.table.SetKey(table.Key{Hash: *h, KeyID: k.ID, Account: k.Account, Seq: d.sequence})
	if a := d.table.Handle(k.Account); a == nil || !a.Known() {
		d.refresh(k.Account)
	}
}

// Reset replaces the whole directory. It returns what could not be read, by KV key;
// of that the old stays.
func (d *Directory) Reset(all []ledger.Change) map[string]error {
	old := d.state.Load()
	next := &state{plans: make(map[string]*plan)}
	bad := map[string]error{}
	for i := range all {
		if err := next.set(&all[i]); err != nil {
			bad[all[i].Key] = err
			next.keep(old, all[i].Key)
		}
	}
	d.replace(old, next, true)
	d.write.Lock()
	d.table.DirectoryRead()
	d.write.Unlock()
	return bad
}

// Apply takes one change.
func (d *Directory) Apply(c ledger.Change) error {
	old := d.state.Load()
	next := *old
	if err := next.set(&c); err != nil {
		return err
	}
	kind, _ := wire.ParseKey(c.Key)
	d.replace(old, &next, kind == wire.Plans)
	return nil
}

// set takes one record; a nil value is that of one that was deleted.
func (s *state) set(c *ledger.Change) error {
	kind, part := wire.ParseKey(c.Key)
	switch kind {
	case wire.Plans:
		plans, err := wire.ReadPlans(c.Value)
		if err != nil {
			return err
		}
		made := make(map[string]*plan, len(plans))
		for i := range plans {
			if made[plans[i].ID], err = readPlan(&plans[i]); err != nil {
				return err
			}
		}
		s.plans = made
	case wire.AccountsPart:
		p, err := wire.ReadAccounts(part, c.Value)
		if err != nil {
			return err
		}
		s.accountCount += p.Len() - s.accounts[part].Len()
		s.accounts[part] = p
	case wire.KeysPart:
		p, err := wire.ReadKeys(part, c.Value)
		if err != nil {
			return err
		}
		s.keyCount += p.Len() - s.keys[part].Len()
		s.keys[part] = p
	}
	return nil // of a newer writer
}

// keep takes over what another state has of a record.
func (s *state) keep(of *state, key string) {
	switch kind, part := wire.ParseKey(key); kind {
	case wire.Plans:
		s.plans = of.plans
	case wire.AccountsPart:
		s.accounts[part] = of.accounts[part]
		s.accountCount += of.accounts[part].Len()
	case wire.KeysPart:
		s.keys[part] = of.keys[part]
		s.keyCount += of.keys[part].Len()
	}
}

func readPlan(p *usage.Plan) (*plan, error) {
	out := &plan{}
	for _, l := range p.Limits {
		if m, builtIn := l.Meter.Index(); builtIn {
			out.counted |= 1 << m
		}
		if !l.Tier.Leased() {
			out.eventual = true
			continue
		}
		if l.ID == "" || !l.Meter.Valid() {
			return nil, fmt.Errorf("plan %q: %w", p.ID, errors.New("a limit has no name or meter"))
		}
		out.leased = append(out.leased, table.LeasedLimit{LimitID: p.ID + "/" + l.ID, Limit: l})
	}
	return out, nil
}

// lockedRefreshes is how many accounts are brought up to date under one hold of the
// lock: decisions must not wait for all of them.
const lockedRefreshes = 256

// replace makes next hold, and brings what the table has of it up to date.
func (d *Directory) replace(old, next *state, plans bool) {
	d.write.Lock()
	defer d.write.Unlock()
	d.state.Store(next)
	var keys []table.KeyHash
	var stale []string
	above := make(map[*table.Account]struct{})
	for part := range wire.Parts {
		if old.keys[part] != next.keys[part] {
			wire.Differ(old.keys[part], next.keys[part], func(h []byte) {
				if k := table.KeyHash(h); d.table.HasKey(&k) {
					keys = append(keys, k)
				}
			})
		}
		if old.accounts[part] == next.accounts[part] {
			continue
		}
		wire.Differ(old.accounts[part], next.accounts[part], func(id []byte) {
			a := d.table.Handle(string(id))
			if a == nil {
				return // nobody has asked for it
			}
			stale = append(stale, a.ID())
			if a.HasBelow() {
				above[a] = struct{}{}
			}
		})
	}
	if plans || len(above) > 0 {
		stale = append(stale, d.table.Below(func(a *table.Account) bool {
			_, ok := above[a]
			return ok || plans
		})...)
	}
	for id := range d.unresolved {
		stale = append(stale, id)
	}
	for i, id := range stale {
		if i%lockedRefreshes == lockedRefreshes-1 {
			d.write.Unlock()
			d.write.Lock()
		}
		d.refresh(id)
	}
	for i := range keys {
		d.refreshKey(&keys[i])
	}
}
