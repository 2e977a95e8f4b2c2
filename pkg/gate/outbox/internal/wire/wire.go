// Package wire is the outbox's hold on the NATS connection: publish, hear
// acknowledgements, know whether it is there. It never makes its caller wait.
package wire

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

// Wire is the only part that touches the connection, from one goroutine: a
// peer that hangs blocks whoever publishes, or only asks for the status, for up
// to a minute, and meanwhile the sender must go on spooling.
type Wire struct {
	nc     *nats.Conn
	sub    *nats.Subscription
	status chan nats.Status
	prefix string

	// Acks are the answers, to be read with Parse.
	Acks   chan *nats.Msg
	out    chan outgoing
	Failed chan Failure
	State  chan State // the newest one
	stop   chan struct{}
	done   chan struct{}
}

type outgoing struct {
	msg    *nats.Msg
	slot   uint64
	number uint64
}

// Failure of a publish, before it left.
type Failure struct {
	Slot, Number uint64
	Err          error
}

// State of the connection.
type State struct {
	Connected  bool
	Reconnects uint64
}

const (
	// wireBuffer is far more than the frames in flight, which are one a lane.
	// What does not fit is sent again.
	wireBuffer = 8192
	// watchEvery is how often the connection is looked at besides being told.
	watchEvery = 250 * time.Millisecond
	// partingTime is how long Close waits for a connection that hangs.
	partingTime = time.Second
)

// Open subscribes to acknowledgements; the connection may be away.
func Open(nc *nats.Conn) (*Wire, error) {
	w := &Wire{
		nc: nc, Acks: make(chan *nats.Msg, wireBuffer), out: make(chan outgoing, wireBuffer), Failed: make(chan Failure, wireBuffer),
		State: make(chan State, 1), stop: make(chan struct{}), done: make(chan struct{}),
	}
	inbox := nc.NewInbox()
	w.prefix = inbox + "."
	var err error
	if w.sub, err = nc.ChanSubscribe(inbox+".*.*", w.Acks); err != nil {
		return nil, fmt.Errorf("subscribe to acknowledgements: %w", err)
	}
	w.status = nc.StatusChanged()
	go w.run()
	return w, nil
}

func (w *Wire) run() {
	defer close(w.done)
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	var last State
	for {
		now := State{w.nc.IsConnected(), w.nc.Stats().Reconnects}
		if now != last {
			last = now
			select {
			case <-w.State: // replaced before anyone has seen it
			default:
			}
			w.State <- now // the only writer, so there is room
		}
		select {
		case p := <-w.out:
			w.publish(p)
			for range len(w.out) {
				w.publish(<-w.out)
			}
		case <-w.status:
		case <-tick.C:
		case <-w.stop:
			w.nc.RemoveStatusListener(w.status)
			// It can only fail when the connection is closed, and then there is
			// nothing left to unsubscribe.
			_ = w.sub.Unsubscribe()
			return
		}
	}
}

func (w *Wire) publish(p outgoing) {
	if err := w.nc.PublishMsg(p.msg); err != nil {
		if errors.Is(err, nats.ErrMaxPayload) {
			err = fmt.Errorf("%w: %w", ErrTooLarge, err)
		}
		select {
		case w.Failed <- Failure{p.slot, p.number, err}:
		default: // it will time out
		}
	}
}

// ErrHangs says that the connection takes nothing.
var ErrHangs = errors.New("the connection hangs")

// Send hands a message over; it does not wait.
func (w *Wire) Send(m *nats.Msg, slot, number uint64) error {
	m.Reply = w.prefix + strconv.FormatUint(slot, 10) + "." + strconv.FormatUint(number, 10)
	select {
	case w.out <- outgoing{m, slot, number}:
		return nil
	default:
		return ErrHangs
	}
}

// Close lets go of the connection and leaves it open.
func (w *Wire) Close() {
	close(w.stop)
	select {
	case <-w.done:
	case <-time.After(partingTime): // it ends when the connection does
	}
}

// Message returns what is to be published for a lane's frame.
func Message(shard uint32, closing bool, data []byte) *nats.Msg {
	if closing {
		return ledger.ClosingMessage(shard, data)
	}
	return ledger.FrameMessage(shard, data)
}

// errCodeTooLarge is JetStream's "message size exceeds maximum allowed".
const errCodeTooLarge = 10054

// ErrTooLarge is the one failure that no retry can change.
var ErrTooLarge = errors.New("larger than the ledger takes")

// nobody is the slot of an answer that can't be attributed.
const nobody = math.MaxUint64

// Parse says which frame an answer is about; err is nil when it is stored.
func (w *Wire) Parse(m *nats.Msg) (slot, number uint64, err error) {
	left, right, _ := strings.Cut(strings.TrimPrefix(m.Subject, w.prefix), ".")
	slot, err1 := strconv.ParseUint(left, 10, 64)
	number, err2 := strconv.ParseUint(right, 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		return nobody, 0, err
	}
	var ack struct {
		Stream string           `json:"stream"`
		Seq    uint64           `json:"seq"`
		Error  *ledger.APIError `json:"error"`
	}
	switch err := json.Unmarshal(m.Data, &ack); {
	case len(m.Data) == 0 && m.Header.Get("Status") == "503":
		return slot, number, errors.New("its stream does not exist or has no leader")
	case err != nil:
		return slot, number, fmt.Errorf("the acknowledgement can't be read: %w", err)
	case ack.Error != nil && ack.Error.ErrCode == errCodeTooLarge:
		return slot, number, fmt.Errorf("%w: %w", ErrTooLarge, ack.Error)
	case ack.Error != nil:
		return slot, number, ack.Error
	case ack.Stream != ledger.Stream || ack.Seq == 0:
		return slot, number, fmt.Errorf("it was stored in stream %q, which is not %s", ack.Stream, ledger.Stream)
	}
	return slot, number, nil
}
