// Package torn tells what a crash leaves of a file that is only appended to from what
// damage does to it. Records are
//
//	record := length:4 crc:4 body
//
// with little-endian integers, CRC-32C over length and body, and length of the body.
package torn

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
)

const head = 4 + 4

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// End reports whether the end of a file, in which no whole record is, can be what a
// crash left of those that were being written: the beginning of one, behind it zeroes
// where the file had grown before its content. Else all of the record is there and it
// is not what was written: it was durable once, as far as anybody can know.
func End(rest []byte) bool {
	some := bytes.TrimRight(rest, "\x00")
	if len(some) < head {
		return true
	}
	if n := int64(binary.LittleEndian.Uint32(rest)); head+n <= int64(len(rest)) {
		// A whole one may end with a few zeroes of its own.
		return head+n > int64(len(some)) && len(rest)-len(some) >= head
	}
	// Cut, or its length is what is wrong.
	var length [4]byte
	binary.LittleEndian.PutUint32(length[:], uint32(len(rest)-head))
	sum := crc32.Update(crc32.Checksum(length[:], castagnoli), castagnoli, rest[head:])
	return sum != binary.LittleEndian.Uint32(rest[4:])
}
