package tollkeeper

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/corrections"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/wiretest"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/explanation"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/statehash"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
)

// away is how long these tests' commands wait for NATS.
const away = time.Second

func planFile(t *testing.T) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "plans.yaml")
	if err := os.WriteFile(name, []byte("version: 1\nplans: [{id: free}]\naccounts: [{id: a, plan: free}]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func soon(t *testing.T, err error, began time.Time, says ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %s", took)
	}
	for _, part := range says {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q lacks %q", err, part)
		}
	}
	if strings.Contains(err.Error(), "in part") {
		t.Errorf("%q", err)
	}
}

// Whatever is typed while NATS is away says so, and of what it was to change that
// nothing was changed.
func TestEveryCommandSaysSoonThatNATSIsAway(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	o := natsconn.Options{URL: "nats://" + l.Addr().String(), Logger: zerolog.Nop()}
	act := corrections.Act{Author: "ada", Account: "a", Reason: "r", Adjustments: map[usage.Meter]int64{"calls": -1}}
	for name, c := range map[string]struct {
		run  func(ctx context.Context) error
		says string
	}{
		"apply": {func(ctx context.Context) error {
			return Apply(ctx, ApplyOptions{File: planFile(t), NATS: o, Wait: away, Stall: time.Minute, Out: io.Discard, Confirm: func() error { return nil }})
		}, "nothing was changed: "},
		"correct": {func(ctx context.Context) error {
			return Correct(ctx, CorrectOptions{Act: act, NATS: o, Wait: away, Out: io.Discard})
		}, "nothing was corrected: "},
		"explain": {func(ctx context.Context) error {
			return explanation.Print(ctx, explanation.Options{ID: ksuid.New().String(), NATS: o, Wait: away, Out: io.Discard})
		}, ""},
		"audit": {func(ctx context.Context) error {
			return statehash.Print(ctx, statehash.Options{NATS: o, Wait: away, Out: io.Discard})
		}, ""},
		"replay": {func(ctx context.Context) error {
			_, err := Replay(ctx, ReplayOptions{NATS: o, Wait: away, Rows: []trace.Row{{}}})
			return err
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			began := time.Now()
			soon(t, c.run(t.Context()), began, c.says, "can't be reached within", "connection refused", "--nats-url", "--nats-wait")
		})
	}
}

func TestAReplaySaysSoonThatClickHouseIsAway(t *testing.T) {
	t.Parallel()
	srv, err := embednats.Start(t.Context(), embednats.Options{StoreDir: t.TempDir(), MaxFile: 100 << 30})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := srv.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{Shards: 1}); err != nil {
		t.Fatal(err)
	}
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = silent.Close() })
	for name, addr := range map[string]string{"nothing listens": "127.0.0.1:1", "it says nothing": silent.Addr().String()} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			began := time.Now()
			_, err := Replay(ctx, ReplayOptions{
				NATS: natsconn.Options{URL: srv.ClientURL(), Logger: zerolog.Nop()}, ClickHouse: history.Options{Addrs: []string{addr}, Logger: zerolog.Nop()},
				Wait: away, Rows: []trace.Row{{}},
			})
			soon(t, err, began, "ClickHouse at "+addr+" can't be reached within 1s", "--clickhouse-addr", "--nats-wait")
		})
	}
}

func TestAnApplyThatLosesNATSBeforeItsFirstWriteChangedNothing(t *testing.T) {
	t.Parallel()
	srv, err := embednats.Start(t.Context(), embednats.Options{StoreDir: t.TempDir(), MaxFile: 100 << 30})
	if err != nil {
		t.Fatal(err)
	}
	nc, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		nc.Close()
		if err := srv.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{Shards: 1}); err != nil {
		t.Fatal(err)
	}
	w := wiretest.New(t, srv.Addr().String())
	var out strings.Builder
	began := time.Now()
	err = Apply(t.Context(), ApplyOptions{
		File: planFile(t), NATS: natsconn.Options{URL: "nats://" + w.Addr(), Logger: zerolog.Nop()}, Wait: away, Stall: time.Minute, Out: &out,
		Confirm: func() error { w.Cut(); return nil }, // while somebody makes up his mind
	})
	soon(t, err, began, "nothing was changed: ", "went away", "--nats-wait")
	if !strings.Contains(out.String(), "free") {
		t.Errorf("what would change was not shown: %q", out.String())
	}
}

func TestAnApplyThatMayHaveChangedSomethingSaysHowToGoOn(t *testing.T) {
	t.Parallel()
	for cause, part := range map[error]string{
		errors.New("refused"):    "apply it again, which completes what was begun",
		context.DeadlineExceeded: "--timeout",
	} {
		err := error(&PartialError{Stall: time.Minute, Err: cause})
		if !errors.Is(err, cause) || !strings.Contains(err.Error(), "perhaps applied in part") || !strings.Contains(err.Error(), part) {
			t.Errorf("%v", err)
		}
	}
}
