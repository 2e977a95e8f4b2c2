// Package leasetest checks how gateways share exact limits: gates of pkg/gate and an
// owner that folds with the core, over a real NATS server. The owner is for the tests
// of others too.
package leasetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/ledger/directory"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/fold"
)

// Owner folds the ledger with the core and answers gateways' asks, as the
// aggregator does, without decisions, snapshots and anybody who could take over. Its
// methods are safe for concurrent use.
type Owner struct {
	nc   *nats.Conn
	js   jetstream.JetStream
	fail func(error)

	mu     sync.Mutex
	states []*quota.Shard
	ahead  time.Duration // of its time
	away   bool
}

// NewOwner returns the owner of all shards, which has read nothing. fail hears of what
// should not be in a ledger.
func NewOwner(nc *nats.Conn, js jetstream.JetStream, shards uint32, fail func(error)) *Owner {
	o := &Owner{nc: nc, js: js, fail: fail}
	for s := range shards {
		o.states = append(o.states, quota.New(quota.Options{Shard: s}))
	}
	return o
}

// Run reads and answers until ctx is done.
func (o *Owner) Run(ctx context.Context) error {
	var ticking sync.WaitGroup
	defer ticking.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ticking.Go(func() {
		tick := time.NewTicker(25 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if err := o.tick(); err != nil {
					o.fail(err)
				}
			}
		}
	})
	var d fold.Decoder
	err := ledger.Read(ctx, o.js, ledger.ReadOptions{Stream: ledger.Stream}, func(m ledger.Message) error { return o.entry(&d, &m) })
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// Leave makes it silent, and comes back.
func (o *Owner) Leave(away bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.away = away
}

// Shift moves the ledger's time.
func (o *Owner) Shift(by time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ahead = by
}

// Limit is how a limit of an account stands ("<plan>/<limit>"); nothing when it is not
// known.
func (o *Owner) Limit(account, id string) quota.LimitUse {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, s := range o.states {
		use, _ := s.Account(account)
		for _, l := range use.Limits {
			if l.LimitID == id {
				return l
			}
		}
	}
	return quota.LimitUse{}
}

func (o *Owner) entry(d *fold.Decoder, m *ledger.Message) error {
	_, shard, err := ledger.ParseSubject(m.Subject)
	if err != nil {
		return err
	}
	e, _, err := d.Decode(m)
	o.mu.Lock()
	defer o.mu.Unlock()
	e.Time += usage.Micros(o.ahead.Microseconds())
	fx := o.states[shard].Apply(e)
	if fx.Invalid != nil {
		err = errors.Join(err, fx.Invalid)
	}
	if err != nil {
		o.fail(fmt.Errorf("%s: %w", m.Subject, err))
	}
	if o.away {
		return nil
	}
	for i := range fx.Answers {
		if err := o.answer(shard, &fx.Answers[i]); err != nil {
			return err
		}
	}
	return nil
}

func (o *Owner) answer(shard uint32, a *quota.LeaseAnswer) error {
	p := &tollkeeperv1.LeaseAnswer{
		Account: a.Account, Limit: a.LimitID, WindowStartUnixMicros: int64(a.WindowStart), WindowEndUnixMicros: int64(a.WindowEnd), Revision: a.Revision, Seq: a.Seq,
		Granted: a.Granted, ExpiryUnixMicros: int64(a.Expiry), Standing: tollkeeperv1.LeaseAnswer_Standing(a.Verdict), Room: a.Room, Soon: &a.Soon, Recall: a.Recall,
	}
	if a.Decision != nil {
		var err error
		if p.Decision, err = ledger.MarshalDecision(a.Decision); err != nil {
			return err
		}
	}
	data, err := proto.Marshal(&tollkeeperv1.LeaseAnswers{Shard: shard, Epoch: 1, Answers: []*tollkeeperv1.LeaseAnswer{p}})
	if err != nil {
		return err
	}
	_ = o.nc.Publish(ledger.AnswersSubject(ksuid.KSUID(a.Gateway)), data) // NATS may be away
	return nil
}

// tick lets time pass in the shards where something is due, and sends beacons.
func (o *Owner) tick() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.away {
		return nil
	}
	now := time.Now().Add(o.ahead).UnixMicro()
	for s, state := range o.states {
		if due, ok := state.NextTimer(); ok && due <= usage.Micros(now) {
			m, err := ledger.ControlMessage(uint32(s), &tollkeeperv1.ControlEntry{Id: ksuid.New().String(), Body: &tollkeeperv1.ControlEntry_Tick{Tick: &tollkeeperv1.Tick{Epoch: 1}}})
			if err != nil {
				return err
			}
			_ = o.nc.PublishMsg(m)
		}
		data, err := proto.Marshal(&tollkeeperv1.Beacon{Shard: uint32(s), Epoch: 1, StreamTimeUnixMicros: now, SentAtUnixMicros: now})
		if err != nil {
			return err
		}
		_ = o.nc.Publish(ledger.BeaconSubject(uint32(s)), data)
	}
	return nil
}

// Tell puts limits of accounts into the ledger and the directory, as plans named
// of-<account>. It is for the first time.
func Tell(ctx context.Context, js jetstream.JetStream, shards uint32, limits map[string][]usage.Limit, parents map[string]string) error {
	if err := tellLedger(ctx, js, shards, limits, parents); err != nil {
		return err
	}
	return tellDirectory(ctx, js, limits, parents)
}

func tellLedger(ctx context.Context, js jetstream.JetStream, shards uint32, limits map[string][]usage.Limit, parents map[string]string) error {
	set := tollkeeperv1.PlanSet{Version: ksuid.New().String()}
	accounts := make([]tollkeeperv1.AccountSet, shards)
	for account, l := range limits {
		plan := usage.Plan{ID: "of-" + account, Limits: l}
		set.Plans = append(set.Plans, ledger.PlanToProto(&plan))
		root := account
		for parents[root] != "" {
			root = parents[root]
		}
		of := &accounts[ledger.ShardOf(root, shards)]
		of.Accounts = append(of.Accounts, &tollkeeperv1.Account{Id: account, Parent: parents[account], Plan: plan.ID})
	}
	for s := range shards {
		for _, e := range []*tollkeeperv1.ControlEntry{
			{Id: ksuid.New().String(), Body: &tollkeeperv1.ControlEntry_PlanSet{PlanSet: &set}},
			{Id: ksuid.New().String(), Body: &tollkeeperv1.ControlEntry_AccountSet{AccountSet: &accounts[s]}},
		} {
			m, err := ledger.ControlMessage(s, e)
			if err != nil {
				return err
			}
			if _, err := js.PublishMsg(ctx, m); err != nil {
				return err
			}
		}
	}
	return nil
}

func tellDirectory(ctx context.Context, js jetstream.JetStream, limits map[string][]usage.Limit, parents map[string]string) error {
	kv, err := js.KeyValue(ctx, ledger.DirectoryBucket)
	if err != nil {
		return err
	}
	for id, of := range limits {
		plan := usage.Plan{ID: "of-" + id, Limits: of}
		if err := PutPlan(ctx, kv, plan); err != nil {
			return err
		}
		if err := PutAccount(ctx, kv, directory.Account{ID: id, Parent: parents[id], Plan: plan.ID}); err != nil {
			return err
		}
	}
	return nil
}

// PutPlan puts a plan into the directory's bucket, beside those that are there.
func PutPlan(ctx context.Context, kv jetstream.KeyValue, p usage.Plan) error {
	return edit(ctx, kv, directory.PlansKey, func(set *tollkeeperv1.PlanSet) {
		set.Plans = slices.DeleteFunc(set.Plans, func(old *tollkeeperv1.Plan) bool { return old.GetId() == p.ID })
		set.Plans = append(set.Plans, ledger.PlanToProto(&p))
	})
}

// PutAccount puts an account into the directory's bucket, beside those that are there.
func PutAccount(ctx context.Context, kv jetstream.KeyValue, a directory.Account) error {
	return edit(ctx, kv, directory.AccountsKey(directory.AccountPart(a.ID)), func(all *tollkeeperv1.DirectoryAccounts) {
		all.Accounts = slices.DeleteFunc(all.Accounts, func(old *tollkeeperv1.DirectoryAccount) bool { return old.GetId() == a.ID })
		all.Accounts = append(all.Accounts, &tollkeeperv1.DirectoryAccount{Id: a.ID, Parent: a.Parent, Plan: a.Plan})
		slices.SortFunc(all.Accounts, func(x, y *tollkeeperv1.DirectoryAccount) int { return strings.Compare(x.GetId(), y.GetId()) })
	})
}

// PutKey puts an API key into the directory's bucket, beside those that are there.
func PutKey(ctx context.Context, kv jetstream.KeyValue, k directory.Key) error {
	return edit(ctx, kv, directory.KeysKey(directory.KeyPart(k.Hash)), func(all *tollkeeperv1.DirectoryKeys) {
		all.Keys = slices.DeleteFunc(all.Keys, func(old *tollkeeperv1.DirectoryKey) bool { return bytes.Equal(old.GetSha256(), k.Hash[:]) })
		all.Keys = append(all.Keys, &tollkeeperv1.DirectoryKey{Sha256: k.Hash[:], KeyId: k.ID, Account: k.Account})
		slices.SortFunc(all.Keys, func(x, y *tollkeeperv1.DirectoryKey) int { return bytes.Compare(x.GetSha256(), y.GetSha256()) })
	})
}

// edit changes a record; it is for one writer.
func edit[M any, P interface {
	*M
	proto.Message
}](ctx context.Context, kv jetstream.KeyValue, key string, change func(P)) error {
	m := P(new(M))
	e, err := kv.Get(ctx, key)
	switch {
	case err == nil:
		if err := proto.Unmarshal(e.Value(), m); err != nil {
			return err
		}
	case !errors.Is(err, jetstream.ErrKeyNotFound):
		return err
	}
	change(m)
	data, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	_, err = kv.Put(ctx, key, data)
	return err
}
