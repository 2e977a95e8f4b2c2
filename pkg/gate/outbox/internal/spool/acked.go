package spool

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/segmentio/ksuid"
)

// Beside a producer's segments is noted how far its frames are acknowledged, so that
// who finds them after a kill need not send those again:
//
//	file := slot…, one for every shard from 0 on
//	slot := number:8 sum:8
//
// Integers are little-endian, sum is the beginning of the SHA-256 of producer, shard
// and number: a slot that is not whole, was never written or is another file's says
// nothing, and then all of the shard is sent again. So it is not synced.
const (
	ackedFile = "acked"
	ackedSlot = 8 + 8
	// maxAcked bounds what is read of the file.
	maxAcked = 1 << 20
)

// Acked says that the frames of a shard up to a number are acknowledged.
type Acked struct {
	Shard  uint32
	Number uint64
}

func (a Acked) sum(producer ksuid.KSUID) [8]byte {
	var b [20 + 4 + 8]byte
	copy(b[:], producer[:])
	binary.LittleEndian.PutUint32(b[20:], a.Shard)
	binary.LittleEndian.PutUint64(b[24:], a.Number)
	whole := sha256.Sum256(b[:])
	return [8]byte(whole[:8])
}

// NoteAcked notes what is acknowledged; after an error some of it may not be noted.
func (l *Log) NoteAcked(notes []Acked) error {
	if l.noting == nil {
		f, err := os.OpenFile(filepath.Join(l.dir, ackedFile), os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			return fmt.Errorf("spool: %w", err)
		}
		l.noting = f
	}
	for _, a := range notes {
		at := int64(a.Shard) * ackedSlot
		if at+ackedSlot > maxAcked {
			continue // it would not be read
		}
		sum := a.sum(l.identity.Producer)
		slot := append(binary.LittleEndian.AppendUint64(nil, a.Number), sum[:]...)
		if _, err := l.noting.WriteAt(slot, at); err != nil {
			return fmt.Errorf("spool: %w", err)
		}
	}
	return nil
}

// Acked returns up to which number the frames of a shard were known to be acknowledged
// when the log was found; 0 when nothing is known.
func (l *Log) Acked(shard uint32) uint64 { return l.acked[shard] }

// readAcked takes over what was noted. What can't be read says nothing.
func (l *Log) readAcked() error {
	f, err := os.Open(filepath.Join(l.dir, ackedFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxAcked))
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	l.acked = make(map[uint32]uint64)
	for shard := uint32(0); len(data) >= ackedSlot; shard, data = shard+1, data[ackedSlot:] {
		a := Acked{shard, binary.LittleEndian.Uint64(data)}
		if sum := a.sum(l.identity.Producer); bytes.Equal(sum[:], data[8:ackedSlot]) {
			l.acked[shard] = a.Number
		}
	}
	return nil
}
