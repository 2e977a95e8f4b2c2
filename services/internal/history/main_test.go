package history

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/services/internal/embedclickhouse"
)

func TestMain(m *testing.M) {
	embedclickhouse.MaybeRunChild()
	code := m.Run()
	if shared.server != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		if err := shared.server.Stop(ctx); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = max(code, 1)
		}
		cancel()
		if err := os.RemoveAll(shared.dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = max(code, 1)
		}
	}
	os.Exit(code)
}

// shared is the one engine of this package's tests.
var shared struct {
	once   sync.Once
	server *embedclickhouse.Server
	dir    string
	err    error
	names  atomic.Int64
}

func engine(t testing.TB) *embedclickhouse.Server {
	t.Helper()
	shared.once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
		defer cancel()
		var path string
		if path, shared.err = embedclickhouse.Install(ctx, embedclickhouse.InstallOptions{Logger: zerolog.New(os.Stderr)}); shared.err != nil {
			return
		}
		if shared.dir, shared.err = os.MkdirTemp("", "history"); shared.err != nil {
			return
		}
		shared.server, shared.err = embedclickhouse.Start(ctx, embedclickhouse.Options{DataDir: shared.dir, EnginePath: path, Logger: zerolog.Nop()})
	})
	if shared.err != nil {
		t.Fatalf("these tests need a ClickHouse: %v", shared.err)
	}
	return shared.server
}

// open returns a migrated history. The engine's user owns one database only, so
// all tests share its tables: each takes ledger positions and accounts of its own.
func open(t testing.TB) *History {
	t.Helper()
	s := engine(t)
	h, err := Open(t.Context(), Options{
		Addrs: []string{s.Addr()}, Database: embedclickhouse.Database, User: embedclickhouse.ServiceUser, Password: s.Credentials().ServicePassword, Logger: zerolog.Nop(),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := h.Migrate(t.Context()); err != nil {
		t.Fatal(err)
	}
	return h
}

var notWord = regexp.MustCompile(`[^A-Za-z0-9]+`)

// unique is a name that no other test of this run has.
func unique(t testing.TB) string {
	return fmt.Sprintf("%s-%06d", strings.ToLower(notWord.ReplaceAllString(t.Name(), "-")), shared.names.Add(1))
}
