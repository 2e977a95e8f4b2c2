package dedup

import (
	"bytes"
	"fmt"
	"math"
	"testing"

	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func producer(i int) Producer { return Producer{byte(i), byte(i >> 8), 1} }

// model is what a Set does, with maps that forget nothing but what must be.
type model struct {
	horizon usage.Micros
	numbers map[Producer]uint64
	closed  map[Producer]usage.Micros
	foreign map[EventID]usage.Micros
	now     usage.Micros
}

func (m *model) bucket(at usage.Micros) int64 {
	return int64(at) / ((int64(m.horizon)-1)/horizonBuckets + 1)
}

// TestASetDoesWhatAnUnlimitedMemoryWouldDo runs any sequence of frames, closings,
// foreign events and restarts from a snapshot against the model.
func TestASetDoesWhatAnUnlimitedMemoryWouldDo(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		horizon := usage.Micros(rapid.SampledFrom([]int64{1, 10, 24, 100, 1000}).Draw(t, "horizon"))
		s := New(horizon)
		m := &model{horizon: horizon, numbers: map[Producer]uint64{}, closed: map[Producer]usage.Micros{}, foreign: map[EventID]usage.Micros{}}
		// What is older than the horizon goes with the next entry that has a time.
		retire := func() {
			for p, at := range m.closed {
				if at+horizon < m.now {
					delete(m.closed, p)
					delete(m.numbers, p)
				}
			}
		}
		t.Repeat(map[string]func(*rapid.T){
			"frame": func(t *rapid.T) {
				p := producer(rapid.IntRange(0, 3).Draw(t, "producer"))
				last := m.numbers[p]
				number := rapid.OneOf(rapid.Just(last+1), rapid.Uint64Range(0, last+5), rapid.Just(last)).Draw(t, "number")
				v, skipped := s.Frame(p, number)
				switch {
				case number <= last:
					if v != Duplicate || skipped != 0 {
						t.Fatalf("frame %d after %d is %d, %d skipped; want Duplicate", number, last, v, skipped)
					}
				case number == last+1:
					if v != Fresh || skipped != 0 {
						t.Fatalf("frame %d after %d is %d, %d skipped; want Fresh", number, last, v, skipped)
					}
				default:
					if v != Gap || skipped != number-last-1 {
						t.Fatalf("frame %d after %d is %d, %d skipped; want Gap of %d", number, last, v, skipped, number-last-1)
					}
				}
				if number > last {
					m.numbers[p] = number
					delete(m.closed, p) // it was not its end
				}
			},
			"close": func(t *rapid.T) {
				p := producer(rapid.IntRange(0, 3).Draw(t, "producer"))
				s.Close(p, m.now)
				retire()
				if _, known := m.numbers[p]; known {
					if _, twice := m.closed[p]; !twice {
						m.closed[p] = m.now
					}
				}
				if s.Producers() != len(m.numbers) {
					t.Fatalf("%d producers, want %d", s.Producers(), len(m.numbers))
				}
			},
			"foreign": func(t *rapid.T) {
				id := ForeignID([]byte("a"), []byte("s"), []byte{byte(rapid.IntRange(0, 5).Draw(t, "event"))})
				retire()
				seen, known := m.foreign[id]
				// Remembered at least for the horizon, and less than a step longer.
				remembered := known && m.bucket(m.now)-m.bucket(seen) <= horizonBuckets
				if fresh := s.Foreign(id, m.now); fresh == remembered {
					t.Fatalf("an event of %d at %d, horizon %d: fresh is %v", seen, m.now, horizon, fresh)
				}
				if known && !remembered && m.now-seen < horizon {
					t.Fatalf("an event of %d is forgotten at %d, within the horizon %d", seen, m.now, horizon)
				}
				if !remembered {
					m.foreign[id] = m.now
				}
				if s.Producers() != len(m.numbers) {
					t.Fatalf("%d producers, want %d", s.Producers(), len(m.numbers))
				}
			},
			"time": func(t *rapid.T) {
				m.now += usage.Micros(rapid.Int64Range(0, 2*int64(horizon)).Draw(t, "passes"))
			},
			"restart": func(t *rapid.T) {
				data := s.AppendBinary([]byte("before"))
				again, rest, err := Read(append(data[len("before"):len(data):len(data)], "after"...))
				if err != nil || string(rest) != "after" {
					t.Fatalf("rest %q, %v", rest, err)
				}
				if !bytes.Equal(again.AppendBinary(nil), data[len("before"):]) {
					t.Fatal("a set that was read is written differently")
				}
				s = again
			},
		})
	})
}

func TestTwoSetsThatSawTheSameAreWrittenAlike(t *testing.T) {
	t.Parallel()
	write := func() []byte {
		s := New(1000)
		for i := range 500 {
			s.Frame(producer(i*7%500), uint64(i%3+1))
			s.Foreign(ForeignID(nil, nil, fmt.Append(nil, i)), usage.Micros(i))
		}
		for i := range 100 {
			s.Close(producer(i), 500)
		}
		return s.AppendBinary(nil)
	}
	want := write()
	for range 20 {
		if !bytes.Equal(write(), want) {
			t.Fatal("the order of a map is in the bytes")
		}
	}
}

func TestPartsOfAForeignIdentityDoNotRunIntoEachOther(t *testing.T) {
	t.Parallel()
	seen := map[EventID]string{}
	for _, parts := range [][3]string{{"ab", "c", "d"}, {"a", "bc", "d"}, {"a", "b", "cd"}, {"", "abc", "d"}, {"abcd", "", ""}, {"", "", "abcd"}, {"", "", ""}} {
		id := ForeignID([]byte(parts[0]), []byte(parts[1]), []byte(parts[2]))
		if other, twice := seen[id]; twice {
			t.Errorf("%q has the identity of %s", parts, other)
		}
		seen[id] = fmt.Sprintf("%q", parts)
	}
}

// The id of an admitted call is that call's, whichever program posts its event.
func TestAnAdmittedCallIsOneEventFromEverySource(t *testing.T) {
	t.Parallel()
	const of = "3MrEDyp8TjkFhH69mkMr4h9HDla"
	for id, one := range map[string]bool{
		usage.AdmittedRecordedPrefix + of: true, usage.AdmittedOpenPrefix + of: true,
		of: false, "admitted-" + of: false, usage.AdmittedOpenPrefix + of + "x": false, usage.AdmittedOpenPrefix + of[1:]: false,
		usage.AdmittedRecordedPrefix + of[1:] + "-": false, usage.AdmittedRecordedPrefix: false, "": false,
	} {
		a, b := ForeignID([]byte("acme"), []byte("/a"), []byte(id)), ForeignID([]byte("acme"), []byte("/b"), []byte(id))
		if (a == b) != one {
			t.Errorf("%q from two sources: one event %v", id, a == b)
		}
		if other := ForeignID([]byte("ada"), []byte("/a"), []byte(id)); other == a {
			t.Errorf("%q of two accounts is one event", id)
		}
	}
	if x, y := ForeignID(nil, nil, []byte(usage.AdmittedRecordedPrefix+of)), ForeignID(nil, nil, []byte(usage.AdmittedOpenPrefix+of)); x == y {
		t.Error("two ids are one event")
	}
}

// What a foreign event leaves behind must go, or a flood of them fills the
// memory for ever.
func TestForeignEventsAreForgottenAfterTheHorizon(t *testing.T) {
	t.Parallel()
	s := New(240)
	for i := range 10_000 {
		s.Foreign(ForeignID(nil, nil, fmt.Append(nil, i)), usage.Micros(i))
	}
	if n := s.ForeignEvents(); n > 260 {
		t.Errorf("%d events are remembered at a horizon of 240", n)
	}
	if n := len(s.buckets); n > horizonBuckets+1 {
		t.Errorf("%d buckets, at most %d", n, horizonBuckets+1)
	}
}

// The last producer of a set may close when no other ever does: it must still
// be forgotten.
func TestClosedProducersAreForgottenThoughNobodyElseCloses(t *testing.T) {
	t.Parallel()
	s := New(100)
	s.Frame(producer(1), 5)
	s.Close(producer(1), 1000)
	event := ForeignID(nil, nil, []byte("any"))
	s.Foreign(event, 1100)
	if s.Producers() != 1 {
		t.Error("it was forgotten within the horizon")
	}
	s.Foreign(event, 1101)
	if s.Producers() != 0 || len(s.closed) != 0 {
		t.Error("it is not forgotten after the horizon")
	}
}

// A producer that says it has closed and yet sends is no producer that may be
// forgotten: its next frame would pass as a gap, and its copies as new.
func TestAProducerThatSendsAfterItClosedIsNotForgotten(t *testing.T) {
	t.Parallel()
	s := New(100)
	s.Frame(producer(1), 5)
	s.Close(producer(1), 1000)
	if v, _ := s.Frame(producer(1), 6); v != Fresh {
		t.Fatalf("verdict %d", v)
	}
	s.Foreign(ForeignID(nil, nil, []byte("any")), 5000)
	if v, _ := s.Frame(producer(1), 6); v != Duplicate {
		t.Errorf("a copy of its last frame is %d, want Duplicate", v)
	}
}

func TestASnapshotThatIsCutOrBrokenIsRefused(t *testing.T) {
	t.Parallel()
	s := New(1000)
	for i := range 20 {
		s.Frame(producer(i), uint64(i+1))
		s.Foreign(ForeignID(nil, nil, []byte{byte(i)}), usage.Micros(i*100))
	}
	s.Close(producer(3), 5)
	data := s.AppendBinary(nil)
	for cut := range data {
		if _, _, err := Read(data[:cut]); err == nil {
			t.Fatalf("a snapshot of %d of %d bytes was read", cut, len(data))
		}
	}
	other := bytes.Clone(data)
	other[0] = 99
	if _, _, err := Read(other); err == nil {
		t.Error("an unknown version was read")
	}
}

func FuzzRead(f *testing.F) {
	s := New(1000)
	s.Frame(producer(1), 7)
	s.Frame(producer(2), math.MaxUint64)
	s.Close(producer(2), 3)
	s.Foreign(ForeignID(nil, nil, nil), 10)
	f.Add(s.AppendBinary(nil))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, rest, err := Read(data)
		if err != nil {
			return
		}
		written := s.AppendBinary(nil)
		again, none, err := Read(written)
		if err != nil || len(none) != 0 || !bytes.Equal(again.AppendBinary(nil), written) {
			t.Fatalf("what was read of %d bytes (rest %d) is not written and read alike: %v", len(data), len(rest), err)
		}
	})
}

func TestAnotherHorizonHoldsFromThenOn(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		horizons := rapid.SampledFrom([]int64{1, 10, 24, 100, 1000})
		horizon := usage.Micros(horizons.Draw(t, "horizon"))
		s := New(horizon)
		now := usage.Micros(0)
		seen := map[EventID]usage.Micros{}
		kept := map[EventID]usage.Micros{} // until when at least
		for i := range rapid.IntRange(1, 60).Draw(t, "steps") {
			now += usage.Micros(rapid.SampledFrom([]int64{0, 1, 5, 30, 200}).Draw(t, "pass"))
			if rapid.IntRange(0, 4).Draw(t, "change") == 0 {
				horizon = usage.Micros(horizons.Draw(t, "horizon"))
				s.SetHorizon(horizon, now)
				for id, at := range seen {
					if kept[id] = min(kept[id], at+horizon); kept[id] >= now {
						kept[id] = at + horizon // it was not forgotten
					}
				}
				data := s.AppendBinary(nil)
				read, rest, err := Read(data)
				if err != nil || len(rest) != 0 || !bytes.Equal(read.AppendBinary(nil), data) {
					t.Fatalf("a snapshot is read as something else: %v", err)
				}
				s = read
			}
			id := EventID{byte(rapid.IntRange(0, 5).Draw(t, "id"))}
			at, known := seen[id]
			isNew := s.Foreign(id, now)
			switch {
			case isNew && known && now <= kept[id]:
				t.Fatalf("step %d: an event of %d is new at %d, the horizon is %d", i, at, now, horizon)
			case !isNew && !known:
				t.Fatalf("step %d: an event that never was is none", i)
			case !isNew && now-at > 3*1000+3*48:
				t.Fatalf("step %d: an event of %d is remembered at %d", i, at, now)
			}
			if isNew {
				seen[id], kept[id] = now, now+horizon
			}
			if n := len(s.buckets); n > horizonBuckets+1 {
				t.Fatalf("%d buckets", n)
			}
		}
	})
}
