// Package audit is the arithmetic of the conservation audit: what is sent, what
// the ledger has, what the counters have and what the history has must be the
// same calls. It sums calls by account and minute, with a hash that does not
// depend on their order, and says where two points differ.
//
// # Row identity
//
// A call of a producer is identified by its frame and its place in it, a foreign
// event that stands in the ledger without a producer by (account, source, id).
// Mix is ClickHouse's intHash64, so that SQL comes to the same hashes:
//
//	producer = first 8 bytes, little endian, of SHA-256(the producer's ksuid in text form)
//	frame    = Mix(Mix(producer + shard) + number)
//	row      = Mix(frame + index)
//	foreign  = first 8 bytes, little endian, of SHA-256(len account, account, len source, source, len id, id)
//
// where a length is 8 bytes, big endian. Sums are modulo 2^64. A tally's hash is
// the sum of its rows': a missing row and a double one both change it, and one
// that stands for another does too.
//
// # Minute
//
// The minute of a call is that of its frame's sealing: it is stamped in the
// frame, the same wherever the frame comes by and however late. A call without a
// frame has the minute of the ledger's own time of its entry.
//
// # Claims
//
// A producer claims its frames on another way than the frames': which calls are
// in frames From to Through of a shard. What a claim names and the ledger does
// not have is a gap, what the ledger has beyond it is a double or somebody
// else's. Frames that nobody has claimed, because their producer was killed
// before it could, are unclaimed and no more.
//
// The package is pure: no goroutine, no clock, no I/O. Its values are not safe
// for concurrent use.
package audit
