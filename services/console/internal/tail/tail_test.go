package tail

import (
	"errors"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

var t0 = time.Unix(1_700_000_000, 0)

func entry(seq, pending uint64, data []byte) ledger.Message {
	return ledger.Message{Subject: ledger.CallsSubject(2), Header: nats.Header{ledger.CodecHeader: {ledger.CodecColumnar}}, Data: data, Sequence: seq, Time: t0, Pending: pending}
}

func TestOneThatFallsFarBehindSkipsToTheEnd(t *testing.T) {
	t.Parallel()
	tail := New(zerolog.Nop())
	var b ledger.Builder
	b.Add(&usage.Call{Time: usage.At(t0), Account: "a"})
	data := b.Seal(ledger.Header{Producer: ksuid.New(), Shard: 2, Number: 1})
	var f ledger.Frame
	if err := tail.handle(&f, entry(1, 10, data)); err != nil {
		t.Fatal(err)
	}
	if err := tail.handle(&f, entry(2, tailBehind+1, data)); !errors.Is(err, errBehind) {
		t.Errorf("got %v", err)
	}
	v := tail.View(usage.At(t0.Add(time.Second)), 5, 5, 5)
	if v.Skipped != tailBehind+1 || v.Calls != 2 || v.Shards[2] != 2 || v.Busiest[0].Admitted != 2 {
		t.Errorf("got %+v", v)
	}
}

func TestWhatCannotBeReadIsPassed(t *testing.T) {
	t.Parallel()
	tail := New(zerolog.Nop())
	var f ledger.Frame
	if err := tail.handle(&f, entry(7, 0, []byte("no frame"))); err != nil {
		t.Fatal(err)
	}
	if v := tail.View(usage.At(t0), 1, 1, 1); v.Sequence != 7 || v.Calls != 0 || v.Err != nil {
		t.Errorf("got %+v", v)
	}
}
