package ledgertest

import (
	"bytes"
	"encoding/json"
	"errors"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
)

func portOf(t *testing.T, addr string) int {
	t.Helper()
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestServicesThatProvisionAtOnceAgreeOnOneGeometry(t *testing.T) {
	t.Parallel()
	e := newEngine(t, embednats.Options{})
	var wg sync.WaitGroup
	got := make([]ledger.Geometry, 6)
	for i := range got {
		_, js := e.connect()
		wg.Go(func() {
			g, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{Shards: uint32(i + 1)})
			if err != nil {
				t.Error(err)
			}
			got[i] = g
		})
	}
	wg.Wait()
	_, js := e.connect()
	want, err := ledger.ReadGeometry(t.Context(), js)
	if err != nil {
		t.Fatal(err)
	}
	for i, g := range got {
		if g != want {
			t.Errorf("caller %d was told %+v, the ledger has %+v", i, g, want)
		}
	}
	again, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{Shards: 64})
	if err != nil || again != want {
		t.Errorf("a later call for 64 shards gave %+v, %v; want the ledger's own %+v", again, err, want)
	}
	for name := range js.StreamNames(t.Context()).Name() {
		if strings.HasPrefix(name, "TOLLKEEPER_") {
			t.Errorf("the stream %s was left behind", name)
		}
	}
	// There is room for all, but not for two callers that look for it at once.
	s, err := js.Stream(t.Context(), ledger.Stream)
	if err != nil || s.CachedInfo().Config.MaxBytes != 64<<30 {
		t.Errorf("the ledger is %+v, %v; want its whole size", s.CachedInfo().Config, err)
	}
}

// Costs are in one currency from the ledger's birth to its end.
func TestTheCurrencyOfALedgerIsThatOfItsBirth(t *testing.T) {
	t.Parallel()
	_, js := newEngine(t, embednats.Options{}).connect()
	for _, c := range []struct {
		currency string
		taken    bool
	}{{"euro", false}, {"EUR", true}, {"", true}, {"USD", false}, {"EUR", true}} {
		g, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{Shards: 1, Currency: c.currency})
		if (err == nil) != c.taken || c.taken && g.Currency != "EUR" {
			t.Errorf("%q: %+v, %v", c.currency, g, err)
		}
	}
	_, js = newEngine(t, embednats.Options{}).connect()
	if g, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{}); err != nil || g.Currency != usage.DefaultCurrency {
		t.Errorf("where nothing is said: %+v, %v", g, err)
	}
	// A ledger from before it said its currency.
	kv, err := js.KeyValue(t.Context(), ledger.ConfigBucket)
	if err != nil {
		t.Fatal(err)
	}
	if err := kv.Purge(t.Context(), "ledger.currency"); err != nil {
		t.Fatal(err)
	}
	if g, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{}); err != nil || g.Currency != usage.DefaultCurrency {
		t.Errorf("of an old ledger: %+v, %v", g, err)
	}
	if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{Currency: "EUR"}); err == nil || !strings.Contains(err.Error(), "--currency") {
		t.Errorf("an old ledger is given another currency, or the flag is not named: %v", err)
	}
}

func TestAProvisionedStreamIsLeftAsTheOperatorTunedIt(t *testing.T) {
	t.Parallel()
	_, _, js := provisioned(t)
	s, err := js.Stream(t.Context(), ledger.Stream)
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	cfg.MaxBytes = 1 << 30
	if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{}); err != nil {
		t.Fatal(err)
	}
	if s, err = js.Stream(t.Context(), ledger.Stream); err != nil || s.CachedInfo().Config.MaxBytes != 1<<30 {
		t.Errorf("the stream has %+v, %v; want the operator's 1 GiB", s.CachedInfo().Config, err)
	}
}

// A ledger that an older version made does not know all subjects: they are added,
// and nothing else of what an operator has tuned is changed.
func TestALedgerOfAnOlderVersionIsGivenTheSubjectsThatItLacks(t *testing.T) {
	t.Parallel()
	_, _, js := provisioned(t)
	s, err := js.Stream(t.Context(), ledger.Stream)
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	whole := cfg.Subjects
	cfg.Subjects, cfg.MaxBytes = []string{ledger.AllCalls, ledger.AllControl, ledger.AllLeases}, 1<<30
	if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(t.Context(), ledger.ClosingsSubject(0), nil); err == nil {
		t.Fatal("the old ledger takes closings")
	}
	for range 2 {
		if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{Notice: func(text string) { t.Error(text) }}); err != nil {
			t.Fatal(err)
		}
	}
	if s, err = js.Stream(t.Context(), ledger.Stream); err != nil || !slices.Equal(s.CachedInfo().Config.Subjects, whole) || s.CachedInfo().Config.MaxBytes != 1<<30 {
		t.Errorf("the stream has %+v, %v; want %v and the operator's 1 GiB", s.CachedInfo().Config, err, whole)
	}
	if _, err := js.Publish(t.Context(), ledger.ClosingsSubject(0), nil); err != nil {
		t.Errorf("a closing: %v", err)
	}
}

// Every field of streams.json must come back from the server: a misspelt one
// would be dropped in silence, by nats.go or by the server.
func TestEveryFieldOfTheDefinitionsReachesTheServer(t *testing.T) {
	t.Parallel()
	_, _, js := provisioned(t)
	var defs struct {
		Streams []map[string]any
		Buckets []map[string]any
		Objects []map[string]any
	}
	d := json.NewDecoder(bytes.NewReader(schemas.Streams))
	if err := d.Decode(&defs); err != nil {
		t.Fatal(err)
	}
	for _, want := range defs.Streams {
		name := want["name"].(string)
		s, err := js.Stream(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := json.Marshal(s.CachedInfo().Config)
		if err != nil {
			t.Fatal(err)
		}
		var got map[string]any
		if err := json.Unmarshal(raw, &got); err != nil {
			t.Fatal(err)
		}
		for k, v := range want {
			g, w := mustJSON(t, got[k]), mustJSON(t, v)
			if k == "max_age" && g == "null" {
				g = "0"
			}
			if k == "compression" && g == "null" {
				g = `"none"`
			}
			if g != w {
				t.Errorf("stream %s: %s is %s at the server, %s in streams.json", name, k, g, w)
			}
		}
	}
	for _, want := range defs.Buckets {
		if _, err := js.KeyValue(t.Context(), want["bucket"].(string)); err != nil {
			t.Error(err)
		}
	}
	for _, want := range defs.Objects {
		if _, err := js.ObjectStore(t.Context(), want["bucket"].(string)); err != nil {
			t.Error(err)
		}
	}
}

func mustJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestKVClientsCanUseTheBucketsThatAreMadeAsStreams(t *testing.T) {
	t.Parallel()
	_, _, js := provisioned(t)
	for _, bucket := range []string{ledger.DecisionsBucket, ledger.DirectoryBucket, ledger.ConfigBucket, ledger.HistorianBucket, ledger.AlerterBucket} {
		kv, err := js.KeyValue(t.Context(), bucket)
		if err != nil {
			t.Errorf("open %s: %v", bucket, err)
			continue
		}
		if _, err := kv.Put(t.Context(), "a.b", []byte("1")); err != nil {
			t.Errorf("put in %s: %v", bucket, err)
		}
		if e, err := kv.Get(t.Context(), "a.b"); err != nil || string(e.Value()) != "1" {
			t.Errorf("get from %s: %v, %v", bucket, e, err)
		}
		if err := kv.Purge(t.Context(), "a.b"); err != nil {
			t.Errorf("purge in %s: %v", bucket, err)
		}
		if _, err := kv.Get(t.Context(), "a.b"); !errors.Is(err, jetstream.ErrKeyNotFound) {
			t.Errorf("get a purged key from %s: %v", bucket, err)
		}
	}
}

func TestOnASmallDiskEveryStreamIsMadeSmallerAlike(t *testing.T) {
	t.Parallel()
	for name, free := range map[string]int64{"just the ledger would fit": 65 << 30, "a laptop": 20 << 30, "a container": 1 << 30} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newEngine(t, embednats.Options{MaxFile: free})
			_, js := e.connect()
			told := ""
			if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{Notice: func(s string) { told = s }}); err != nil {
				t.Fatal(err)
			}
			if told == "" {
				t.Error("nobody was told")
			}
			size := func(name string) int64 {
				s, err := js.Stream(t.Context(), name)
				if err != nil {
					t.Fatal(err)
				}
				return s.CachedInfo().Config.MaxBytes
			}
			l, d := size(ledger.Stream), size("KV_"+ledger.DecisionsBucket)
			if l/d != 8 || l < free/4 {
				t.Errorf("of %d bytes the ledger got %d and the decisions %d; want eight to one, and a fair part of the disk", free, l, d)
			}
		})
	}
	t.Run("far too little", func(t *testing.T) {
		t.Parallel()
		e := newEngine(t, embednats.Options{MaxFile: 100 << 20})
		_, js := e.connect()
		_, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{})
		if err == nil || !strings.Contains(err.Error(), "free disk space or raise its limit") {
			t.Errorf("got %v; want an error that says what to do", err)
		}
	})
}
