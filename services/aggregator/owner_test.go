package aggregator

import (
	"context"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

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
