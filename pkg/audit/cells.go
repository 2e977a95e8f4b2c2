package audit

import (
	"cmp"
	"iter"
	"maps"
	"slices"
)

// Cells are tallies by minute and account, at most a number of them: what comes
// for further accounts is summed up together, by minute.
type Cells struct {
	limit   int
	n       int
	minutes map[Minute]*column
}

// column holds the accounts of a minute.
type column struct {
	accounts map[string]*Tally
	other    Tally // of accounts beyond the limit
}

// NewCells returns no cells, which may become limit.
func NewCells(limit int) *Cells { return &Cells{limit: limit, minutes: map[Minute]*column{}} }

// Len is how many cells there are.
func (c *Cells) Len() int { return c.n }

// Empty reports whether nothing was counted.
func (c *Cells) Empty() bool { return len(c.minutes) == 0 }

// Minutes is how many minutes there are.
func (c *Cells) Minutes() int { return len(c.minutes) }

// At returns the cell of a minute and account to count in, or what stands for
// all that have none. It copies the account if it has to.
func (c *Cells) At(m Minute, account []byte) *Tally {
	col := c.column(m)
	if t := col.accounts[string(account)]; t != nil {
		return t
	}
	if c.n >= c.limit {
		return &col.other
	}
	t := &Tally{}
	col.accounts[string(account)] = t
	c.n++
	return t
}

// Others returns the tally of what a minute has beyond the limit.
func (c *Cells) Others(m Minute) *Tally { return &c.column(m).other }

func (c *Cells) column(m Minute) *column {
	col := c.minutes[m]
	if col == nil {
		col = &column{accounts: map[string]*Tally{}}
		c.minutes[m] = col
	}
	return col
}

// Get returns the tally of a minute and account; false when there is none.
func (c *Cells) Get(m Minute, account string) (Tally, bool) {
	if col := c.minutes[m]; col != nil {
		if t := col.accounts[account]; t != nil {
			return *t, true
		}
	}
	return Tally{}, false
}

// Cell is a tally with its place. Others says that it is of accounts beyond the
// limit.
type Cell struct {
	Minute  Minute
	Account string
	Others  bool
	Tally   Tally
}

// All yields every cell, in the order of minutes and accounts, others last.
func (c *Cells) All() iter.Seq[Cell] {
	return func(yield func(Cell) bool) {
		for _, m := range slices.Sorted(maps.Keys(c.minutes)) {
			col := c.minutes[m]
			for _, account := range slices.Sorted(maps.Keys(col.accounts)) {
				if !yield(Cell{Minute: m, Account: account, Tally: *col.accounts[account]}) {
					return
				}
			}
			if col.other != (Tally{}) && !yield(Cell{Minute: m, Others: true, Tally: col.other}) {
				return
			}
		}
	}
}

// Add counts a cell of others.
func (c *Cells) Add(x *Cell) {
	if x.Others {
		c.Others(x.Minute).Plus(&x.Tally)
		return
	}
	c.At(x.Minute, []byte(x.Account)).Plus(&x.Tally)
}

// Difference is where two points do not agree.
type Difference struct {
	Minute  Minute
	Account string
	// Others: it is somewhere among the accounts beyond the limit.
	Others    bool
	Kind      Kind
	Want, Got Tally
}

// Compare returns where got differs from want, in the order of minutes and
// accounts. Where one of them knows only the sum of some accounts, the other's
// sum of the same ones is compared.
func Compare(want, got *Cells) []Difference {
	var out []Difference
	minutes := map[Minute]bool{}
	for m := range want.minutes {
		minutes[m] = true
	}
	for m := range got.minutes {
		minutes[m] = true
	}
	for m := range minutes {
		out = compareMinute(out, m, want.minutes[m], got.minutes[m])
	}
	slices.SortFunc(out, func(a, b Difference) int {
		return cmp.Or(cmp.Compare(a.Minute, b.Minute), cmp.Compare(a.Account, b.Account))
	})
	return out
}

var nothing column

func compareMinute(out []Difference, m Minute, want, got *column) []Difference {
	if want == nil {
		want = &nothing
	}
	if got == nil {
		got = &nothing
	}
	wantOther, gotOther := want.other, got.other
	lumped := wantOther != (Tally{}) || gotOther != (Tally{})
	report := func(account string, others bool, w, g *Tally) {
		if *w != *g {
			out = append(out, Difference{Minute: m, Account: account, Others: others, Kind: KindOf(w, g), Want: *w, Got: *g})
		}
	}
	for account, w := range want.accounts {
		g := got.accounts[account]
		switch {
		case g != nil:
			report(account, false, w, g)
		case lumped:
			wantOther.Plus(w)
		default:
			report(account, false, w, &Tally{})
		}
	}
	for account, g := range got.accounts {
		if want.accounts[account] != nil {
			continue
		}
		if lumped {
			gotOther.Plus(g)
		} else {
			report(account, false, &Tally{}, g)
		}
	}
	report("", true, &wantOther, &gotOther)
	return out
}
