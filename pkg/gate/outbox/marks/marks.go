// Package marks keeps on disk how much of its leases a producer can have used at most:
// what Write has returned is there (fsync), whatever happens to the process. What a
// crash has cut was not returned, and is passed over.
//
//	file   := "TKM1" producer:20 crc:4 record…
//	record := length:4 crc:4 at:8 mark…
//	mark   := shard account limit start end used-at-most (varints; texts with their length)
//
// Fixed integers are little-endian, crc is CRC-32C, that of a record over its length and
// all that follows, length counts what follows the crc. The newest mark of a lease, which
// is the greatest, holds.
package marks

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/internal/place"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/internal/torn"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

const (
	magic      = "TKM1"
	fileHeader = 4 + 20 + 4
	recordHead = 4 + 4
	// MaxBatch is how many marks may be written at once.
	MaxBatch = 1024
	// maxRecord holds MaxBatch marks of the longest names.
	maxRecord = 1 << 20
	// fewest marks that are written until the file is made anew; else it is when there
	// are twice as many as there have to be.
	fewest = 8192
	// grace is how long after its window's end a mark is kept, microseconds of the
	// ledger's time: a clock may be wrong.
	grace = usage.Micros(60 * 1_000_000)

	// File and Fresh are the names of the journal and of the one that will replace it.
	File  = "marks"
	Fresh = "marks.new"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var (
	// ErrClosed says that the journal takes no marks any more.
	ErrClosed = errors.New("the journal of marks is closed")
	// ErrDamaged says that what is there is no journal of the producer, or not whole.
	ErrDamaged = errors.New("the journal of marks is damaged")
)

// Mark says how much of a lease can have been used at most.
type Mark struct {
	Shard          uint32
	Account, Limit string // "<plan>/<limit>"
	// Start and End bound the window; 0 both for lifetime.
	Start, End usage.Micros
	// UsedAtMost is a total since the lease began.
	UsedAtMost int64
}

type key struct {
	account, limit string
	start          usage.Micros
	shard          uint32
}

type standing struct {
	end  usage.Micros
	most int64
}

// file is what the journal is written through.
type file interface {
	io.Writer
	Sync() error
	Close() error
}

// Journal is that of one producer. Its methods are safe for concurrent use.
type Journal struct {
	mu       sync.Mutex
	dir      string
	producer ksuid.KSUID
	create   func(path string) (file, error)

	marks   map[key]standing // all that the file may say
	cur     file             // nil: the next Write makes the file anew
	curAt   place.Place
	written int // marks since it was made
	kept    int // with which it was made
	buf     []byte
	begun   bool
	closed  bool
	prepare func() error // nil: nothing is to be done before the file is made
}

// New returns the journal of a producer in its directory; Write makes the file.
func New(dir string, producer ksuid.KSUID) *Journal {
	return &Journal{dir: dir, producer: producer, marks: make(map[key]standing), create: func(path string) (file, error) {
		return os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	}}
}

// After has the function called before the file is made, each time; what it fails with
// Write does. Before the first Write.
func (j *Journal) After(prepare func() error) { j.prepare = prepare }

// Write returns nil once the marks, at most MaxBatch, are on disk. Those of windows
// that ended before now, the ledger's time, are forgotten sooner or later. After an
// error they may be there or not, and the next Write begins another file.
func (j *Journal) Write(now usage.Micros, batch []Mark) error {
	if len(batch) > MaxBatch {
		return fmt.Errorf("marks: %d at once, at most %d are possible", len(batch), MaxBatch)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed {
		return ErrClosed
	}
	j.begun = true
	for i := range batch {
		m := &batch[i]
		k := key{m.Account, m.Limit, m.Start, m.Shard}
		j.marks[k] = standing{m.End, max(j.marks[k].most, m.UsedAtMost)}
	}
	if j.cur == nil || j.written+len(batch) > max(fewest, j.kept) {
		return j.renew(now)
	}
	if j.buf = appendRecord(j.buf[:0], now, batch); len(j.buf) > recordHead+maxRecord {
		return fmt.Errorf("marks: a record of %d bytes", len(j.buf))
	}
	_, err := j.cur.Write(j.buf)
	if err == nil {
		err = j.cur.Sync()
	}
	if err == nil {
		err = j.curAt.Check() // what nobody finds is not durable
	}
	if err != nil {
		// After a failed fsync nobody knows what is on disk: nothing is written
		// behind it.
		err = errors.Join(err, j.cur.Close())
		j.cur = nil
		return fmt.Errorf("marks: %w", err)
	}
	j.written += len(batch)
	return nil
}

// renew replaces the file by one with what holds only; j is locked.
func (j *Journal) renew(now usage.Micros) error {
	for k, s := range j.marks {
		if over(s.end, now) {
			delete(j.marks, k)
		}
	}
	if j.cur != nil {
		err := j.cur.Close()
		j.cur = nil
		if err != nil {
			return fmt.Errorf("marks: %w", err)
		}
	}
	if j.prepare != nil {
		if err := j.prepare(); err != nil {
			return fmt.Errorf("marks: %w", err)
		}
	}
	fresh := filepath.Join(j.dir, Fresh)
	f, err := j.create(fresh)
	if err != nil {
		return fmt.Errorf("marks: %w", err)
	}
	if err = j.writeAll(f, now); err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = os.Rename(fresh, filepath.Join(j.dir, File))
	}
	if err == nil {
		err = syncDir(j.dir)
	}
	if err == nil {
		j.curAt, err = place.Of(filepath.Join(j.dir, File))
	}
	if err != nil {
		return fmt.Errorf("marks: %w", errors.Join(err, f.Close()))
	}
	j.cur, j.written, j.kept = f, 0, len(j.marks)
	return nil
}

func (j *Journal) writeAll(f file, now usage.Micros) error {
	head := append([]byte(magic), j.producer.Bytes()...)
	head = binary.LittleEndian.AppendUint32(head, crc32.Checksum(head, castagnoli))
	if _, err := f.Write(head); err != nil {
		return err
	}
	var batch []Mark
	flush := func() error {
		j.buf = appendRecord(j.buf[:0], now, batch)
		batch = batch[:0]
		_, err := f.Write(j.buf)
		return err
	}
	for k, s := range j.marks {
		if batch = append(batch, Mark{k.shard, k.account, k.limit, k.start, s.end, s.most}); len(batch) == MaxBatch {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	return flush() // the time, if nothing else
}

// over: nobody asks any more what was used of the window.
func over(end, now usage.Micros) bool { return end != 0 && end+grace < now }

func appendRecord(buf []byte, now usage.Micros, batch []Mark) []byte {
	buf = append(buf, make([]byte, recordHead)...)
	buf = binary.LittleEndian.AppendUint64(buf, uint64(now))
	text := func(s string) {
		buf = binary.AppendUvarint(buf, uint64(len(s)))
		buf = append(buf, s...)
	}
	for i := range batch {
		m := &batch[i]
		buf = binary.AppendUvarint(buf, uint64(m.Shard))
		text(m.Account)
		text(m.Limit)
		buf = binary.AppendVarint(buf, int64(m.Start))
		buf = binary.AppendVarint(buf, int64(m.End))
		buf = binary.AppendVarint(buf, m.UsedAtMost)
	}
	binary.LittleEndian.PutUint32(buf, uint32(len(buf)-recordHead))
	binary.LittleEndian.PutUint32(buf[4:], sum(buf))
	return buf
}

func sum(record []byte) uint32 {
	return crc32.Update(crc32.Checksum(record[:4], castagnoli), castagnoli, record[recordHead:])
}

// All returns what is noted, or may be; false: nothing was ever to be noted. In the
// order of Read.
func (j *Journal) All() ([]Mark, bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return sorted(j.marks), j.begun
}

// Close lets go of the file and leaves it.
func (j *Journal) Close() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.closed = true
	if j.cur == nil {
		return nil
	}
	err := j.cur.Close()
	j.cur = nil
	if err != nil {
		return fmt.Errorf("marks: %w", err)
	}
	return nil
}

// Read returns the marks that a producer left in its directory, in the order of shards,
// accounts, limits and windows, without those of windows that were over when it wrote
// last. False: it kept none, so nobody knows what it used. With an error, which is
// ErrDamaged where the file can be read, nobody knows either.
func Read(dir string, producer ksuid.KSUID) ([]Mark, bool, error) {
	data, err := os.ReadFile(filepath.Join(dir, File))
	if errors.Is(err, os.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("marks: %w", err)
	}
	if len(data) < fileHeader || string(data[:4]) != magic || [20]byte(data[4:24]) != [20]byte(producer) ||
		crc32.Checksum(data[:24], castagnoli) != binary.LittleEndian.Uint32(data[24:]) {
		return nil, false, fmt.Errorf("%w: %s in %s is not of producer %s", ErrDamaged, File, dir, producer)
	}
	now := usage.Micros(0)
	all := make(map[key]standing)
	for data = data[fileHeader:]; ; {
		body, ok := record(data)
		if !ok {
			break
		}
		data = data[recordHead+len(body):]
		if !parse(body, &now, all) {
			return nil, false, fmt.Errorf("%w: a record of %s in %s is not of marks", ErrDamaged, File, dir)
		}
	}
	// A crash cuts the one record that was being written. Behind anything else marks may
	// have been that are greater than those before it.
	if len(data) > recordHead+maxRecord || !torn.End(data) || anyRecord(data) {
		return nil, false, fmt.Errorf("%w: %d bytes of %s in %s can't be read", ErrDamaged, len(data), File, dir)
	}
	for k, s := range all {
		if over(s.end, now) {
			delete(all, k)
		}
	}
	return sorted(all), true, nil
}

// anyRecord reports whether there is a record somewhere behind the beginning.
func anyRecord(data []byte) bool {
	for len(data) > 1 {
		data = data[1:]
		if _, ok := record(data); ok {
			return true
		}
	}
	return false
}

func sorted(all map[key]standing) []Mark {
	out := make([]Mark, 0, len(all))
	for k, s := range all {
		out = append(out, Mark{k.shard, k.account, k.limit, k.start, s.end, s.most})
	}
	slices.SortFunc(out, func(a, b Mark) int {
		return cmp.Or(cmp.Compare(a.Shard, b.Shard), cmp.Compare(a.Account, b.Account), cmp.Compare(a.Limit, b.Limit), cmp.Compare(a.Start, b.Start))
	})
	return out
}

// record returns the body of the one that begins here.
func record(data []byte) ([]byte, bool) {
	if len(data) < recordHead {
		return nil, false
	}
	n := binary.LittleEndian.Uint32(data)
	if n < 8 || n > maxRecord || int(n) > len(data)-recordHead {
		return nil, false
	}
	data = data[:recordHead+int(n)]
	return data[recordHead:], sum(data) == binary.LittleEndian.Uint32(data[4:])
}

func parse(body []byte, now *usage.Micros, all map[key]standing) bool {
	*now = max(*now, usage.Micros(binary.LittleEndian.Uint64(body)))
	body = body[8:]
	bad := false
	skip := func(n int) {
		if n <= 0 {
			bad, body = true, nil
			return
		}
		body = body[n:]
	}
	unsigned := func() uint64 {
		v, n := binary.Uvarint(body)
		skip(n)
		return v
	}
	number := func() int64 {
		v, n := binary.Varint(body)
		skip(n)
		return v
	}
	text := func() string {
		n := unsigned()
		if n > uint64(len(body)) {
			bad, body = true, nil
			return ""
		}
		s := string(body[:n])
		body = body[n:]
		return s
	}
	for len(body) > 0 {
		k := key{shard: uint32(unsigned()), account: text(), limit: text(), start: usage.Micros(number())}
		end, most := usage.Micros(number()), number()
		if bad {
			return false
		}
		all[k] = standing{end, max(all[k].most, most)}
	}
	return true
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
