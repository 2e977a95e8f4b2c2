package outbox

import (
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

// wire is the only part that touches the connection, from one goroutine: a
// peer that hangs blocks whoever publishes, or only asks for the status, for up
// to a minute, and meanwhile the sender must go on spooling.
type wire struct {
	nc     *nats.Conn
	sub    *nats.Subscription
	status chan nats.Status
	prefix string

	acks   chan *nats.Msg
	out    chan outgoing
	failed chan failure
	state  chan connState // the newest one
	stop   chan struct{}
	done   chan struct{}
}

type outgoing struct {
	msg    *nats.Msg
	slot   uint64
	number uint64
}

// failure of a publish, before it left.
type failure struct {
	slot, number uint64
	err          error
}

type connState struct {
	connected  bool
	reconnects uint64
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

func newWire(nc *nats.Conn) (*wire, error) {
	w := &wire{
		nc: nc, acks: make(chan *nats.Msg, wireBuffer), out: make(chan outgoing, wireBuffer), failed: make(chan failure, wireBuffer),
		state: make(chan connState, 1), stop: make(chan struct{}), done: make(chan struct{}),
	}
	inbox := nc.NewInbox()
	w.prefix = inbox + "."
	var err error
	if w.sub, err = nc.ChanSubscribe(inbox+".*.*", w.acks); err != nil {
		return nil, fmt.Errorf("subscribe to acknowledgements: %w", err)
	}
	w.status = nc.StatusChanged()
	go w.run()
	return w, nil
}

func (w *wire) run() {
	defer close(w.done)
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	var last connState
	for {
		now := connState{w.nc.IsConnected(), w.nc.Stats().Reconnects}
		if now != last {
			last = now
			select {
			case <-w.state: // replaced before anyone has seen it
			default:
			}
			w.state <- now // the only writer, so there is room
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

func (w *wire) publish(p outgoing) {
	if err := w.nc.PublishMsg(p.msg); err != nil {
		select {
		case w.failed <- failure{p.slot, p.number, err}:
		default: // it will time out
		}
	}
}

var errHangs = errors.New("the connection hangs")

// send hands a message over; it does not wait.
func (w *wire) send(m *nats.Msg, slot, number uint64) error {
	m.Reply = w.prefix + strconv.FormatUint(slot, 10) + "." + strconv.FormatUint(number, 10)
	select {
	case w.out <- outgoing{m, slot, number}:
		return nil
	default:
		return errHangs
	}
}

func (w *wire) close() {
	close(w.stop)
	select {
	case <-w.done:
	case <-time.After(partingTime): // it ends when the connection does
	}
}

// message returns what is to be published for a lane's frame.
func message(shard uint32, closing bool, data []byte) *nats.Msg {
	if closing {
		return &nats.Msg{Subject: ledger.ControlSubject(shard), Header: nats.Header{ledger.CodecHeader: {ledger.CodecControl}}, Data: data}
	}
	return ledger.FrameMessage(shard, data)
}
