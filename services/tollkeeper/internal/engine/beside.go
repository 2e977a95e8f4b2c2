package engine

import (
	"context"

	"github.com/tollkeeper/tollkeeper/services/internal/embedclickhouse"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// Beside is a ClickHouse engine that starts while other parts do: counting and admission
// need not wait the second or more that it takes. Safe for concurrent use.
type Beside struct{ up chan struct{} }

// NewBeside returns one that Run has to start.
func NewBeside() *Beside { return &Beside{up: make(chan struct{})} }

// Elsewhere says that ClickHouse is not ours, and there already.
func (b *Beside) Elsewhere() { close(b.up) }

// Await waits until ClickHouse can be used. It returns ctx's error when that ends before.
func (b *Beside) Await(ctx context.Context) error {
	select {
	case <-b.up:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Run runs the engine until ctx is done, and calls up before Await returns.
func (b *Beside) Run(ctx context.Context, o Options, component *telemetry.Component, up func(*embedclickhouse.Server)) error {
	server, err := StartClickHouse(ctx, o, func(c embedclickhouse.StateChange) {
		if c.State == embedclickhouse.StateReady {
			component.OK()
			return
		}
		reason := "the engine is " + string(c.State)
		if c.Err != nil {
			reason += ": " + c.Err.Error()
		}
		component.NotReady(reason)
	})
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err() // a start that was cut off
		}
		return err
	}
	component.OK()
	up(server)
	close(b.up)
	<-ctx.Done()
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), StopTimeout)
	defer cancel()
	return server.Stop(stop)
}
