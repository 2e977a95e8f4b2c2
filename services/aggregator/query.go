package aggregator

import (
	"encoding/hex"
	"encoding/json"
	"fmt"

	"github.com/nats-io/nats.go"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

// Headers of an answer that is an error, as NATS's own services write them.
const (
	errorHeader     = "Nats-Service-Error"
	errorCodeHeader = "Nats-Service-Error-Code"
)

// answer answers a usage query from the state as it stands.
func (o *owner) answer(q *nats.Msg) {
	reply, err := o.usage(q.Data)
	if err != nil {
		o.m.refuse(q, "400", err.Error())
		return
	}
	o.m.queries.WithLabelValues("answered").Inc()
	if err := q.Respond(reply); err != nil {
		o.log.Debug().Err(err).Msg("a usage query could not be answered")
	}
}

func (m *metrics) refuse(q *nats.Msg, code, why string) {
	m.queries.WithLabelValues("refused").Inc()
	// Who asked gives up waiting when this does not arrive.
	_ = q.RespondMsg(&nats.Msg{Header: nats.Header{errorHeader: {why}, errorCodeHeader: {code}}})
}

func (o *owner) usage(query []byte) ([]byte, error) {
	var r ledger.UsageRequest
	if len(query) > 0 {
		if err := json.Unmarshal(query, &r); err != nil {
			return nil, fmt.Errorf("the usage request is not JSON: %w", err)
		}
	}
	if len(r.Accounts) > ledger.MaxUsageAccounts || r.Top > ledger.MaxUsageAccounts || r.Top < 0 {
		return nil, fmt.Errorf("at most %d accounts are answered at once", ledger.MaxUsageAccounts)
	}
	reply := ledger.UsageReply{
		Shard: o.shard, Epoch: o.pub.Last().Epoch, Sequence: o.state.Sequence(), StreamTime: o.state.Now(), PlanVersion: o.state.PlanVersion(),
		Total: totalsOf(o.state.Total()), AccountCount: o.state.Accounts(), Accounts: []ledger.AccountUsage{},
	}
	if !r.TotalsOnly {
		hash := o.state.Hash()
		reply.StateHash = hex.EncodeToString(hash[:])
	}
	for _, id := range r.Accounts {
		if u, ok := o.state.Account(id); ok {
			if r.TotalsOnly {
				u.Limits = nil
			}
			reply.Accounts = append(reply.Accounts, usageOf(&u))
		}
	}
	if len(r.Accounts) == 0 {
		top := o.state.Top(r.Top)
		for i := range top {
			reply.Accounts = append(reply.Accounts, usageOf(&top[i]))
		}
	}
	return json.Marshal(reply)
}
