package torn

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"testing"
)

func record(body []byte) []byte {
	r := binary.LittleEndian.AppendUint32(nil, uint32(len(body)))
	sum := crc32.Update(crc32.Checksum(r, castagnoli), castagnoli, body)
	return append(binary.LittleEndian.AppendUint32(r, sum), body...)
}

func TestWhatACrashLeavesIsAnEnd(t *testing.T) {
	t.Parallel()
	r := record([]byte("what was being written"))
	for cut := range r {
		for zeroes := range 99 {
			if zeroes > 0 && zeroes < head && cut+zeroes >= len(r) {
				continue // a few zeroes may be the record's own
			}
			if !End(append(bytes.Clone(r[:cut]), make([]byte, zeroes)...)) {
				t.Errorf("cut at %d, with %d zeroes behind it, is damage", cut, zeroes)
			}
		}
	}
}

func TestOneWrongBitOfAWholeRecordIsNoEnd(t *testing.T) {
	t.Parallel()
	for _, body := range []string{"what was written", "and ends with zeroes\x00\x00\x00"} {
		for bit := range 8 * len(record([]byte(body))) {
			r := record([]byte(body))
			r[bit/8] ^= 1 << (bit % 8)
			if End(r) {
				t.Errorf("%q: bit %d", body, bit)
			}
		}
	}
}
