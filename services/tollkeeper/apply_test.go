package tollkeeper

import (
	"bytes"
	"context"
	"errors"
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

// ledgerOf one shard, without plans.
func ledgerOf(t *testing.T) (url string, applier *plans.Applier) {
	t.Helper()
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
	return s.ClientURL(), &plans.Applier{JS: js, NC: nc}
}

func TestWithoutATerminalApplyingSaysNothingButTheResult(t *testing.T) {
	t.Parallel()
	url, _ := ledgerOf(t)
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
	err := Apply(t.Context(), ApplyOptions{
		File: name, NATS: natsconn.Options{URL: url, Name: "apply", Logger: zerolog.Nop()}, Author: "ada", Out: &out, Stall: time.Minute,
		Confirm: func() error { out.Reset(); return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	if said := out.String(); !strings.HasPrefix(said, "applied: version ") || strings.Count(said, "\n") != 1 {
		t.Errorf("it said %q", said)
	}
}

// A file never removes what its author may not know of: not at a second apply, not at a
// restart of up, not when others apply while a person looks at the difference.
func TestAFileRemovesOnlyWhatItIsToldToRemove(t *testing.T) {
	t.Parallel()
	url, applier := ledgerOf(t)
	name := filepath.Join(t.TempDir(), "plans.yaml")
	const first = "version: 1\nplans: [{id: free, limits: [{id: a, meter: calls, window: day, amount: 5}]}]\naccounts: [{id: acme, plan: free}]\n"
	write := func(text string) {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	apply := func(edit func(*ApplyOptions)) error {
		out.Reset()
		o := ApplyOptions{File: name, NATS: natsconn.Options{URL: url, Name: "apply", Logger: zerolog.Nop()}, Author: "ada", Out: &out, Stall: time.Minute, Confirm: func() error { return nil }}
		if edit != nil {
			edit(&o)
		}
		return Apply(t.Context(), o)
	}
	held := func() *plans.Document {
		t.Helper()
		now, err := applier.Current(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return now.Document
	}
	others := func(id string) {
		t.Helper()
		_, err := applier.Change(t.Context(), "bert", func(now *plans.Document) *plans.Document {
			return plans.Merge(now, &plans.Document{Version: 1, Accounts: []plans.Account{{ID: id, Keys: []plans.Key{{ID: id + "-1", SHA256: plans.HashKey(id)}}}}})
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	write(first)
	if err := apply(nil); err != nil || !strings.Contains(out.String(), "accounts  1 added, 0 changed, 0 removed, 0 unchanged") {
		t.Fatalf("%v: %s", err, out.String())
	}
	others("since")
	write(strings.Replace(first, "amount: 5", "amount: 6", 1))
	before := plans.Version(held())

	err := apply(nil)
	if err == nil || !strings.Contains(err.Error(), "leaves out 1 account, 1 key") || !strings.Contains(err.Error(), "--remove") || !strings.Contains(out.String(), "- account since") {
		t.Errorf("left out: %v\n%s", err, out.String())
	}
	if err := apply(func(o *ApplyOptions) { o.DryRun = true }); err == nil {
		t.Error("a dry run of what would be refused succeeds")
	}
	if err := apply(func(o *ApplyOptions) {
		o.Removals, o.Confirm = plans.Keep, func() error { return ErrNotConfirmed }
	}); !errors.Is(err, ErrNotConfirmed) {
		t.Errorf("not confirmed: %v", err)
	}
	err = apply(func(o *ApplyOptions) {
		o.Removals, o.DryRun = plans.Remove, true
		o.Confirm = func() error { t.Error("a dry run asks"); return nil }
	})
	if err != nil || !strings.Contains(out.String(), "accounts  0 added, 0 changed, 1 removed, 1 unchanged") {
		t.Errorf("dry run: %v\n%s", err, out.String())
	}
	if after := plans.Version(held()); after != before {
		t.Fatalf("what was refused changed what holds from %s to %s", before, after)
	}

	var changed *plans.ChangedError
	err = apply(func(o *ApplyOptions) {
		o.Removals, o.Confirm = plans.Remove, func() error { others("meanwhile"); return nil }
	})
	if !errors.As(err, &changed) || changed.Author != "bert" || len(held().Accounts) != 3 {
		t.Errorf("others applied while it was looked at: %v, %d accounts", err, len(held().Accounts))
	}

	if err := apply(func(o *ApplyOptions) { o.Removals = plans.Keep }); err != nil {
		t.Fatal(err)
	}
	if d := held(); len(d.Accounts) != 3 || d.Plans[0].Limits[0].Amount != 6 {
		t.Errorf("kept: %+v", d)
	}
	// up with the file, at every start.
	doc, err := plans.Parse(name, []byte(first))
	if err != nil {
		t.Fatal(err)
	}
	diff, kept, err := applier.ApplyKeeping(t.Context(), doc, "up")
	if err != nil || kept != "2 accounts, 2 keys" || diff.Totals.Limits.Changed != 1 || len(held().Accounts) != 3 {
		t.Errorf("up: %v, kept %q, %+v", err, kept, diff.Totals)
	}
	write(first)
	if err := apply(func(o *ApplyOptions) { o.Removals = plans.Remove }); err != nil || len(held().Accounts) != 1 {
		t.Errorf("removed: %v, %d accounts", err, len(held().Accounts))
	}
	if err := apply(nil); err != nil || out.String() != "nothing would change: the file holds\n" {
		t.Errorf("again: %v: %s", err, out.String())
	}
}
