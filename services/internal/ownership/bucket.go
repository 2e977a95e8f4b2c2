package ownership

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/ownership/fleet"
)

// DefaultBucket is the KV bucket that a fleet meets in.
const DefaultBucket = "ownership"

const (
	kvPrefix     = "$KV."
	feedPrefix   = "feed."
	bucketBytes  = 16 << 20
	maxValue     = 64 << 10
	directGetAPI = "DIRECT.GET."
)

// JetStream's code for a conditional write while another to the same key is on
// its way, which the client has no name for.
const errCodeWriteUnderWay jetstream.ErrorCode = 10164

// bucket is where a fleet meets.
type bucket struct {
	nc       *nats.Conn
	js       jetstream.JetStream
	name     string
	replicas int
}

func (b *bucket) stream() string { return "KV_" + b.name }
func (b *bucket) prefix() string { return kvPrefix + b.name + "." }
func (b *bucket) feed() string   { return feedPrefix + b.name + ".>" }

// open makes the bucket if there is none. Sequences begin at the time of day, so
// that the tokens of a bucket that was lost and made again are newer than those
// of the lost one.
func (b *bucket) open(ctx context.Context) error {
	s, err := b.js.Stream(ctx, b.stream())
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		s, err = b.js.CreateStream(ctx, jetstream.StreamConfig{
			Name: b.stream(), Description: "Tollkeeper: which aggregator owns which shard; a KV bucket.",
			Subjects: []string{b.prefix() + ">"}, Storage: jetstream.FileStorage, Discard: jetstream.DiscardNew,
			Replicas: max(b.replicas, 1), MaxMsgsPerSubject: 1, MaxBytes: bucketBytes, MaxMsgSize: maxValue,
			Duplicates: 100 * time.Millisecond, AllowDirect: true, AllowRollup: true, DenyDelete: true, AllowMsgTTL: true,
			RePublish: &jetstream.RePublish{Source: b.prefix() + ">", Destination: b.feed()},
			FirstSeq:  uint64(time.Now().UnixMicro()),
		})
		if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
			s, err = b.js.Stream(ctx, b.stream()) // another member was faster
		}
	}
	if err != nil {
		return fmt.Errorf("bucket %s: %w", b.name, err)
	}
	c := s.CachedInfo().Config
	if !c.AllowMsgTTL || !c.AllowDirect || c.RePublish == nil || c.RePublish.Destination != b.feed() || c.MaxMsgsPerSubject != 1 {
		return fmt.Errorf("bucket %s: its stream %s must allow message TTLs and direct gets, keep one message a subject and republish to %s: delete it while no aggregator runs, and the next one makes it: %w",
			b.name, b.stream(), b.feed(), errUnfit)
	}
	return nil
}

var errUnfit = errors.New("the stream was made otherwise")

// put stores a key if it is what it is believed to be.
func (b *bucket) put(ctx context.Context, w fleet.Write) (revision uint64, result fleet.Outcome, err error) {
	m := &nats.Msg{Subject: b.prefix() + w.Key, Data: w.Value, Header: nats.Header{}}
	ledger.ExpectLast(m, w.Expect)
	if w.TTL > 0 {
		m.Header.Set(jetstream.MsgTTLHeader, w.TTL.String())
	}
	ack, err := b.js.PublishMsg(ctx, m, jetstream.WithRetryAttempts(0))
	if err == nil {
		return ack.Sequence, fleet.Stored, nil
	}
	var api *jetstream.APIError
	if errors.As(err, &api) && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || api.ErrorCode == errCodeWriteUnderWay) {
		return 0, fleet.Conflict, nil
	}
	return 0, fleet.Unknown, fmt.Errorf("store %s: %w", w.Key, err)
}

// read returns all keys as some replica has them, which may be behind.
func (b *bucket) read(ctx context.Context) ([]fleet.Entry, error) {
	// A request answers with 1,024 keys at most. Claims first: whose session
	// is named is then read after it.
	claims, err := b.last(ctx, fleet.ShardPrefix+">")
	if err != nil {
		return nil, err
	}
	sessions, err := b.last(ctx, fleet.SessionPrefix+">")
	return append(claims, sessions...), err
}

func (b *bucket) last(ctx context.Context, filter string) ([]fleet.Entry, error) {
	inbox := b.nc.NewInbox()
	sub, err := b.nc.SubscribeSync(inbox)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", filter, err)
	}
	defer func() { _ = sub.Unsubscribe() }() // a lost connection has none
	request, err := json.Marshal(map[string]any{"multi_last": []string{b.prefix() + filter}})
	if err != nil {
		return nil, err
	}
	if err := b.nc.PublishRequest(b.api()+directGetAPI+b.stream(), inbox, request); err != nil {
		return nil, fmt.Errorf("read %s: %w", filter, err)
	}
	var all []fleet.Entry
	for {
		m, err := sub.NextMsgWithContext(ctx)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", filter, err)
		}
		switch status := m.Header.Get("Status"); {
		case status == "":
			e, ok := b.entry(m)
			if !ok {
				return nil, fmt.Errorf("read %s: the answer has no subject or sequence", filter)
			}
			all = append(all, e)
		case status == "204" && m.Header.Get("Nats-Num-Pending") == "0":
			return all, nil
		case status == "404" && m.Header.Get("Description") == "No Results":
			return nil, nil
		default:
			return nil, fmt.Errorf("read %s: %s %s", filter, status, m.Header.Get("Description"))
		}
	}
}

func (b *bucket) api() string {
	o := b.js.Options()
	switch {
	case o.APIPrefix != "":
		return strings.TrimSuffix(o.APIPrefix, ".") + "."
	case o.Domain != "":
		return "$JS." + o.Domain + ".API."
	}
	return "$JS.API."
}

// entry reads a message of a reading or of the feed.
func (b *bucket) entry(m *nats.Msg) (fleet.Entry, bool) {
	key, ok := strings.CutPrefix(m.Header.Get(jetstream.SubjectHeader), b.prefix())
	revision, err := strconv.ParseUint(m.Header.Get(jetstream.SequenceHeader), 10, 64)
	return fleet.Entry{Key: key, Revision: revision, Value: m.Data}, ok && err == nil
}
