package aggregator

import (
	"strconv"

	"github.com/nats-io/nats.go"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/aggregator/internal/meter"
	"github.com/tollkeeper/tollkeeper/services/aggregator/internal/reply"
)

// answer answers a usage query from the state as it stands.
func (o *owner) answer(q *nats.Msg) {
	data, err := reply.Usage(o.state, o.pub.Last().Epoch, q.Data)
	if err != nil {
		refuse(o.m, q, "400", err.Error())
		return
	}
	o.m.Queries.WithLabelValues("answered").Inc()
	if err := q.RespondMsg(o.message(data)); err != nil {
		o.log.Debug().Err(err).Msg("a usage query could not be answered")
	}
}

// message is an answer, with what must be known of it.
func (o *owner) message(data []byte) *nats.Msg {
	m := &nats.Msg{Data: data}
	if !o.ready {
		m.Header = nats.Header{ledger.CountingHeader: {strconv.FormatUint(o.target, 10)}}
	}
	return m
}

func refuse(m *meter.Metrics, q *nats.Msg, code, why string) {
	m.Queries.WithLabelValues("refused").Inc()
	// Who asked gives up waiting when this does not arrive.
	_ = q.RespondMsg(&nats.Msg{Header: nats.Header{ledger.ErrorHeader: {why}, ledger.ErrorCodeHeader: {code}}})
}
