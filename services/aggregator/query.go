package aggregator

import (
	"github.com/nats-io/nats.go"

	"github.com/tollkeeper/tollkeeper/services/aggregator/internal/meter"
	"github.com/tollkeeper/tollkeeper/services/aggregator/internal/reply"
)

// Headers of an answer that is an error, as NATS's own services write them.
const (
	errorHeader     = "Nats-Service-Error"
	errorCodeHeader = "Nats-Service-Error-Code"
)

// answer answers a usage query from the state as it stands.
func (o *owner) answer(q *nats.Msg) {
	data, err := reply.Usage(o.state, o.pub.Last().Epoch, q.Data)
	if err != nil {
		refuse(o.m, q, "400", err.Error())
		return
	}
	o.m.Queries.WithLabelValues("answered").Inc()
	if err := q.Respond(data); err != nil {
		o.log.Debug().Err(err).Msg("a usage query could not be answered")
	}
}

func refuse(m *meter.Metrics, q *nats.Msg, code, why string) {
	m.Queries.WithLabelValues("refused").Inc()
	// Who asked gives up waiting when this does not arrive.
	_ = q.RespondMsg(&nats.Msg{Header: nats.Header{errorHeader: {why}, errorCodeHeader: {code}}})
}
