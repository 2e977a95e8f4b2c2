// Package spool keeps frames on disk: one directory a producer, in it segment
// files of records in the order they were appended. What Append has returned
// is on disk (fsync); a record that a crash cut is found by its CRC, and so is one
// that was damaged since, which hides nothing that is behind it.
//
//	segment := "TKS1" producer:20 number:8 crc:4
//	record  := length:4 crc:4 shard:4 number:8 calls:4 at:8 frame
//
// Integers are little-endian, crc is CRC-32C, that of a record over its length
// and all that follows, length counts what follows the crc.
package spool

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/internal/place"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/internal/torn"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/marks"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

const (
	magic         = "TKS1"
	segmentHeader = 4 + 20 + 8 + 4
	recordHeader  = 4 + 4
	recordFixed   = 4 + 8 + 4 + 8
	maxRecord     = 2 << 20
	// DefaultSegmentBytes is from which size on a segment is followed by another.
	DefaultSegmentBytes = 16 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var (
	// ErrInUse says that another process has the directory.
	ErrInUse = errors.New("the spool directory is in use")
	// ErrFull says that the spool has reached its bound.
	ErrFull = errors.New("the spool has reached its bound")
	// ErrGone says that the directory, or a file in it, is not where it was.
	ErrGone = place.ErrGone
)

// Record is a frame in the spool.
type Record struct {
	Shard  uint32
	Number uint64
	Calls  uint32
	At     usage.Micros
	Data   []byte
}

func (r *Record) size() int64 { return recordHeader + recordFixed + int64(len(r.Data)) }

// Position of a record; segments are numbered from 1.
type Position struct {
	Segment uint64
	Offset  int64
}

// Identity is what a producer's directory says of it.
type Identity struct {
	Producer ksuid.KSUID  `json:"producer"`
	Gateway  string       `json:"gateway"`
	Shards   uint32       `json:"shards"`
	OpenedAt usage.Micros `json:"opened_at_unix_micros"`
}

// file is what a segment is written through.
type file interface {
	io.Writer
	Sync() error
	Truncate(size int64) error
	Seek(offset int64, whence int) (int64, error)
	Close() error
}

// Store is a spool directory. It is held by one process at a time.
type Store struct {
	dir          string
	at           place.Place
	lock         *os.File
	locked       place.Place
	limit        int64
	segmentBytes int64
	bytes        atomic.Int64
	aside        map[string]int64 // bytes of what was put aside, by directory; none: not looked at yet
	create       func(path string) (file, error)
	mkdir        func(path string) error

	// Genuine, if set, reports whether a frame is what its record says. Behind damage
	// it is asked: a call's own texts could look like a record there.
	Genuine func(ksuid.KSUID, *Record) bool
}

// Open makes the directory if it has to, and locks it.
func Open(dir string, limit int64) (*Store, error) {
	if err := makeDir(dir, syncDir); err != nil {
		return nil, fmt.Errorf("spool directory: %w", err)
	}
	at, err := place.Of(dir)
	if err != nil {
		return nil, fmt.Errorf("spool directory: %w", err)
	}
	s := &Store{
		dir: dir, at: at, limit: limit, aside: map[string]int64{},
		// A small spool has small segments, so that it is freed bit by bit.
		segmentBytes: max(min(DefaultSegmentBytes, limit/8), 64<<10),
		create: func(path string) (file, error) {
			return os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		},
		mkdir: func(path string) error { return os.Mkdir(path, 0o700) },
	}
	if err := s.hold(); err != nil {
		return nil, err
	}
	return s, nil
}

// hold locks the directory, unless it is locked.
func (s *Store) hold() error {
	if s.lock != nil && s.locked.Check() == nil {
		return nil
	}
	path := filepath.Join(s.dir, "lock")
	lock, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("spool directory: %w", err)
	}
	if err = syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); errors.Is(err, syscall.EWOULDBLOCK) {
		err = ErrInUse
	}
	locked, gone := place.Of(path)
	if err = errors.Join(err, gone); err != nil {
		return errors.Join(fmt.Errorf("lock %s: %w", s.dir, err), lock.Close())
	}
	if s.lock != nil {
		err = s.lock.Close() // of a file that nobody finds any more
	}
	s.lock, s.locked = lock, locked
	return err
}

// makeDir makes a directory and those above it that are missing; sync makes a
// directory's names durable: what is in the spool is found by all of them.
func makeDir(dir string, sync func(string) error) error {
	var missing []string // the innermost first
	for d := filepath.Clean(dir); ; d = filepath.Dir(d) {
		if _, err := os.Stat(d); err == nil || !errors.Is(err, os.ErrNotExist) {
			break // what is in the way MkdirAll says
		}
		missing = append(missing, d)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, d := range slices.Backward(missing) {
		if err := sync(filepath.Dir(d)); err != nil {
			return err
		}
	}
	return nil
}

// Close unlocks the directory.
func (s *Store) Close() error { return s.lock.Close() }

// Bytes returns the size of all segments. Safe for concurrent use.
func (s *Store) Bytes() int64 { return s.bytes.Load() }

// Earlier opens what earlier producers left, the oldest first. A directory that
// is not a producer's is left alone.
func (s *Store) Earlier() ([]*Log, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("spool directory: %w", err)
	}
	var logs []*Log
	for _, e := range entries {
		producer, err := ksuid.Parse(e.Name())
		if err != nil || !e.IsDir() {
			continue
		}
		l := s.Create(Identity{Producer: producer})
		l.made = true
		data, err := os.ReadFile(filepath.Join(l.dir, identityFile))
		if errors.Is(err, os.ErrNotExist) {
			// It was not even begun, or all but gone: nothing was sent before
			// the identity was on disk, and it is removed last.
			if err := os.Remove(l.dir); err == nil {
				continue
			}
		} else if err != nil {
			return nil, fmt.Errorf("spool of producer %s: %w", producer, err)
		}
		// Without a readable identity the segments still say whose they are.
		if err := json.Unmarshal(data, &l.identity); err != nil {
			l.identity = Identity{}
		}
		l.identity.Producer = producer
		if err := l.scan(); err != nil {
			return nil, err
		}
		if err := l.readAcked(); err != nil {
			l.acked = nil // all of it is sent again, which is no harm
		}
		logs = append(logs, l)
	}
	slices.SortFunc(logs, func(a, b *Log) int { return ksuid.Compare(a.identity.Producer, b.identity.Producer) })
	return logs, nil
}

const (
	identityFile = "identity.json"
	wholeFile    = "whole" // empty; there: see Log.Whole
)

// Create returns the log of a new producer, of which nothing is on disk before Make.
func (s *Store) Create(id Identity) *Log {
	return &Log{store: s, dir: filepath.Join(s.dir, id.Producer.String()), identity: id}
}

// Make has the producer's directory on disk, with its identity; Append does it too.
// After an error nothing of it is there, and it may be tried again. That it is there no
// more Make says once (ErrGone), and then makes it anew; but not where the spool
// directory is another one or none: under a mount point, say, nobody would find it.
// Safe for concurrent use.
func (l *Log) Make() error {
	l.making.Lock()
	defer l.making.Unlock()
	if l.made {
		err := l.at.Check()
		l.made = err == nil
		return err
	}
	if err := l.store.at.Check(); err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	if err := l.store.hold(); err != nil {
		return err
	}
	data, err := json.Marshal(l.identity)
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	found := l.store.mkdir(l.dir)
	if found != nil && !errors.Is(found, os.ErrExist) {
		return fmt.Errorf("spool: %w", found)
	}
	path := filepath.Join(l.dir, identityFile)
	if _, there := os.Stat(path); found == nil || there != nil { // else it was restored
		err = l.store.write(path, data)
	}
	if err == nil {
		err = syncDir(l.store.dir)
	}
	if err == nil {
		l.at, err = place.Of(path) // not of the directory: who makes that anew may get its inode
	}
	if err != nil {
		if found != nil {
			return err
		}
		if gone := os.Remove(path); gone != nil && !errors.Is(gone, os.ErrNotExist) {
			err = errors.Join(err, gone)
		}
		return errors.Join(err, os.Remove(l.dir))
	}
	l.made = true
	return nil
}

// InPlace returns ErrGone where the directory is not the one that Make made. Safe for
// concurrent use.
func (l *Log) InPlace() error {
	l.making.Lock()
	defer l.making.Unlock()
	return l.at.Check()
}

// Has returns nil where a segment can be found by the next one who looks.
func (l *Log) Has(segment uint64) error {
	_, err := os.Stat(l.path(segment))
	return err
}

func (s *Store) write(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	return syncDir(filepath.Dir(path))
}

// Directories of what is put aside, for a person, in the store's.
const (
	rejectedDir = "rejected"
	damagedDir  = "damaged"
)

// Keep puts a frame that the ledger can never take aside, for a person: up to a
// quarter of the store's limit, beside it. Not safe for concurrent use.
func (s *Store) Keep(producer ksuid.KSUID, r *Record) (path string, err error) {
	path, err = s.besides(rejectedDir, fmt.Sprintf("%s-%d-%d.frame", producer, r.Shard, r.Number), int64(len(r.Data)))
	if err != nil {
		return "", err
	}
	return path, s.write(path, r.Data)
}

// besides returns where something of a size may be put aside.
func (s *Store) besides(name, file string, size int64) (path string, err error) {
	dir := filepath.Join(s.dir, name)
	if err := makeDir(dir, syncDir); err != nil {
		return "", fmt.Errorf("spool: %w", err)
	}
	if _, looked := s.aside[name]; !looked {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return "", fmt.Errorf("spool: %w", err)
		}
		s.aside[name] = 0
		for _, e := range entries {
			if info, err := e.Info(); err == nil { // else somebody has just taken it away
				s.aside[name] += info.Size()
			}
		}
	}
	if s.aside[name]+size > s.limit/4 {
		return "", fmt.Errorf("spool: %s: %w", dir, ErrFull)
	}
	s.aside[name] += size
	return filepath.Join(dir, file), nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	return nil
}

// Log is the spool of one producer. Not safe for concurrent use.
type Log struct {
	store    *Store
	dir      string
	identity Identity
	making   sync.Mutex
	made     bool        // the directory is there
	at       place.Place // of the identity that Make found or wrote in it
	segments []segment   // oldest first

	// The segment that is being written, always the last one; nil: the next
	// Append begins another.
	cur   file
	curAt place.Place
	buf   []byte

	reading *os.File // segment of the last Read
	readSeg uint64
	damaged map[uint64]bool // segments in which Read met damage
	aside   []Aside

	noting *os.File          // nil: nothing was noted by this process
	acked  map[uint32]uint64 // by shard, as it was found
}

type segment struct {
	number uint64
	size   int64 // up to here it is on disk, or was found there
}

// Dir returns the producer's directory.
func (l *Log) Dir() string { return l.dir }

// Identity returns whose log it is.
func (l *Log) Identity() Identity { return l.identity }

// Active returns the segment that the next record goes to at the earliest.
func (l *Log) Active() uint64 {
	switch n := len(l.segments); {
	case n == 0:
		return 1
	case l.cur == nil:
		return l.segments[n-1].number + 1
	default:
		return l.segments[n-1].number
	}
}

// Last returns the newest segment that is on disk, 0 when there is none.
func (l *Log) Last() uint64 {
	if n := len(l.segments); n > 0 {
		return l.segments[n-1].number
	}
	return 0
}

func (l *Log) path(n uint64) string { return filepath.Join(l.dir, fmt.Sprintf("%010d.seg", n)) }

func (l *Log) scan() error {
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".seg")
		n, err := strconv.ParseUint(name, 10, 64)
		if !ok || err != nil {
			continue
		}
		info, err := e.Info()
		if err != nil {
			return fmt.Errorf("spool: %w", err)
		}
		l.segments = append(l.segments, segment{n, info.Size()})
		l.store.bytes.Add(info.Size())
	}
	slices.SortFunc(l.segments, func(a, b segment) int { return int(int64(a.number) - int64(b.number)) })
	return nil
}

// Append writes records and returns where they are once they are on disk. After
// an error those without a position are not; they may be appended again.
func (l *Log) Append(records []Record) (at []Position, err error) {
	for len(at) < len(records) {
		written, err := l.appendSome(records[len(at):])
		at = append(at, written...)
		if err != nil {
			return at, err
		}
	}
	return at, nil
}

// appendSome writes what goes into the current segment, with one fsync.
func (l *Log) appendSome(records []Record) (at []Position, err error) {
	if n := len(l.segments); l.cur != nil && l.segments[n-1].size >= l.store.segmentBytes {
		if err := l.rest(); err != nil {
			return nil, err
		}
	}
	if l.cur == nil {
		if err := l.Make(); err != nil {
			return nil, err
		}
	}
	room := l.store.limit - l.store.bytes.Load()
	if l.cur == nil {
		room -= segmentHeader
	}
	if records[0].size() > room {
		return nil, ErrFull
	}
	if l.cur == nil {
		if err := l.begin(); err != nil {
			return nil, err
		}
	}
	seg := &l.segments[len(l.segments)-1]
	buf := l.buf[:0]
	for i := range records {
		r := &records[i]
		if at != nil && (int64(len(buf))+r.size() > room || seg.size+int64(len(buf)) >= l.store.segmentBytes) {
			break
		}
		at = append(at, Position{seg.number, seg.size + int64(len(buf))})
		buf = appendRecord(buf, r)
	}
	l.buf = buf[:0]
	if cap(buf) > 4*maxRecord {
		l.buf = nil
	}
	_, err = l.cur.Write(buf)
	if err == nil {
		err = l.cur.Sync()
	}
	if err == nil {
		err = l.curAt.Check() // what nobody finds is not durable
	}
	if err != nil {
		// After a failed fsync nobody knows what is on disk: this segment ends
		// at what was known before, and the next records go to another. What
		// can't be cut off is found twice by a reader, which is no harm.
		err = errors.Join(err, l.cur.Truncate(seg.size), l.cur.Close())
		l.cur = nil
		return nil, fmt.Errorf("spool: %w", err)
	}
	seg.size += int64(len(buf))
	l.store.bytes.Add(int64(len(buf)))
	return at, nil
}

func appendRecord(buf []byte, r *Record) []byte {
	start := len(buf)
	buf = binary.LittleEndian.AppendUint32(buf, uint32(recordFixed+len(r.Data)))
	buf = append(buf, 0, 0, 0, 0)
	buf = binary.LittleEndian.AppendUint32(buf, r.Shard)
	buf = binary.LittleEndian.AppendUint64(buf, r.Number)
	buf = binary.LittleEndian.AppendUint32(buf, r.Calls)
	buf = binary.LittleEndian.AppendUint64(buf, uint64(r.At))
	buf = append(buf, r.Data...)
	binary.LittleEndian.PutUint32(buf[start+4:], recordSum(buf[start:start+4], buf[start+recordHeader:]))
	return buf
}

func recordSum(length, body []byte) uint32 {
	return crc32.Update(crc32.Checksum(length, castagnoli), castagnoli, body)
}

// probeBytes is for how much Probe wants room.
const probeBytes = 32 << 10

// Probe finds out whether Append has room for some frames again, after an error.
func (l *Log) Probe() error {
	if l.store.limit-l.store.bytes.Load() < min(probeBytes, l.store.limit/8) {
		return ErrFull
	}
	if l.cur != nil {
		if l.curAt.Check() == nil {
			return nil
		}
		if err := l.rest(); err != nil {
			return err
		}
	}
	if err := l.Make(); err != nil {
		return err
	}
	if err := l.begin(); err != nil {
		return err
	}
	_, err := l.cur.Write(make([]byte, probeBytes))
	if err == nil {
		err = l.cur.Sync()
	}
	if err == nil {
		err = l.cur.Truncate(segmentHeader)
	}
	if err == nil {
		_, err = l.cur.Seek(segmentHeader, io.SeekStart)
	}
	if err != nil {
		n := len(l.segments) - 1
		err = errors.Join(err, l.cur.Close(), os.Remove(l.path(l.segments[n].number)))
		l.cur, l.segments = nil, l.segments[:n]
		l.store.bytes.Add(-segmentHeader)
		return fmt.Errorf("spool: %w", err)
	}
	return nil
}

func (l *Log) head(n uint64) []byte {
	head := append([]byte(magic), l.identity.Producer.Bytes()...)
	head = binary.LittleEndian.AppendUint64(head, n)
	return binary.LittleEndian.AppendUint32(head, crc32.Checksum(head, castagnoli))
}

func (l *Log) begin() error {
	n := uint64(1)
	if k := len(l.segments); k > 0 {
		n = l.segments[k-1].number + 1
	}
	f, err := l.store.create(l.path(n))
	for ; errors.Is(err, os.ErrExist); f, err = l.store.create(l.path(n)) {
		n++ // one that was begun in vain and could not be removed: nothing is in it
	}
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	_, err = f.Write(l.head(n))
	if err == nil {
		// The records' fsync will cover the header, but not the name.
		err = syncDir(l.dir)
	}
	if err == nil {
		l.curAt, err = place.Of(l.path(n))
	}
	if err == nil && l.noting != nil {
		err = l.noting.Close() // the directory may be another one
		l.noting = nil
	}
	if err != nil {
		return errors.Join(fmt.Errorf("spool: %w", err), f.Close(), os.Remove(l.path(n)))
	}
	l.cur = f
	l.segments = append(l.segments, segment{n, segmentHeader})
	l.store.bytes.Add(segmentHeader)
	return nil
}

// rest ends the current segment.
func (l *Log) rest() error {
	if l.cur == nil {
		return nil
	}
	err := l.cur.Close()
	l.cur = nil
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	return nil
}

// Torn is what Read met that is not a record. Reading goes on behind it.
type Torn struct {
	Position Position
	Bytes    int64
	// Damaged: it is not the end that a crash leaves, so what was there may have been
	// answered as safe.
	Damaged bool
	// Record is the first one in it, without its data, if that says so itself. Whatever
	// of it may be what is damaged. Nothing if not.
	Record Record
}

// Read returns the record at pos or, where none begins, the next one, and the
// position behind it. ok is false at the end of what is on disk. passed is what it
// met before it. The data is the caller's.
func (l *Log) Read(pos Position) (r Record, at, next Position, passed []Torn, ok bool, err error) {
	for _, seg := range l.segments {
		switch {
		case seg.number < pos.Segment:
			continue
		case seg.number > pos.Segment || pos.Offset < segmentHeader:
			pos = Position{seg.number, segmentHeader}
			if seg.size > segmentHeader {
				t, err := l.readHead(seg.number)
				if err != nil {
					return r, at, next, passed, false, err
				}
				if t != nil {
					passed = append(passed, *t)
				}
			}
		}
		for pos.Offset < seg.size {
			r, n, err := l.readAt(pos, seg.size)
			if err == nil {
				return r, pos, Position{pos.Segment, pos.Offset + n}, passed, true, nil
			}
			if !errors.Is(err, errTorn) && !errors.Is(err, io.EOF) {
				return r, at, next, passed, false, err
			}
			t, err := l.pass(pos, seg.size)
			if errors.Is(err, io.EOF) {
				// Less is there than there was.
				t, err = Torn{Position: pos, Bytes: seg.size - pos.Offset, Damaged: true}, nil
			}
			if err != nil {
				return r, at, next, passed, false, err
			}
			passed = append(passed, t)
			pos.Offset += t.Bytes
		}
	}
	return r, at, pos, passed, false, nil
}

var errTorn = errors.New("not a record")

func (l *Log) open(segment uint64) error {
	if l.reading != nil && l.readSeg == segment {
		return nil
	}
	if err := l.stopReading(); err != nil {
		return err
	}
	f, err := os.Open(l.path(segment))
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	l.reading, l.readSeg = f, segment
	return nil
}

// isDamaged takes note that the segment is.
func (l *Log) isDamaged(segment uint64) {
	if l.damaged == nil {
		l.damaged = map[uint64]bool{}
	}
	l.damaged[segment] = true
}

// readHead returns nil where the beginning of a segment is what it should be.
func (l *Log) readHead(segment uint64) (*Torn, error) {
	if err := l.open(segment); err != nil {
		return nil, err
	}
	var head [segmentHeader]byte
	if _, err := l.reading.ReadAt(head[:], 0); err != nil && err != io.EOF {
		return nil, fmt.Errorf("spool: %w", err)
	}
	want := l.head(segment)
	if bytes.Equal(head[:], want) {
		return nil, nil
	}
	t := &Torn{Position: Position{Segment: segment}, Bytes: segmentHeader}
	if t.Damaged = !bytes.HasPrefix(want, bytes.TrimRight(head[:], "\x00")); t.Damaged {
		l.isDamaged(segment)
	}
	return t, nil
}

// readAt returns the record that begins at pos and its size.
func (l *Log) readAt(pos Position, end int64) (r Record, n int64, err error) {
	if err := l.open(pos.Segment); err != nil {
		return r, 0, err
	}
	var head [recordHeader]byte
	if end-pos.Offset < recordHeader+recordFixed {
		return r, 0, errTorn
	}
	if _, err := l.reading.ReadAt(head[:], pos.Offset); err != nil {
		return r, 0, fmt.Errorf("spool: %w", err)
	}
	length := int64(binary.LittleEndian.Uint32(head[:4]))
	if length < recordFixed || length > maxRecord || pos.Offset+recordHeader+length > end {
		return r, 0, errTorn
	}
	body := make([]byte, length)
	if _, err := l.reading.ReadAt(body, pos.Offset+recordHeader); err != nil {
		return r, 0, fmt.Errorf("spool: %w", err)
	}
	if recordSum(head[:4], body) != binary.LittleEndian.Uint32(head[4:]) {
		return r, 0, errTorn
	}
	r = fixed(body)
	r.Data = body[recordFixed:]
	if l.damaged[pos.Segment] && l.store.Genuine != nil && !l.store.Genuine(l.identity.Producer, &r) {
		return r, 0, errTorn
	}
	return r, recordHeader + length, nil
}

func fixed(body []byte) Record {
	return Record{
		Shard: binary.LittleEndian.Uint32(body), Number: binary.LittleEndian.Uint64(body[4:]), Calls: binary.LittleEndian.Uint32(body[12:]),
		At: usage.Micros(binary.LittleEndian.Uint64(body[16:])),
	}
}

// pass finds where reading can go on behind what is not a record, and what that is.
func (l *Log) pass(pos Position, end int64) (Torn, error) {
	before := l.damaged[pos.Segment]
	l.isDamaged(pos.Segment) // what is behind it is doubted
	next, err := l.find(pos, end)
	if err != nil {
		return Torn{}, err
	}
	t := Torn{Position: pos, Bytes: next - pos.Offset, Damaged: true}
	rest := make([]byte, min(t.Bytes, recordHeader+maxRecord+1))
	if _, err := l.reading.ReadAt(rest, pos.Offset); err != nil {
		return t, fmt.Errorf("spool: %w", err)
	}
	if len(rest) >= recordHeader+recordFixed {
		t.Record = fixed(rest[recordHeader:])
	}
	// A crash cuts what was written last, and none came to a producer that ended in order.
	if next == end && pos.Segment == l.Last() && !l.Whole() && len(rest) <= recordHeader+maxRecord && torn.End(rest) {
		t.Damaged = false
		if !before {
			delete(l.damaged, pos.Segment)
		}
	}
	return t, nil
}

// window is how much of a segment is looked at at once.
const window = 64 << 10

// find returns where the next record begins behind pos; end when there is none.
func (l *Log) find(pos Position, end int64) (int64, error) {
	buf := make([]byte, window+recordHeader+4)
	shards := l.identity.Shards
	if shards == 0 {
		shards = 1 << 16 // whoever's it is
	}
	for base := pos.Offset + 1; base < end; base += window {
		part := buf[:min(int64(len(buf)), end-base)]
		if _, err := l.reading.ReadAt(part, base); err != nil {
			return 0, fmt.Errorf("spool: %w", err)
		}
		for i := 0; i < window && i+recordHeader+4 <= len(part); i++ {
			at := base + int64(i)
			length := int64(binary.LittleEndian.Uint32(part[i:]))
			if length < recordFixed || length > maxRecord || at+recordHeader+length > end || binary.LittleEndian.Uint32(part[i+recordHeader:]) >= shards {
				continue
			}
			_, _, err := l.readAt(Position{pos.Segment, at}, end)
			if err == nil {
				return at, nil
			}
			if !errors.Is(err, errTorn) {
				return 0, err
			}
		}
	}
	return end, nil
}

func (l *Log) stopReading() error {
	if l.reading == nil {
		return nil
	}
	err := l.reading.Close()
	l.reading = nil
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	return nil
}

// Remove deletes the segments before one; what was durable in them must be
// acknowledged. Where the directory is not in its place it is ErrGone, and they are
// deleted when it is.
func (l *Log) Remove(before uint64) error {
	if len(l.segments) == 0 || l.segments[0].number >= before {
		return nil
	}
	if err := l.InPlace(); err != nil {
		return err
	}
	for len(l.segments) > 0 && l.segments[0].number < before {
		seg := l.segments[0]
		if len(l.segments) == 1 {
			if err := l.rest(); err != nil {
				return err
			}
		}
		if l.readSeg == seg.number {
			if err := l.stopReading(); err != nil {
				return err
			}
		}
		if l.damaged[seg.number] {
			l.setAside(seg)
		}
		if err := os.Remove(l.path(seg.number)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("spool: %w", err)
		}
		if len(l.segments) == 1 {
			// Numbers go on: a position never means two records.
			l.segments[0] = segment{seg.number, 0}
			l.store.bytes.Add(-seg.size)
			break
		}
		l.segments = l.segments[1:]
		l.store.bytes.Add(-seg.size)
	}
	return syncDir(l.dir)
}

// Aside is a damaged segment that Remove has put aside, for a person.
type Aside struct {
	Segment uint64
	Path    string // empty with Err: it is deleted
	Err     error
}

// Aside returns what was put aside since it was called last.
func (l *Log) Aside() []Aside {
	all := l.aside
	l.aside = nil
	return all
}

// setAside moves a segment to the damaged ones: up to a quarter of the store's limit.
func (l *Log) setAside(seg segment) {
	delete(l.damaged, seg.number)
	a := Aside{Segment: seg.number}
	a.Path, a.Err = l.store.besides(damagedDir, fmt.Sprintf("%s-%d.seg", l.identity.Producer, seg.number), seg.size)
	if a.Err == nil {
		if a.Err = os.Rename(l.path(seg.number), a.Path); a.Err == nil {
			a.Err = syncDir(filepath.Dir(a.Path))
		} else {
			a.Path = ""
		}
	}
	l.aside = append(l.aside, a)
}

// MarkWhole notes, on disk, that the producer has ended in order: no call is under
// way, and every one it let through is in the log or in the ledger.
func (l *Log) MarkWhole() error {
	if err := l.Make(); err != nil {
		return err
	}
	return l.store.write(filepath.Join(l.dir, wholeFile), nil)
}

// MarkLossy takes MarkWhole back.
func (l *Log) MarkLossy() error {
	if err := os.Remove(filepath.Join(l.dir, wholeFile)); errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	return syncDir(l.dir)
}

// Whole reports whether every call that the producer let through is in the log or in
// the ledger. Of one that was killed nobody knows: calls may have been under way
// that it had answered nobody, and written nowhere.
func (l *Log) Whole() bool {
	_, err := os.Stat(filepath.Join(l.dir, wholeFile))
	return err == nil // what can't be read is not promised
}

// Destroy deletes the producer's directory. The producer must be retired.
func (l *Log) Destroy() error {
	if n := len(l.segments); n > 0 {
		if err := l.Remove(l.segments[n-1].number + 1); err != nil {
			return err
		}
	}
	if err := l.Close(); err != nil {
		return err
	}
	if !l.made && l.at == (place.Place{}) {
		return nil
	}
	for _, name := range []string{wholeFile, ackedFile, marks.Fresh, marks.File, identityFile} {
		if err := os.Remove(filepath.Join(l.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("spool: %w", err)
		}
	}
	if err := os.Remove(l.dir); err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	return syncDir(l.store.dir)
}

// Close lets go of the files and leaves them.
func (l *Log) Close() error {
	err := errors.Join(l.rest(), l.stopReading())
	if l.noting != nil {
		err = errors.Join(err, l.noting.Close())
		l.noting = nil
	}
	return err
}
