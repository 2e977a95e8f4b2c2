package lease

import (
	"bytes"
	"encoding/binary"
	"errors"
)

// snapshotVersion is the first byte of an escrow that was written down.
const snapshotVersion = 2

var errSnapshot = errors.New("lease: this is not the snapshot of an escrow, or of another version")

// Append adds the escrow's state to b. The same state gives the same bytes, so
// that their hash tells whether two folds agree. Terms are not part of it: they
// come out of the ledger elsewhere.
func (e *Escrow) Append(b []byte) []byte {
	b = append(b, snapshotVersion)
	b = binary.AppendUvarint(b, e.sequence)
	b = binary.AppendUvarint(b, e.since)
	for _, n := range e.integers() {
		b = binary.AppendUvarint(b, uint64(*n))
	}
	b = binary.AppendUvarint(b, uint64(len(e.leases)))
	for i := range e.leases {
		l := &e.leases[i]
		b = append(b, l.gateway[:]...)
		for _, n := range l.positions() {
			b = binary.AppendUvarint(b, *n)
		}
		for _, n := range l.integers() {
			b = binary.AppendUvarint(b, uint64(*n))
		}
		flags := uint64(l.verdict)
		for i, f := range l.flags() {
			if *f {
				flags |= 8 << i
			}
		}
		b = binary.AppendUvarint(b, flags)
	}
	return b
}

func (e *Escrow) integers() []*int64 {
	all := []*int64{&e.amount, (*int64)(&e.now), &e.settled, &e.outstanding, &e.exposure}
	counts := e.counts.fields()
	return append(all, counts[:]...)
}

func (l *lease) positions() []*uint64 { return []*uint64{&l.seq, &l.seen, &l.waiting, &l.recall} }

func (l *lease) integers() []*int64 {
	return []*int64{
		&l.granted, &l.used, &l.returned, &l.over, &l.said, &l.beyond, &l.counted, &l.held, &l.released, &l.need, &l.want, &l.room,
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
	b = b[1:]
	bad := false
	number := func() uint64 {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			bad = true
			return 0
		}
		b = b[n:]
		return v
	}
	e := &Escrow{terms: t, sequence: number(), since: number()}
	for _, n := range e.integers() {
		*n = int64(number())
	}
	for range min(number(), uint64(len(b)/len(Gateway{}))+1) {
		var l lease
		n := copy(l.gateway[:], b)
		b = b[n:]
		for _, n := range l.positions() {
			*n = number()
		}
		for _, n := range l.integers() {
			*n = int64(number())
		}
		flags := number()
		l.verdict = Verdict(flags & 7)
		bad = bad || l.verdict > Ended || flags>>(3+len(l.flags())) != 0
		for i, f := range l.flags() {
			*f = flags&(8<<i) != 0
		}
		if n := len(e.leases); n > 0 && bytes.Compare(e.leases[n-1].gateway[:], l.gateway[:]) >= 0 {
			bad = true // out of order: it would not be found
		}
		e.leases = append(e.leases, l)
	}
	if bad {
		return nil, nil, errSnapshot
	}
	return e, b, nil
}
