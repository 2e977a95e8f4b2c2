package audit

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Claim says which calls a producer has put into some frames of a shard.
type Claim struct {
	Shard uint32
	// From and Through are numbers of frames; all between are claimed too.
	From, Through uint64
	Cells         *Cells
	// More: further cells of the same claim follow in the next message.
	More bool
}

// Message is one message of a producer's claims.
type Message struct {
	Producer dedup.Producer
	// Number counts the messages of a producer, from 1.
	Number uint64
	Claims []Claim
}

// Lane gathers what one producer puts into the frames of one shard. It is told
// of every call as it is added, and of the frame's sealing, by what makes the
// frames, and does not look at them.
type Lane struct {
	producer uint64
	shard    uint32
	limit    int

	number uint64 // of the open frame; 0: none
	frame  uint64 // its hash
	index  int
	open   map[string]*Tally

	claims  []Claim // of sealed frames
	each    bool    // a claim a frame
	waiting int     // cells of those claims, when each
}

// NewLane returns the lane of a producer (ksuid in text form) and shard. limit
// bounds the cells that are told apart in a claim.
func NewLane(producer string, shard uint32, limit int) *Lane {
	return &Lane{producer: ProducerHash(producer), shard: shard, limit: limit, open: map[string]*Tally{}}
}

// NewLaneAgain returns a lane for frames that may have been claimed before: each
// gets a claim of its own, and none when those that were not taken yet have more
// than limit cells. A frame without one is unclaimed.
func NewLaneAgain(producer string, shard uint32, limit int) *Lane {
	l := NewLane(producer, shard, limit)
	l.each = true
	return l
}

// Add takes note of a call that goes into the frame with the number.
func (l *Lane) Add(number uint64, c *usage.Call) {
	if number != l.number {
		// A new frame; one that was begun and never sealed does not exist.
		clear(l.open)
		l.number, l.index, l.frame = number, 0, FrameHash(l.producer, l.shard, number)
	}
	t := l.open[c.Account]
	if t == nil {
		t = &Tally{}
		l.open[c.Account] = t
	}
	t.Add(c, RowHash(l.frame, l.index))
	l.index++
}

// Seal takes note that the open frame is sealed.
func (l *Lane) Seal(sealedAt usage.Micros) {
	if l.number == 0 || l.index == 0 {
		return
	}
	n := len(l.claims)
	if l.each && n > 0 && l.waiting+len(l.open) > l.limit {
		clear(l.open)
		l.number, l.index = 0, 0
		return
	}
	l.waiting += len(l.open)
	if n == 0 || l.each {
		l.claims = append(l.claims, Claim{Shard: l.shard, From: l.number, Cells: NewCells(l.limit)})
		n++
	}
	claim := &l.claims[n-1]
	claim.Through = l.number
	minute := FrameMinute(sealedAt, sealedAt)
	for account, t := range l.open {
		claim.Cells.Add(&Cell{Minute: minute, Account: account, Tally: *t})
	}
	clear(l.open)
	l.number, l.index = 0, 0
}

// Take returns what was sealed since it was called last. Unlike Add it may be
// called from another goroutine, if it and Seal exclude each other.
func (l *Lane) Take() []Claim {
	claims := l.claims
	l.claims, l.waiting = nil, 0
	return claims
}

const claimMagic = "TKA1"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// MaxMessage is how large a message may become, bytes: far below what NATS takes.
const MaxMessage = 256 << 10

// maxCell bounds what one cell takes in a message.
const maxCell = usage.MaxIDBytes + 16*(NumSums+5)

// Encode writes claims of a producer into messages of at most MaxMessage bytes,
// numbered from the given number on.
func Encode(p dedup.Producer, number uint64, claims []Claim) [][]byte {
	var out [][]byte
	var b []byte
	finish := func() {
		if b != nil {
			out = append(out, binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli)))
			b = nil
		}
	}
	begin := func() {
		b = append(append([]byte(nil), claimMagic...), p[:]...)
		b = binary.AppendUvarint(b, number+uint64(len(out)))
	}
	for i := range claims {
		c := &claims[i]
		var cells []Cell
		for x := range c.Cells.All() {
			cells = append(cells, x)
		}
		for first := true; first || len(cells) > 0; first = false {
			if b == nil {
				begin()
			}
			n := 0
			var body []byte
			for n < len(cells) && len(b)+len(body)+2*maxCell < MaxMessage {
				body = appendCell(body, &cells[n])
				n++
			}
			more := n < len(cells)
			b = binary.AppendUvarint(b, uint64(c.Shard))
			b = binary.AppendUvarint(b, c.From)
			b = binary.AppendUvarint(b, c.Through)
			b = append(b, bit(more))
			b = binary.AppendUvarint(b, uint64(n))
			b = append(b, body...)
			cells = cells[n:]
			if more || len(b)+2*maxCell >= MaxMessage {
				finish()
			}
		}
	}
	finish()
	return out
}

func bit(v bool) byte {
	if v {
		return 1
	}
	return 0
}

func appendCell(b []byte, x *Cell) []byte {
	b = binary.AppendVarint(b, int64(x.Minute))
	b = append(b, bit(x.Others))
	b = binary.AppendUvarint(b, uint64(len(x.Account)))
	b = append(b, x.Account...)
	b = binary.AppendVarint(b, x.Tally.Count)
	b = binary.AppendVarint(b, x.Tally.Refused)
	for _, v := range x.Tally.Sums {
		b = binary.AppendVarint(b, v)
	}
	return binary.LittleEndian.AppendUint64(b, x.Tally.Hash)
}

var errClaim = errors.New("the claim can't be read")

// Decode reads a message of claims.
func Decode(data []byte) (Message, error) {
	var m Message
	head := len(claimMagic) + len(m.Producer)
	if len(data) < head+4 || string(data[:len(claimMagic)]) != claimMagic {
		return m, fmt.Errorf("%w: it does not begin with %s", errClaim, claimMagic)
	}
	body, sum := data[:len(data)-4], binary.LittleEndian.Uint32(data[len(data)-4:])
	if crc32.Checksum(body, castagnoli) != sum {
		return m, fmt.Errorf("%w: its CRC-32C does not match its content", errClaim)
	}
	copy(m.Producer[:], body[len(claimMagic):])
	r := reader{b: body[head:]}
	m.Number = r.uvarint()
	for len(r.b) > 0 && !r.bad {
		c := Claim{Shard: uint32(r.uvarint()), From: r.uvarint(), Through: r.uvarint(), More: r.byte() != 0}
		n := r.uvarint()
		if r.bad || n > uint64(len(r.b)) || c.From == 0 || c.Through < c.From {
			return Message{}, fmt.Errorf("%w: it is cut off", errClaim)
		}
		c.Cells = NewCells(int(n))
		for range n {
			x := Cell{Minute: Minute(r.varint()), Others: r.byte() != 0}
			x.Account = string(r.take(r.uvarint()))
			x.Tally.Count, x.Tally.Refused = r.varint(), r.varint()
			for i := range x.Tally.Sums {
				x.Tally.Sums[i] = r.varint()
			}
			if h := r.take(8); !r.bad {
				x.Tally.Hash = binary.LittleEndian.Uint64(h)
			}
			if r.bad {
				break
			}
			c.Cells.Add(&x)
		}
		m.Claims = append(m.Claims, c)
	}
	if r.bad {
		return Message{}, fmt.Errorf("%w: it is cut off", errClaim)
	}
	return m, nil
}

// reader takes values off a byte slice; after the first failure bad is set and
// everything it returns is zero.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) take(n uint64) []byte {
	if r.bad || n > uint64(len(r.b)) {
		r.bad, r.b = true, nil
		return nil
	}
	v := r.b[:n]
	r.b = r.b[n:]
	return v
}

func (r *reader) byte() byte {
	if v := r.take(1); v != nil {
		return v[0]
	}
	return 0
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if r.bad || n <= 0 {
		r.bad, r.b = true, nil
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) varint() int64 {
	v, n := binary.Varint(r.b)
	if r.bad || n <= 0 {
		r.bad, r.b = true, nil
		return 0
	}
	r.b = r.b[n:]
	return v
}
