package lease

import (
	"bytes"
	"encoding/binary"
	"errors"
)

// snapshotVersion is the first byte of an escrow that was written down.
const snapshotVersion = 1

var errSnapshot = errors.New("lease: this is not the snapshot of an escrow, or of another version")

// Append adds the escrow's state to b. The same state gives the same bytes, so
// that their hash tells whether two folds agree. Terms are not part of it: they
// come out of the ledger elsewhere.
func (e *Escrow) Append(b []byte) []byte {
	b = append(b, snapshotVersion)
	b = binary.AppendUvarint(b, e.sequence)
	b = binary.AppendUvarint(b, e.since)
	for _, n := range e.integers() {
		b = binary.AppendVarint(b, *n)
	}
	b = binary.AppendUvarint(b, uint64(len(e.leases)))
	for i := range e.leases {
		l := &e.leases[i]
		b = append(b, l.gateway[:]...)
		for _, n := range l.positions() {
			b = binary.AppendUvarint(b, *n)
		}
		for _, n := range l.integers() {
			b = binary.AppendVarint(b, *n)
		}
		flags := byte(l.verdict)
		for i, f := range l.flags() {
			if *f {
				flags |= 8 << i
			}
		}
		b = append(b, flags)
	}
	return b
}

func (e *Escrow) integers() []*int64 {
	c := &e.counts
	return []*int64{
		&e.amount, (*int64)(&e.now), &e.settled, &e.outstanding, &e.exposure,
		&c.Grants, &c.Granted, &c.Recalls, &c.Returned, &c.DeniedEarly, &c.DeniedFinal, &c.Released, &c.Above, &c.Late, &c.Lowered, &c.Duplicate, &c.Unknown,
	}
}

func (l *lease) positions() []*uint64 { return []*uint64{&l.seq, &l.seen, &l.waiting, &l.recall} }

func (l *lease) integers() []*int64 {
	return []*int64{
		&l.granted, &l.used, &l.returned, &l.over, &l.held, &l.released, &l.need, &l.want, &l.room,
		(*int64)(&l.expiry), (*int64)(&l.heard), (*int64)(&l.recallBy),
	}
}

func (l *lease) flags() []*bool { return []*bool{&l.lapsed, &l.silent, &l.closed} }

// Read returns the escrow that Append wrote at the beginning of b, and what of b
// comes after it. What it reads must be intact: the snapshot around it says so.
func Read(b []byte, t Terms) (*Escrow, []byte, error) {
	if len(b) == 0 || b[0] != snapshotVersion {
		return nil, nil, errSnapshot
	}
	r := reader{b: b[1:]}
	e := &Escrow{terms: t}
	e.sequence, e.since = r.uvarint(), r.uvarint()
	for _, n := range e.integers() {
		*n = r.varint()
	}
	count := r.uvarint()
	if count > uint64(len(r.b)/len(Gateway{})) {
		return nil, nil, errSnapshot
	}
	for range count {
		l := lease{gateway: r.gateway()}
		for _, n := range l.positions() {
			*n = r.uvarint()
		}
		for _, n := range l.integers() {
			*n = r.varint()
		}
		flags := r.byte()
		l.verdict = Verdict(flags & 7)
		for i, f := range l.flags() {
			*f = flags&(8<<i) != 0
		}
		if n := len(e.leases); n > 0 && bytes.Compare(e.leases[n-1].gateway[:], l.gateway[:]) >= 0 {
			r.bad = true
		}
		e.leases = append(e.leases, l)
	}
	if r.bad {
		return nil, nil, errSnapshot
	}
	return e, r.b, nil
}

type reader struct {
	b   []byte
	bad bool
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	return v * uint64(r.skip(n))
}

func (r *reader) varint() int64 {
	v, n := binary.Varint(r.b)
	return v * int64(r.skip(n))
}

func (r *reader) byte() byte {
	if len(r.b) == 0 {
		r.bad = true
		return 0
	}
	v := r.b[0]
	r.b = r.b[1:]
	return v
}

func (r *reader) gateway() (g Gateway) {
	n := copy(g[:], r.b)
	r.b = r.b[n:]
	r.bad = r.bad || n < len(g)
	return g
}

// skip goes on by n bytes and returns 1, or 0 when there was no number.
func (r *reader) skip(n int) int {
	if n <= 0 {
		r.bad = true
		return 0
	}
	r.b = r.b[n:]
	return 1
}
