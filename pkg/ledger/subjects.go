// Package ledger is the only place that knows the wire: subjects, streams,
// frames, identities, and how to read and append.
package ledger

import (
	"fmt"
	"hash/fnv"
	"strconv"
	"strings"
)

// Names of streams, buckets and subjects (schemas/streams.json).
const (
	Stream           = "LEDGER"
	DecisionsBucket  = "decisions"
	DirectoryBucket  = "directory"
	ConfigBucket     = "config"
	HistorianBucket  = "historian"
	AlerterBucket    = "alerter"
	SnapshotsBucket  = "snapshots"
	DeadLetterStream = "DEADLETTER"
	AlertsStream     = "ALERTS"

	beaconPrefix = "beacon."
	// AllCalls, AllControl, AllLeases, AllClosings match every shard.
	AllCalls    = "calls.*"
	AllControl  = "control.*"
	AllLeases   = "leases.*"
	AllClosings = "closings.*"
	AllBeacons  = beaconPrefix + "*"
)

// DefaultShards is the number of shards of a clustered ledger. One machine
// does better with fewer, fuller frames: see DefaultLocalShards.
const (
	DefaultShards      = 64
	DefaultLocalShards = 8
	MaxShards          = 1024
)

// CallsSubject is where the frames of a shard are appended.
func CallsSubject(shard uint32) string { return "calls." + strconv.FormatUint(uint64(shard), 10) }

// ControlSubject is where the control entries of a shard are appended.
func ControlSubject(shard uint32) string { return "control." + strconv.FormatUint(uint64(shard), 10) }

// LeasesSubject is where the lease entries of a shard are appended.
func LeasesSubject(shard uint32) string { return "leases." + strconv.FormatUint(uint64(shard), 10) }

// ClosingsSubject is where producers are retired on a shard. It is not
// ControlSubject, so that who may say that it has come to its end (every gateway)
// need not have the right to change plans, accounts and counters.
func ClosingsSubject(shard uint32) string { return "closings." + strconv.FormatUint(uint64(shard), 10) }

// BeaconSubject is where the owner of a shard says how far it is (core NATS,
// not stored).
func BeaconSubject(shard uint32) string {
	return beaconPrefix + strconv.FormatUint(uint64(shard), 10)
}

// ShardSubjects are the subjects that together order all that decides for the
// accounts of a shard.
func ShardSubjects(shard uint32) []string {
	return []string{CallsSubject(shard), ControlSubject(shard), LeasesSubject(shard), ClosingsSubject(shard)}
}

// Kind of a ledger entry.
type Kind uint8

// The kinds of entries.
const (
	KindCalls Kind = iota + 1
	KindControl
	KindLease
	KindClosing
)

// ParseSubject returns the kind and shard of a ledger subject.
func ParseSubject(subject string) (Kind, uint32, error) {
	prefix, rest, ok := strings.Cut(subject, ".")
	n, err := strconv.ParseUint(rest, 10, 32)
	// "calls.07" is not read by the reader of "calls.7".
	if !ok || err != nil || n >= MaxShards || len(rest) > 1 && rest[0] == '0' {
		return 0, 0, fmt.Errorf("%q is not a ledger subject", subject)
	}
	switch prefix {
	case "calls":
		return KindCalls, uint32(n), nil
	case "control":
		return KindControl, uint32(n), nil
	case "leases":
		return KindLease, uint32(n), nil
	case "closings":
		return KindClosing, uint32(n), nil
	}
	return 0, 0, fmt.Errorf("%q is not a ledger subject", subject)
}

// ShardOf returns the shard of a root account among n shards. It is FNV-1a
// (64 bit) modulo n and never changes: a ledger's shard count is fixed when
// it is made.
func ShardOf(root string, n uint32) uint32 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(root)) // hash.Hash never fails
	return uint32(h.Sum64() % uint64(n))
}

// KeyToken writes any id as one token of a subject or KV key: letters, digits,
// '_' and '-' stand for themselves, every other byte is "=XX" in hex.
func KeyToken(id string) string {
	const hexDigits = "0123456789ABCDEF"
	var b strings.Builder
	for i := 0; i < len(id); i++ {
		c := id[i]
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '_', c == '-':
			b.WriteByte(c)
		default:
			b.WriteByte('=')
			b.WriteByte(hexDigits[c>>4])
			b.WriteByte(hexDigits[c&15])
		}
	}
	return b.String()
}

// DecisionKey is the KV key of a decision: "<shard>.<account>.<limit>".
func DecisionKey(shard uint32, account, limitID string) string {
	return strconv.FormatUint(uint64(shard), 10) + "." + KeyToken(account) + "." + KeyToken(limitID)
}

// CheckpointKey is the KV key of a shard's checkpoint in the decisions bucket.
func CheckpointKey(shard uint32) string {
	return "checkpoint." + strconv.FormatUint(uint64(shard), 10)
}
