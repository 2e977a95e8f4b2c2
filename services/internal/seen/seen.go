// Package seen is what the ledger up to an entry says about the next one: what of
// it was there before, and how late it is.
package seen

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"math"
	"slices"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// Fold is what was seen of the ledger up to an entry. It is pure; two folds of the same entries are
// equal. Not safe for concurrent use.
type Fold struct {
	horizon usage.Micros
	shards  map[uint32]*Shard
	// high is the highest stream time seen.
	high usage.Micros
}

// Shard is what was seen of one shard.
type Shard struct {
	number  uint32
	set     *dedup.Set
	high    usage.Micros // of this shard's entries
	version uint32       // of the rules, by the ledger's word; 0: it has said none
}

// New returns a fold of nothing; horizon is that of foreign events (pkg/dedup).
func New(horizon usage.Micros) *Fold {
	return &Fold{horizon: horizon, shards: map[uint32]*Shard{}}
}

// High is the highest stream time seen.
func (f *Fold) High() usage.Micros { return f.high }

// Pass lets the stream's time pass with an entry and returns the shard.
func (f *Fold) Pass(shard uint32, at usage.Micros) *Shard {
	f.high = max(f.high, at)
	s := f.shards[shard]
	if s == nil {
		s = &Shard{number: shard, set: dedup.New(f.horizon)}
		f.shards[shard] = s
	}
	s.high = max(s.high, at)
	return s
}

// Fresh is what of a frame was not seen before.
type Fresh struct {
	Verdict dedup.Verdict
	Skipped uint64 // numbers missing before the frame
	// Keep names the rows in ascending order; nil is all of them.
	Keep []uint32
	// Foreign is how many rows were seen before.
	Foreign int
	// Invalid says that a call names no account.
	Invalid bool
}

// Calls takes note of a frame, by the rules of the aggregator (pkg/quota): a
// frame of a producer once by its number; in it, or without a producer, a row
// with a source and an event id once by these, whoever brought it; a frame that
// names no account somewhere not at all. Keep is appended to scratch.
func (s *Shard) Calls(f *ledger.Frame, scratch []uint32) Fresh {
	out := Fresh{Verdict: dedup.Fresh}
	if f.Producer != ksuid.Nil {
		out.Verdict, out.Skipped = s.set.Frame(dedup.Producer(f.Producer), f.Number)
		if out.Verdict == dedup.Duplicate {
			return out
		}
	}
	for _, account := range f.Account.Dict {
		if len(account) == 0 {
			out.Invalid = true
			return out
		}
	}
	if f.Source.Absent() || f.EventID.Absent() {
		return out
	}
	keep := scratch[:0]
	for i := range f.N {
		source, id := f.Source.At(i), f.EventID.At(i)
		if len(source) > 0 && len(id) > 0 && !s.set.Foreign(dedup.ForeignID(f.Account.At(i), source, id), s.high) {
			out.Foreign++
			continue
		}
		keep = append(keep, uint32(i))
	}
	if out.Foreign > 0 {
		if keep == nil {
			keep = []uint32{} // none; nil would be all
		}
		out.Keep = keep
	}
	return out
}

// Beyond says that a control entry of a shard begins a stretch whose rules this
// program does not know: what counts twice and what is remembered how long may be
// another thing there, so neither the entry nor what follows it in the shard may be
// folded. nil: it does not.
func Beyond(shard uint32, sequence uint64, e *tollkeeperv1.ControlEntry) *quota.NewerError {
	if c := e.GetCoreVersion(); c != nil {
		return quota.Newer(shard, sequence, c.GetVersion())
	}
	return nil
}

// Control takes note of a control entry that is not Beyond: a producer that has
// closed is forgotten after a while, an act counts once, and the ledger says itself
// how long foreign events are remembered.
func (s *Shard) Control(e *tollkeeperv1.ControlEntry) {
	if id := e.GetId(); id != "" && !s.set.Foreign(dedup.ForeignID(nil, []byte("control"), []byte(id)), s.high) {
		return
	}
	if closed := e.GetProducerClosed(); closed != nil && len(closed.GetProducer()) == len(dedup.Producer{}) {
		s.set.Close(dedup.Producer(closed.GetProducer()), s.high)
	}
	if c := e.GetCoreVersion(); c != nil {
		core := quota.Core{Version: c.GetVersion(), Horizon: usage.Micros(c.GetForeignHorizonMicros())}
		if core.Check() == nil {
			s.version = core.Version
			s.set.SetHorizon(core.Horizon, s.high)
		}
	}
}

const (
	foldMagic = "TKH2"
	// unversioned folds do not say by which rules a shard is folded.
	unversioned = "TKH1"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Marshal writes the fold of everything up to and including position, in the
// same bytes for equal folds.
func (f *Fold) Marshal(position uint64, ledgerID string) []byte {
	out := append([]byte(nil), foldMagic...)
	out = binary.AppendUvarint(out, uint64(len(ledgerID)))
	out = append(out, ledgerID...)
	out = binary.AppendUvarint(out, position)
	out = binary.AppendVarint(out, int64(f.high))
	out = binary.AppendVarint(out, int64(f.horizon))
	out = binary.AppendUvarint(out, uint64(len(f.shards)))
	for _, shard := range slices.Sorted(maps.Keys(f.shards)) {
		s := f.shards[shard]
		out = binary.AppendUvarint(out, uint64(shard))
		out = binary.AppendVarint(out, int64(s.high))
		out = binary.AppendUvarint(out, uint64(s.version))
		out = s.set.AppendBinary(out)
	}
	return binary.LittleEndian.AppendUint32(out, crc32.Checksum(out, castagnoli))
}

var errSnapshot = errors.New("the historian's snapshot cannot be read")

// Unmarshal reads what Marshal wrote. A *quota.NewerError says that a newer program
// did, by rules that this one does not know.
func Unmarshal(data []byte) (f *Fold, position uint64, ledgerID string, err error) {
	if len(data) < len(foldMagic)+4 || string(data[:len(foldMagic)]) != foldMagic && string(data[:len(foldMagic)]) != unversioned {
		return nil, 0, "", fmt.Errorf("%w: it does not begin with %s", errSnapshot, foldMagic)
	}
	versioned := string(data[:len(foldMagic)]) == foldMagic
	body, sum := data[:len(data)-4], binary.LittleEndian.Uint32(data[len(data)-4:])
	if crc32.Checksum(body, castagnoli) != sum {
		return nil, 0, "", fmt.Errorf("%w: its CRC-32C does not match its content", errSnapshot)
	}
	b := body[len(foldMagic):]
	cut := false
	uvarint := func() uint64 {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			cut = true
			return 0
		}
		b = b[n:]
		return v
	}
	varint := func() int64 {
		v, n := binary.Varint(b)
		if n <= 0 {
			cut = true
			return 0
		}
		b = b[n:]
		return v
	}
	n := uvarint()
	if cut || n > uint64(len(b)) {
		return nil, 0, "", fmt.Errorf("%w: it is cut off", errSnapshot)
	}
	ledgerID, b = string(b[:n]), b[n:]
	position = uvarint()
	f = &Fold{shards: map[uint32]*Shard{}, high: usage.Micros(varint())}
	f.horizon = usage.Micros(varint())
	for n := uvarint(); n > 0 && !cut; n-- {
		shard := uvarint()
		s := &Shard{number: uint32(shard), high: usage.Micros(varint())}
		version := uint64(0)
		if versioned {
			version = uvarint()
		}
		if cut || shard >= ledger.MaxShards || version > math.MaxUint32 {
			cut = true
			break
		}
		s.version = uint32(version)
		if newer := quota.Newer(s.number, 0, s.version); newer != nil {
			return nil, 0, "", newer
		}
		if s.set, b, err = dedup.Read(b); err != nil {
			return nil, 0, "", fmt.Errorf("%w: %w", errSnapshot, err)
		}
		f.shards[uint32(shard)] = s
	}
	if cut || len(b) != 0 {
		return nil, 0, "", fmt.Errorf("%w: it is cut off", errSnapshot)
	}
	return f, position, ledgerID, nil
}
