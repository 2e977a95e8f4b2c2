package tollkeeper

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
	"github.com/tollkeeper/tollkeeper/services/internal/natsconn"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
)

func TestProgressIsShownOfWhatTakesLong(t *testing.T) {
	t.Parallel()
	now := time.Unix(1, 0)
	var out bytes.Buffer
	p := &applyProgress{out: &out, now: func() time.Time { return now }}
	p.show(0, 0)
	for i := range 19 {
		now = now.Add(100 * time.Millisecond)
		p.show(i, 1000)
	}
	p.end()
	if out.Len() != 0 {
		t.Errorf("before two seconds: %q", out.String())
	}
	now = now.Add(200 * time.Millisecond)
	p.show(500, 1000)
	if !strings.Contains(out.String(), "entries and records") {
		t.Errorf("after two seconds: %q", out.String())
	}
	p.end()
}

func TestWithoutATerminalApplyingSaysNothingButTheResult(t *testing.T) {
	t.Parallel()
	s, err := embednats.Start(t.Context(), embednats.Options{StoreDir: t.TempDir(), MaxFile: 100 << 30})
	if err != nil {
		t.Fatal(err)
	}
	nc, err := nats.Connect(s.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		nc.Close()
		if err := s.Stop(context.Background()); err != nil {
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
	var file strings.Builder
	file.WriteString("version: 1\nplans: [{id: free}]\naccounts:\n")
	const accounts = 300
	for i := range accounts {
		fmt.Fprintf(&file, "- {id: a%d, plan: free, keys: [{id: k%d, sha256: %s}]}\n", i, i, plans.HashKey(fmt.Sprint(i)))
	}
	name := filepath.Join(t.TempDir(), "plans.yaml")
	if err := os.WriteFile(name, []byte(file.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	err = Apply(t.Context(), ApplyOptions{
		File: name, NATS: natsconn.Options{URL: s.ClientURL(), Name: "apply", Logger: zerolog.Nop()}, Author: "ada", Out: &out, Stall: time.Minute,
		Confirm: func() bool { out.Reset(); return true },
	})
	if err != nil {
		t.Fatal(err)
	}
	if said := out.String(); !strings.HasPrefix(said, "applied: version ") || strings.Count(said, "\n") != 1 {
		t.Errorf("it said %q", said)
	}
}
