package aggregator

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/aggregator/internal/anchor"
	"github.com/tollkeeper/tollkeeper/services/aggregator/internal/meter"
	"github.com/tollkeeper/tollkeeper/services/internal/publish"
)

// TestWhatWasBegunBeforeATenureIsNotOfTheTimeAfterIt: a state that was loaded
// meanwhile would take the place of the one that is folded.
func TestWhatWasBegunBeforeATenureIsNotOfTheTimeAfterIt(t *testing.T) {
	t.Parallel()
	o := newOwner(&service{log: zerolog.Nop()}, 0)
	loading, loaded := make(chan struct{}), false
	o.do(t.Context(), time.Minute, func(context.Context) func() error {
		<-loading
		return func() error { loaded = true; return nil }
	})
	o.tenure = &tenure{over: make(chan error, 1)}
	o.end()
	close(loading)
	if err := (<-o.results)(); err != nil || loaded {
		t.Errorf("the end of what stood by before the tenure was heard after it: %t, %v", loaded, err)
	}
}

// TestATenureEndsWhileItsDecisionsAreWritten: who writes them has what it needs.
// The race detector is what tells.
func TestATenureEndsWhileItsDecisionsAreWritten(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, time.Minute)
	m, err := meter.New(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	stores := &anchor.Stores{NC: w.nc, JS: w.js, Log: zerolog.Nop()}
	o := newOwner(&service{js: w.js, nc: w.nc, m: m, log: zerolog.Nop(), stores: stores}, 0)
	o.pub = publish.New(0, 7, publish.Checkpoint{Epoch: 1}, publish.Told{})
	o.pub.Add(5, []usage.Decision{{ID: "d", Account: "a", LimitID: "p/l", Revision: 5, Verdict: usage.Deny}})
	o.publish(t.Context(), o.pub.Next())
	o.pub = publish.Publisher{} // as the end of a tenure does
	<-o.results
}

// TestAShardThatCannotBeTakenOverInTimeIsGivenBack: otherwise it would be claimed
// and counted by nobody.
func TestAShardThatCannotBeTakenOverInTimeIsGivenBack(t *testing.T) {
	t.Parallel()
	o := newOwner(&service{log: zerolog.Nop()}, 0)
	over := make(chan error, 1)
	o.tenure = &tenure{ctx: t.Context(), over: over}
	io, cancel := context.WithTimeout(t.Context(), 0)
	defer cancel()
	<-io.Done()
	if err := o.giveUp(io, io.Err()); err != nil || o.tenure != nil || len(over) != 1 {
		t.Errorf("the tenure goes on: %v, %v", o.tenure, err)
	}
	o.tenure = &tenure{ctx: t.Context(), over: over}
	if err := o.giveUp(io, anchor.ErrForGood); !errors.Is(err, anchor.ErrForGood) || o.tenure == nil {
		t.Errorf("what does not come of the time is not told: %v", err)
	}
}

// TestAnAnswerSaysThatItsShardIsStillBeingCounted: an account that is not counted again
// yet looks as if it had used nothing.
func TestAnAnswerSaysThatItsShardIsStillBeingCounted(t *testing.T) {
	t.Parallel()
	o := newOwner(&service{log: zerolog.Nop()}, 0)
	o.target = 7
	if m := o.message([]byte("{}")); m.Header.Get(ledger.CountingHeader) != "7" || string(m.Data) != "{}" {
		t.Errorf("got %+v", m)
	}
	o.ready = true
	if m := o.message([]byte("{}")); len(m.Header) != 0 || string(m.Data) != "{}" {
		t.Errorf("got %+v", m)
	}
}

// slowObjects store when they are told to.
type slowObjects struct {
	jetstream.ObjectStore
	put  chan context.Context
	done chan struct{}
}

func (s *slowObjects) PutBytes(ctx context.Context, _ string, _ []byte) (*jetstream.ObjectInfo, error) {
	s.put <- ctx
	<-s.done
	return nil, ctx.Err()
}

// TestAHandOverDoesNotWaitForASnapshot, and does not cut it off; the end of the
// process, which would, waits.
func TestAHandOverDoesNotWaitForASnapshot(t *testing.T) {
	t.Parallel()
	stop := make(chan struct{})
	objects := &slowObjects{put: make(chan context.Context, 1), done: make(chan struct{})}
	o := newOwner(&service{log: zerolog.Nop(), objects: objects, alive: t.Context(), stop: stop}, 0)
	o.state = quota.New(quota.Options{})
	o.snapshot()
	storing := <-objects.put
	if !o.idle() {
		t.Error("who takes the shard over waits for a snapshot")
	}
	close(stop)
	if o.finalDone = true; o.idle() {
		t.Error("the process ends and cuts a snapshot off")
	}
	o.tenure = &tenure{over: make(chan error, 1)}
	o.end()
	if storing.Err() != nil {
		t.Error("the tenure's end cut the snapshot off")
	}
	close(objects.done)
	if err := (<-o.results)(); err != nil || o.pub.Offered() {
		t.Errorf("a snapshot of before is offered: %v", err)
	}
}
