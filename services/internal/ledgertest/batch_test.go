package ledgertest

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

func decision(key, value string) *nats.Msg {
	return &nats.Msg{Subject: "$KV." + ledger.DecisionsBucket + "." + key, Data: []byte(value)}
}

func lastSequence(t *testing.T, js jetstream.JetStream, stream string) uint64 {
	t.Helper()
	s, err := js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatal(err)
	}
	return s.CachedInfo().State.LastSeq
}

func TestABatchIsStoredInARowAndKVClientsCanReadIt(t *testing.T) {
	t.Parallel()
	_, nc, js := provisioned(t)
	var at uint64
	for round := 1; round <= 3; round++ {
		checkpoint := decision("checkpoint.0", fmt.Sprint(round))
		ledger.ExpectLast(checkpoint, at)
		last, err := ledger.PublishBatch(t.Context(), nc, []*nats.Msg{decision("0.a.x", "1"), decision("0.b.x", "2"), checkpoint})
		if err != nil {
			t.Fatal(err)
		}
		if last != uint64(round*3) {
			t.Fatalf("the batch ends at %d, want %d", last, round*3)
		}
		at = last
	}
	kv := bucket(t, js, ledger.DecisionsBucket)
	e, err := kv.Get(t.Context(), "checkpoint.0")
	if err != nil || string(e.Value()) != "3" || e.Revision() != 9 {
		t.Errorf("the checkpoint is %v, %v", e, err)
	}
}

func TestABatchOfAStaleOwnerIsRejectedWhole(t *testing.T) {
	t.Parallel()
	_, nc, js := provisioned(t)
	batch := func(expect uint64, n int) (uint64, error) {
		checkpoint := decision("checkpoint.0", "x")
		ledger.ExpectLast(checkpoint, expect)
		msgs := []*nats.Msg{}
		for i := range n - 1 {
			msgs = append(msgs, decision(fmt.Sprintf("0.a%d.x", i), "1"))
		}
		return ledger.PublishBatch(t.Context(), nc, append(msgs, checkpoint))
	}
	at, err := batch(0, 3)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{1, 2, 5} {
		for _, expect := range []uint64{0, at - 1, at + 7} {
			if _, err := batch(expect, n); !errors.Is(err, ledger.ErrStale) {
				t.Errorf("a batch of %d that expects %d while it is %d: %v; want ErrStale", n, expect, at, err)
			}
		}
	}
	if last := lastSequence(t, js, "KV_"+ledger.DecisionsBucket); last != at {
		t.Errorf("the stream went on from %d to %d", at, last)
	}
	if next, err := batch(at, 2); err != nil || next != at+2 {
		t.Errorf("the owner's own next batch: %d, %v", next, err)
	}
}

// The expectation may stand on the first message, too: what is behind it must
// not be stored either.
func TestAnExpectationOnAnyMessageHoldsForTheWholeBatch(t *testing.T) {
	t.Parallel()
	_, nc, js := provisioned(t)
	for at := range 3 {
		msgs := []*nats.Msg{decision("a", "1"), decision("b", "1"), decision("c", "1")}
		ledger.ExpectLast(msgs[at], 99)
		if _, err := ledger.PublishBatch(t.Context(), nc, msgs); !errors.Is(err, ledger.ErrStale) {
			t.Errorf("an expectation on message %d: %v", at, err)
		}
	}
	if last := lastSequence(t, js, "KV_"+ledger.DecisionsBucket); last != 0 {
		t.Errorf("%d messages were stored", last)
	}
}

func TestABatchIsRepublishedMessageByMessage(t *testing.T) {
	t.Parallel()
	_, nc, _ := provisioned(t)
	sub, err := nc.SubscribeSync("feed." + ledger.DecisionsBucket + ".>")
	if err != nil {
		t.Fatal(err)
	}
	want := uint64(0)
	for _, n := range []int{1, 2, 50} {
		var msgs []*nats.Msg
		for i := range n {
			msgs = append(msgs, decision(fmt.Sprintf("0.a%d.x", i), strconv.Itoa(i)))
		}
		if _, err := ledger.PublishBatch(t.Context(), nc, msgs); err != nil {
			t.Fatal(err)
		}
		for i := range n {
			m, err := sub.NextMsg(5 * time.Second)
			if err != nil {
				t.Fatal(err)
			}
			want++
			if got := m.Header.Get("Nats-Sequence"); got != fmt.Sprint(want) || string(m.Data) != strconv.Itoa(i) || m.Header.Get("Nats-Subject") != msgs[i].Subject {
				t.Fatalf("republished was %q with sequence %s of %s; want %d with %d of %s", m.Data, got, m.Header.Get("Nats-Subject"), i, want, msgs[i].Subject)
			}
		}
	}
}

func TestAMirrorFollowsBatches(t *testing.T) {
	t.Parallel()
	_, nc, js := provisioned(t)
	c, _ := mirror(t, nc, js, ledger.MirrorOptions{Bucket: ledger.DecisionsBucket})
	eventually(t, "the copy is there", func() bool { return c.is(map[string]string{}) })
	if _, err := ledger.PublishBatch(t.Context(), nc, []*nats.Msg{decision("a", "1"), decision("b", "2"), decision("a", "3")}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the copy has the batch", func() bool { return c.is(map[string]string{"a": "3", "b": "2"}) })
	if c.times("stale") != 0 {
		t.Errorf("it was called stale: %v", c.reasons)
	}
}

func TestBatchesHaveABoundedSize(t *testing.T) {
	t.Parallel()
	_, nc, js := provisioned(t)
	msgs := make([]*nats.Msg, ledger.MaxBatch+1)
	for i := range msgs {
		msgs[i] = decision(fmt.Sprint("k", i), "1")
	}
	for _, wrong := range [][]*nats.Msg{nil, msgs} {
		if _, err := ledger.PublishBatch(t.Context(), nc, wrong); err == nil {
			t.Errorf("a batch of %d was taken", len(wrong))
		}
	}
	if last := lastSequence(t, js, "KV_"+ledger.DecisionsBucket); last != 0 {
		t.Fatalf("%d messages of a batch that is too large were stored", last)
	}
	last, err := ledger.PublishBatch(t.Context(), nc, msgs[:ledger.MaxBatch])
	if err != nil || last != ledger.MaxBatch {
		t.Errorf("a batch of the greatest size: %d, %v", last, err)
	}
}

func TestABatchForAStreamThatKnowsNoneStoresNothing(t *testing.T) {
	t.Parallel()
	_, nc, js := provisioned(t)
	for _, n := range []int{1, 2} {
		var msgs []*nats.Msg
		for range n {
			msgs = append(msgs, &nats.Msg{Subject: "calls.0", Data: []byte("x")})
		}
		var api *ledger.APIError
		if _, err := ledger.PublishBatch(t.Context(), nc, msgs); !errors.As(err, &api) {
			t.Errorf("a batch of %d: %v; want JetStream's refusal", n, err)
		}
	}
	if last := lastSequence(t, js, ledger.Stream); last != 0 {
		t.Errorf("%d messages were stored", last)
	}
}

func TestABatchThatNobodyAnswersEndsWithItsContext(t *testing.T) {
	t.Parallel()
	e, nc, _ := provisioned(t)
	e.stop()
	defer e.start() // for the engine's own cleanup
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := ledger.PublishBatch(ctx, nc, []*nats.Msg{decision("a", "1")}); err == nil {
		t.Error("no error")
	}
}
