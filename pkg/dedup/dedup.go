// Package dedup decides which entries of a shard have been seen before: frames
// by producer and number, exactly and without limit in time; foreign events by
// (account, source, id) within a horizon of stream time. It is a pure fold of
// the shard: no clock, no I/O; two sets that saw the same entries are equal.
package dedup

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// DefaultHorizon of foreign events, microseconds: a day.
const DefaultHorizon = usage.Micros(24 * 3600 * 1_000_000)

// horizonBuckets is in how many steps foreign ids are forgotten.
const horizonBuckets = 24

// Producer identifies a producer (a ksuid's bytes).
type Producer [20]byte

// EventID identifies a foreign event.
type EventID [16]byte

// ForeignID returns the identity of a foreign event. Its parts are length-
// prefixed, so that no two triples give the same input; it holds no time, so
// that a retry with another time stamp is the same event. An id that a gateway gave to an
// admitted call is one call's, whatever source its event names: so the source is not part
// of that identity.
func ForeignID(account, source, id []byte) EventID {
	if admitted, _ := usage.AdmittedEvent(id); admitted {
		source = nil
	}
	h := sha256.New()
	var n [8]byte
	for _, part := range [...][]byte{account, source, id} {
		binary.BigEndian.PutUint64(n[:], uint64(len(part)))
		_, _ = h.Write(n[:]) // hash.Hash never fails
		_, _ = h.Write(part)
	}
	return EventID(h.Sum(nil)[:16])
}

// Verdict on a frame.
type Verdict uint8

// The verdicts on a frame.
const (
	// Fresh: count it.
	Fresh Verdict = iota + 1
	// Duplicate: it has been counted.
	Duplicate
	// Gap: count it, and alarm: numbers before it were skipped.
	Gap
)

// Set is what one shard has seen. The zero value is not usable; see New. Not
// safe for concurrent use.
type Set struct {
	horizon   usage.Micros
	producers map[Producer]state
	closed    []closing         // oldest first: retired, remembered for the horizon
	foreign   map[EventID]int64 // bucket of stream time in which it was seen
	buckets   []bucket          // oldest first, at most horizonBuckets+1
}

type state struct {
	number uint64
	closed bool // it is in the set's list
}

type closing struct {
	producer Producer
	at       usage.Micros
}

type bucket struct {
	number int64
	ids    []EventID
}

// New returns an empty set with the given horizon of foreign events in
// microseconds; DefaultHorizon when it is not positive.
func New(horizon usage.Micros) *Set {
	if horizon <= 0 {
		horizon = DefaultHorizon
	}
	return &Set{horizon: horizon, producers: map[Producer]state{}, foreign: map[EventID]int64{}}
}

// Horizon returns the horizon of foreign events in microseconds.
func (s *Set) Horizon() usage.Micros { return s.horizon }

// SetHorizon changes the horizon (microseconds, positive) at stream time now.
// What was forgotten stays so; what is remembered is kept no shorter than the
// new horizon says.
func (s *Set) SetHorizon(horizon, now usage.Micros) {
	before := s.width()
	s.horizon = horizon
	width := s.width()
	if width == before {
		return
	}
	current := int64(now) / width
	var buckets []bucket
	for _, b := range s.buckets {
		// As if all of it had been seen at its end.
		number := min(((b.number+1)*before-1)/width, current)
		if n := len(buckets); n == 0 || buckets[n-1].number < number {
			buckets = append(buckets, bucket{number: number})
		}
		last := &buckets[len(buckets)-1]
		last.ids = append(last.ids, b.ids...)
		for _, id := range b.ids {
			s.foreign[id] = number
		}
	}
	s.buckets = buckets
	s.forget(current - horizonBuckets)
	s.retire(now)
}

// Closed reports whether the producer has said that it sends nothing more, and
// is remembered for that.
func (s *Set) Closed(p Producer) bool { return s.producers[p].closed }

// Producers returns how many producers are remembered.
func (s *Set) Producers() int { return len(s.producers) }

// ForeignEvents returns how many foreign events are remembered.
func (s *Set) ForeignEvents() int { return len(s.foreign) }

// Last returns the highest number of a producer that was seen; 0 for one that is
// not remembered.
func (s *Set) Last(p Producer) uint64 { return s.producers[p].number }

// Frame takes note of a producer's frame. skipped is how many numbers before
// it are missing (Gap).
func (s *Set) Frame(p Producer, number uint64) (v Verdict, skipped uint64) {
	known := s.producers[p]
	last := known.number
	if number <= last {
		return Duplicate, 0
	}
	if known.closed {
		// It was not its end: forgotten, it would be counted twice.
		s.closed = slices.DeleteFunc(s.closed, func(c closing) bool { return c.producer == p })
	}
	s.producers[p] = state{number: number}
	if number > last+1 {
		return Gap, number - last - 1
	}
	return Fresh, 0
}

// Close retires a producer at stream time now: it has said that it will send
// nothing more on this shard. Its number is still remembered for the horizon,
// because a copy of its last frame may yet arrive, and then forgotten at the
// next Close or Foreign. One that sends all the same is not retired.
func (s *Set) Close(p Producer, now usage.Micros) {
	s.retire(now)
	known, found := s.producers[p]
	if !found || known.closed {
		return
	}
	known.closed = true
	s.producers[p] = known
	s.closed = append(s.closed, closing{p, now})
}

func (s *Set) retire(now usage.Micros) {
	k := 0
	for k < len(s.closed) && now-s.closed[k].at > s.horizon {
		delete(s.producers, s.closed[k].producer)
		k++
	}
	s.closed = slices.Delete(s.closed, 0, k)
}

// width of a bucket: horizonBuckets of them are never less than the horizon.
func (s *Set) width() int64 { return (int64(s.horizon)-1)/horizonBuckets + 1 }

// Foreign takes note of a foreign event at stream time now (which never goes
// back) and reports whether it is new within the horizon.
func (s *Set) Foreign(id EventID, now usage.Micros) bool {
	s.retire(now)
	current := int64(now) / s.width()
	s.forget(current - horizonBuckets)
	if _, seen := s.foreign[id]; seen {
		return false
	}
	s.foreign[id] = current
	if n := len(s.buckets); n == 0 || s.buckets[n-1].number < current {
		s.buckets = append(s.buckets, bucket{number: current})
	}
	last := &s.buckets[len(s.buckets)-1]
	last.ids = append(last.ids, id)
	return true
}

func (s *Set) forget(before int64) {
	k := 0
	for k < len(s.buckets) && s.buckets[k].number < before {
		for _, id := range s.buckets[k].ids {
			delete(s.foreign, id)
		}
		k++
	}
	s.buckets = slices.Delete(s.buckets, 0, k)
}

const version = 1

// AppendBinary appends the set in a form that is the same for equal sets.
func (s *Set) AppendBinary(out []byte) []byte {
	out = append(out, version)
	out = binary.AppendVarint(out, int64(s.horizon))
	producers := make([]Producer, 0, len(s.producers))
	for p := range s.producers {
		producers = append(producers, p)
	}
	slices.SortFunc(producers, func(a, b Producer) int { return bytes.Compare(a[:], b[:]) })
	out = binary.AppendUvarint(out, uint64(len(producers)))
	for _, p := range producers {
		out = append(out, p[:]...)
		out = binary.AppendUvarint(out, s.producers[p].number)
	}
	out = binary.AppendUvarint(out, uint64(len(s.closed)))
	for _, c := range s.closed {
		out = append(out, c.producer[:]...)
		out = binary.AppendVarint(out, int64(c.at))
	}
	out = binary.AppendUvarint(out, uint64(len(s.buckets)))
	for _, b := range s.buckets {
		out = binary.AppendVarint(out, b.number)
		out = binary.AppendUvarint(out, uint64(len(b.ids)))
		for _, id := range b.ids {
			out = append(out, id[:]...)
		}
	}
	return out
}

var (
	errCut    = errors.New("the snapshot of a de-duplication set is cut off")
	errBroken = errors.New("the snapshot of a de-duplication set is not one that a set writes")
)

// Read reads a set off the front of data and returns the rest.
func Read(data []byte) (*Set, []byte, error) {
	r := reader{b: data}
	if v := r.bytes(1); r.err == nil && v[0] != version {
		return nil, nil, fmt.Errorf("the snapshot of a de-duplication set has version %d, known is %d", v[0], version)
	}
	horizon := usage.Micros(r.varint())
	r.check(horizon > 0)
	s := New(horizon)
	var before []byte
	for n := r.uvarint(); n > 0 && r.err == nil; n-- {
		p := r.bytes(len(Producer{}))
		number := r.uvarint()
		if r.check(bytes.Compare(before, p) < 0); r.err == nil {
			s.producers[Producer(p)] = state{number: number}
		}
		before = p
	}
	for n := r.uvarint(); n > 0 && r.err == nil; n-- {
		p := r.bytes(len(Producer{}))
		at := usage.Micros(r.varint())
		if r.err != nil {
			break
		}
		known, found := s.producers[Producer(p)]
		r.check(found && !known.closed)
		known.closed = true
		s.producers[Producer(p)] = known
		s.closed = append(s.closed, closing{Producer(p), at})
	}
	for n := r.uvarint(); n > 0 && r.err == nil; n-- {
		b := bucket{number: r.varint()}
		k := len(s.buckets)
		r.check(k <= horizonBuckets && (k == 0 || s.buckets[k-1].number < b.number))
		for m := r.uvarint(); m > 0 && r.err == nil; m-- {
			p := r.bytes(len(EventID{}))
			if r.err != nil {
				break
			}
			id := EventID(p)
			_, twice := s.foreign[id]
			r.check(!twice)
			b.ids = append(b.ids, id)
			s.foreign[id] = b.number
		}
		r.check(len(b.ids) > 0)
		s.buckets = append(s.buckets, b)
	}
	if r.err != nil {
		return nil, nil, r.err
	}
	return s, r.b, nil
}

// reader takes values off a byte slice; after the first failure err is set and
// everything it returns is zero.
type reader struct {
	b   []byte
	err error
}

func (r *reader) check(ok bool) {
	if !ok && r.err == nil {
		r.err = errBroken
	}
}

func (r *reader) bytes(n int) []byte {
	if r.err != nil || n > len(r.b) {
		r.cut()
		return nil
	}
	v := r.b[:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if r.err != nil || n <= 0 {
		r.cut()
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) varint() int64 {
	v, n := binary.Varint(r.b)
	if r.err != nil || n <= 0 {
		r.cut()
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) cut() {
	if r.err == nil {
		r.err = errCut
	}
}
