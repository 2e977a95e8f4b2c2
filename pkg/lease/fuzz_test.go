package lease

import (
	"bytes"
	"testing"
)

// Whatever is read as a snapshot, reading it ends, and what comes of it is written as it
// was read and goes on.
func FuzzRead(f *testing.F) {
	d := &desk{e: NewEscrow(100, Terms{Term: second, Patience: 100 * ms, Horizon: 5 * second, MaxLeases: 8}), said: map[Gateway]Answer{}}
	whole := d.e.Append(nil)
	f.Add(whole)
	for n := range byte(3) {
		d.e.Apply(Entry{Sequence: uint64(n) + 1, Time: Micros(n), Ask: &Ask{Gateway: Gateway{n}, Seq: 1, Need: 40}, Counted: []Counted{{Gateway{0}, 3}}})
		f.Add(d.e.Append(nil))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		terms := Terms{Term: second, Patience: 100 * ms, ReleaseAfter: second, MaxExposure: 10, Horizon: 5 * second, MaxLeases: 8}
		e, _, err := Read(b, terms)
		if err != nil {
			return
		}
		if len(e.leases) > len(b)/len(Gateway{}) {
			t.Fatalf("%d leases in %d bytes", len(e.leases), len(b))
		}
		again, _, err := Read(e.Append(nil), terms)
		if err != nil || !bytes.Equal(again.Append(nil), e.Append(nil)) {
			t.Fatalf("it is written as something else: %v", err)
		}
		sequence := e.sequence
		for i, m := range []Ask{{Gateway: Gateway{9}, Seq: 1, Need: 3}, {Gateway: Gateway{}, Seq: 1 << 60, Need: 5, Want: 9}, LastWord(Gateway{1}, 0, 4, 0)} {
			for _, a := range e.Apply(Entry{Sequence: sequence + uint64(i) + 1, Time: e.now + 1, Ask: &m}).Answers {
				if a.Verdict > Ended {
					t.Fatalf("a verdict that there is not: %+v", a)
				}
			}
		}
		e.Due()
		e.State()
	})
}
