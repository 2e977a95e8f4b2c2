package aggregator

import (
	"time"

	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

const (
	// maxAnswers, and maxAnswerBytes about, bound one message to a gateway.
	maxAnswers     = 256
	maxAnswerBytes = 256 << 10
)

// answer tells gateways what follows for their leases from what was read back.
// Until the shard is counted up to where the ledger was when we took it there
// is nothing to be told: all is told then. What is lost is asked for again.
func (o *owner) answerAsks(all []quota.LeaseAnswer) {
	if len(all) == 0 || !o.ready || !o.may() {
		return
	}
	byGateway := map[lease.Gateway]*parcel{}
	var order []*parcel
	for i := range all {
		a := &all[i]
		p := byGateway[a.Gateway]
		if p == nil {
			p = &parcel{gateway: a.Gateway}
			byGateway[a.Gateway] = p
			order = append(order, p)
		}
		out, err := o.answerOf(a)
		if err != nil {
			o.log.Error().Err(err).Str("account", a.Account).Str("limit", a.LimitID).Msg("an answer about a lease cannot be written")
			continue
		}
		p.answers = append(p.answers, out)
		p.size += len(out.GetDecision()) + len(out.GetAccount()) + len(out.GetLimit()) + 64
		if len(p.answers) == maxAnswers || p.size >= maxAnswerBytes {
			o.post(p)
		}
	}
	for _, p := range order {
		o.post(p)
	}
}

// parcel is what goes to one gateway.
type parcel struct {
	gateway lease.Gateway
	answers []*tollkeeperv1.LeaseAnswer
	size    int
}

func (o *owner) post(p *parcel) {
	if len(p.answers) == 0 {
		return
	}
	data, err := proto.Marshal(&tollkeeperv1.LeaseAnswers{Shard: o.shard, Epoch: o.pub.Last().Epoch, Answers: p.answers})
	if err == nil {
		err = o.nc.Publish(ledger.AnswersSubject(ksuid.KSUID(p.gateway)), data)
	}
	if err != nil {
		// While NATS is away there is nobody to hear it; the gateway asks again.
		o.log.Debug().Err(err).Msg("answers about leases could not be sent")
	} else {
		o.m.answers.Add(float64(len(p.answers)))
	}
	p.answers, p.size = nil, 0
}

func (o *owner) answerOf(a *quota.LeaseAnswer) (*tollkeeperv1.LeaseAnswer, error) {
	out := &tollkeeperv1.LeaseAnswer{
		Account: a.Account, Limit: a.LimitID, WindowStartUnixMicros: int64(a.WindowStart), WindowEndUnixMicros: int64(a.WindowEnd),
		Revision: a.Revision, Seq: a.Seq, Granted: a.Granted, ExpiryUnixMicros: int64(a.Expiry), Room: a.Room, Recall: a.Recall,
		Standing: standings[a.Verdict],
	}
	if a.Decision == nil {
		return out, nil
	}
	d := *a.Decision
	d.Epoch = o.pub.Last().Epoch
	var err error
	out.Decision, err = ledger.MarshalDecision(&d)
	return out, err
}

var standings = [...]tollkeeperv1.LeaseAnswer_Standing{
	lease.Open: tollkeeperv1.LeaseAnswer_STANDING_OPEN, lease.Waiting: tollkeeperv1.LeaseAnswer_STANDING_WAITING,
	lease.DeniedEarly: tollkeeperv1.LeaseAnswer_STANDING_DENIED_EARLY, lease.DeniedFinal: tollkeeperv1.LeaseAnswer_STANDING_DENIED_FINAL,
	lease.Ended: tollkeeperv1.LeaseAnswer_STANDING_ENDED,
}

// tickIn is how long until time must be let pass in the shard by an entry;
// false: nothing is due. What calls wait for is not made to wait for a second.
func (o *owner) tickIn(now time.Time) (time.Duration, bool) {
	left := func(due time.Time, every time.Duration) time.Duration {
		return max(due.Sub(o.streamTime(now))+tickMargin, o.lastTick.Add(every).Sub(now))
	}
	due, ok := o.state.NextTimer()
	if !ok {
		return 0, false
	}
	wait := left(due.Time(), tickEvery)
	if due, ok := o.state.NextLease(); ok {
		wait = min(wait, left(due.Time(), leaseTickEvery))
	}
	return wait, true
}
