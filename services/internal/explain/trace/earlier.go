package trace

// By the rules from version 3 on a limit starts from what its account used in the window
// before the limit was there: at once where the state proves how much that is, otherwise
// with an entry that the shard's owner appends. The calls of that time are kept beside
// those that fed the counter, until the counter takes them in.

// earlier is what would have fed the counter while there was none.
type earlier struct {
	fed   Fed
	total int64
	rows  ring
}

// add notes a call, or a control entry, that would have fed the counter. A counter does
// not fall below 0.
func (e *earlier) add(row Row, kept bool) {
	if row.Adds = max(row.Adds, -e.total); row.Adds == 0 && row.Index < 0 {
		return
	}
	if e.fed.Since == 0 {
		e.fed.Since = row.Sequence
	}
	if row.Index < 0 {
		e.fed.Adjusted += row.Adds
	} else {
		e.fed.Calls, e.fed.Used = e.fed.Calls+1, e.fed.Used+row.Adds
	}
	e.total += row.Adds
	if row.After = e.total; kept {
		e.rows.add(row)
	}
}

// noteEarlier notes what an entry would have added to the counter.
func (t *Trace) noteEarlier(sequence uint64, rows []row, correction int64) {
	if correction != 0 {
		rows = append(rows, row{index: -1, adds: correction})
	}
	for _, r := range rows {
		p := Position{sequence, r.index}
		t.earlier.add(Row{Position: p, Adds: r.adds}, p.Less(t.o.Below))
	}
}

// setAside has what fed the counter be of before there was one: another begins.
func (t *Trace) setAside() {
	if t.After == 0 && t.Fed.Calls == 0 {
		return
	}
	e := &t.earlier
	t.join(&e.rows, e.total)
	e.fed = together(e.fed, t.Fed)
	e.total += t.After
}

// takeEarlier puts what was noted before what fed the counter, if it is what the counter
// was given; false: it is not. Calls before a snapshot were not noted.
func (t *Trace) takeEarlier(found int64) bool {
	e := &t.earlier
	carried := found - e.total
	if carried != 0 && (carried < 0 || !t.within) {
		return false
	}
	e.fed.Carried += carried
	for i := range e.rows.rows {
		e.rows.rows[i].After += carried
	}
	t.join(&e.rows, found)
	t.rows, e.rows = e.rows, t.rows
	t.Fed = together(e.fed, t.Fed)
	e.rows.clear()
	e.fed, e.total = Fed{}, 0
	return true
}

// join appends the rows that fed the counter to those of before.
func (t *Trace) join(before *ring, by int64) {
	rows := t.rows.all()
	if t.rows.dropped {
		before.clear()
		before.dropped = true
	}
	for _, r := range rows {
		r.After += by
		before.add(r)
	}
}

// together are two parts of a counter, the earlier first.
func together(a, b Fed) Fed {
	if a.Since == 0 {
		a.Since = b.Since
	}
	a.Calls, a.Used, a.Carried, a.Adjusted = a.Calls+b.Calls, a.Used+b.Used, a.Carried+b.Carried, a.Adjusted+b.Adjusted
	a.Reported, a.Unexplained = b.Reported, a.Unexplained+b.Unexplained
	return a
}
