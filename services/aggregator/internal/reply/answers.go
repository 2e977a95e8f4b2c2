package reply

import (
	"errors"
	"fmt"

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

// Parcel is a message to a gateway with some answers.
type Parcel struct {
	Gateway lease.Gateway
	Data    []byte
	Answers int

	answers []*tollkeeperv1.LeaseAnswer
	size    int
}

// Answers makes messages to gateways of what an owner has to tell them, in order.
// What cannot be written is left out, and the error says why.
func Answers(shard uint32, epoch uint64, all []quota.LeaseAnswer) (out []Parcel, err error) {
	byGateway := map[lease.Gateway]*Parcel{}
	var order []*Parcel
	seal := func(p *Parcel) {
		if len(p.answers) == 0 {
			return
		}
		data, e := proto.Marshal(&tollkeeperv1.LeaseAnswers{Shard: shard, Epoch: epoch, Answers: p.answers})
		if e != nil {
			err = errors.Join(err, fmt.Errorf("marshal answers: %w", e))
		} else {
			out = append(out, Parcel{Gateway: p.Gateway, Data: data, Answers: len(p.answers)})
		}
		p.answers, p.size = nil, 0
	}
	for i := range all {
		a := &all[i]
		p := byGateway[a.Gateway]
		if p == nil {
			p = &Parcel{Gateway: a.Gateway}
			byGateway[a.Gateway] = p
			order = append(order, p)
		}
		one, e := answerOf(a, epoch)
		if e != nil {
			err = errors.Join(err, fmt.Errorf("answer about %s of %s: %w", a.LimitID, a.Account, e))
			continue
		}
		p.answers = append(p.answers, one)
		p.size += len(one.GetDecision()) + len(one.GetAccount()) + len(one.GetLimit()) + 64
		if len(p.answers) == maxAnswers || p.size >= maxAnswerBytes {
			seal(p)
		}
	}
	for _, p := range order {
		seal(p)
	}
	return out, err
}

func answerOf(a *quota.LeaseAnswer, epoch uint64) (*tollkeeperv1.LeaseAnswer, error) {
	out := &tollkeeperv1.LeaseAnswer{
		Account: a.Account, Limit: a.LimitID, WindowStartUnixMicros: int64(a.WindowStart), WindowEndUnixMicros: int64(a.WindowEnd),
		Revision: a.Revision, Seq: a.Seq, Granted: a.Granted, ExpiryUnixMicros: int64(a.Expiry), Room: a.Room, Soon: &a.Soon, Recall: a.Recall,
		Standing: standings[a.Verdict],
	}
	if a.Decision == nil {
		return out, nil
	}
	d := *a.Decision
	d.Epoch = epoch
	var err error
	out.Decision, err = ledger.MarshalDecision(&d)
	return out, err
}

var standings = [...]tollkeeperv1.LeaseAnswer_Standing{
	lease.Open: tollkeeperv1.LeaseAnswer_STANDING_OPEN, lease.Waiting: tollkeeperv1.LeaseAnswer_STANDING_WAITING,
	lease.DeniedEarly: tollkeeperv1.LeaseAnswer_STANDING_DENIED_EARLY, lease.DeniedFinal: tollkeeperv1.LeaseAnswer_STANDING_DENIED_FINAL,
	lease.Ended: tollkeeperv1.LeaseAnswer_STANDING_ENDED,
}
