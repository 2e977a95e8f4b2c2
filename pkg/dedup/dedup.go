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
// that a retry with another time stamp is the same event.
func ForeignID(account, source, id []byte) EventID {
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
	producers map[Producer]uint64
	closed    []closing         // oldest first: retired, remembered for the horizon
	foreign   map[EventID]int64 // bucket of stream time in which it was seen
	buckets   []bucket          // oldest first, at most horizonBuckets+1
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
	return &Set{horizon: horizon, producers: map[Producer]uint64{}, foreign: map[EventID]int64{}}
}

// Horizon returns the horizon of foreign events in microseconds.
func (s *Set) Horizon() usage.Micros { return s.horizon }

// Producers returns how many producers are remembered.
func (s *Set) Producers() int { return len(s.producers) }

// ForeignEvents returns how many foreign events are remembered.
func (s *Set) ForeignEvents() int { return len(s.foreign) }

// Frame takes note of a producer's frame. skipped is how many numbers before
// it are missing (Gap).
func (s *Set) Frame(p Producer, number uint64) (v Verdict, skipped uint64) {
	last := s.producers[p]
	if number <= last {
		return Duplicate, 0
	}
	s.producers[p] = number
	if number > last+1 {
		return Gap, number - last - 1
	}
	return Fresh, 0
}

// Close retires a producer at stream time now: it has said that it will send
// nothing more on this shard. Its number is still remembered for the horizon,
// because a copy of its last frame may yet arrive, and then forgotten.
func (s *Set) Close(p Producer, now usage.Micros) {
	k := 0
	for k < len(s.closed) && s.closed[k].at+s.horizon < now {
		delete(s.producers, s.closed[k].producer)
		k++
	}
	s.closed = slices.Delete(s.closed, 0, k)
	if _, known := s.producers[p]; !known || slices.ContainsFunc(s.closed, func(c closing) bool { return c.producer == p }) {
		return
	}
	s.closed = append(s.closed, closing{p, now})
}

// Foreign takes note of a foreign event at stream time now (which never goes
// back) and reports whether it is new within the horizon.
func (s *Set) Foreign(id EventID, now usage.Micros) bool {
	width := max(int64(s.horizon)/horizonBuckets, 1)
	current := int64(now) / width
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
		out = binary.AppendUvarint(out, s.producers[p])
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

var errCut = errors.New("the snapshot of a de-duplication set is cut off")

// Read reads a set off the front of data and returns the rest.
func Read(data []byte) (*Set, []byte, error) {
	if len(data) == 0 {
		return nil, nil, errCut
	}
	if data[0] != version {
		return nil, nil, fmt.Errorf("the snapshot of a de-duplication set has version %d, known is %d", data[0], version)
	}
	data = data[1:]
	bad := false
	uvarint := func() uint64 {
		v, n := binary.Uvarint(data)
		if n <= 0 {
			bad = true
			return 0
		}
		data = data[n:]
		return v
	}
	varint := func() int64 {
		v, n := binary.Varint(data)
		if n <= 0 {
			bad = true
			return 0
		}
		data = data[n:]
		return v
	}
	s := New(usage.Micros(varint()))
	for n := uvarint(); n > 0 && !bad; n-- {
		if len(data) < 20 {
			return nil, nil, errCut
		}
		p := Producer(data[:20])
		data = data[20:]
		s.producers[p] = uvarint()
	}
	for n := uvarint(); n > 0 && !bad; n-- {
		if len(data) < 20 {
			return nil, nil, errCut
		}
		p := Producer(data[:20])
		data = data[20:]
		s.closed = append(s.closed, closing{p, usage.Micros(varint())})
	}
	for n := uvarint(); n > 0 && !bad; n-- {
		b := bucket{number: varint()}
		for k := uvarint(); k > 0 && !bad; k-- {
			if len(data) < 16 {
				return nil, nil, errCut
			}
			id := EventID(data[:16])
			data = data[16:]
			b.ids = append(b.ids, id)
			s.foreign[id] = b.number
		}
		s.buckets = append(s.buckets, b)
	}
	if bad {
		return nil, nil, errCut
	}
	return s, data, nil
}
