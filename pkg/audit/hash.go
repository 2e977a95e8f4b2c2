package audit

import (
	"crypto/sha256"
	"encoding/binary"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
)

// Mix is ClickHouse's intHash64.
func Mix(x uint64) uint64 {
	x ^= 0x4CF2D2BAAE6DA887
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	x *= 0xc4ceb9fe1a85ec53
	return x ^ x>>33
}

// ProducerHash of a producer's ksuid in text form.
func ProducerHash(text string) uint64 {
	sum := sha256.Sum256([]byte(text))
	return binary.LittleEndian.Uint64(sum[:8])
}

// FrameHash of a producer's frame.
func FrameHash(producer uint64, shard uint32, number uint64) uint64 {
	return Mix(Mix(producer+uint64(shard)) + number)
}

// RowHash of the call at an index of a frame.
func RowHash(frame uint64, index int) uint64 { return Mix(frame + uint64(index)) }

// ForeignHash of an event without a producer.
func ForeignHash(account, source, id []byte) uint64 {
	return ForeignIDHash(dedup.ForeignID(account, source, id))
}

// ForeignIDHash is ForeignHash of an identity that is known already.
func ForeignIDHash(id dedup.EventID) uint64 { return binary.LittleEndian.Uint64(id[:8]) }
