package history

import (
	"context"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/embedclickhouse"
	"github.com/tollkeeper/tollkeeper/services/internal/wiretest"
)

func TestAServerThatSaysNothingHoldsUpNoStop(t *testing.T) {
	t.Parallel()
	s := engine(t)
	for name, do := range map[string]func(ctx context.Context, h *History, b *Block) error{
		"insert": func(ctx context.Context, h *History, b *Block) error { return h.Parts(b)[0].Insert(ctx, unique(t)) },
		"present": func(ctx context.Context, h *History, b *Block) error {
			_, err := h.Parts(b)[0].Present(ctx)
			return err
		},
		"ping":    func(ctx context.Context, h *History, _ *Block) error { return h.Ping(ctx) },
		"migrate": func(ctx context.Context, h *History, _ *Block) error { return h.Migrate(ctx) },
		"table": func(ctx context.Context, h *History, _ *Block) error {
			_, _, err := h.TableID(ctx, "calls")
			return err
		},
		"question": func(ctx context.Context, h *History, _ *Block) error { _, err := h.Position(ctx); return err },
	} {
		for _, warm := range []bool{true, false} {
			t.Run(name+map[bool]string{true: " over a connection that was in use", false: " over a new connection"}[warm], func(t *testing.T) {
				t.Parallel()
				open(t) // the tables
				w := wiretest.New(t, s.Addr())
				h, err := Open(t.Context(), Options{
					Addrs: []string{w.Addr()}, Database: embedclickhouse.Database, User: embedclickhouse.ServiceUser, Password: s.Credentials().ServicePassword, Logger: zerolog.Nop(),
				})
				if err != nil {
					t.Fatal(err)
				}
				b := block(t, 40_000_000, noon, ksuid.New(), usage.Call{Time: noon, Account: unique(t), Status: 200})
				if warm {
					if err := do(t.Context(), h, b); err != nil {
						t.Fatal(err)
					}
				}
				w.Cut()
				ctx, cancel := context.WithCancel(t.Context())
				timer := time.AfterFunc(200*time.Millisecond, cancel)
				defer timer.Stop()
				began := time.Now()
				if err := do(ctx, h, b); err == nil {
					t.Error("it claims to have got an answer")
				}
				if err := h.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
				// Two seconds are what connecting may take.
				if took := time.Since(began); took > 2500*time.Millisecond {
					t.Errorf("the stop took %s", took)
				}
			})
		}
	}
}
