package ledgertest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

// copyOf is what a mirror keeps, with a record of what happened to it.
type copyOf struct {
	mu      sync.Mutex
	keys    map[string]string
	newest  map[string]uint64
	events  []string // "reset", "stale", "apply"
	reasons []error
	wrong   []string
}

func (c *copyOf) Reset(all []ledger.Change) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.events = append(c.events, "reset")
	c.keys, c.newest = map[string]string{}, map[string]uint64{}
	for _, ch := range all {
		if _, twice := c.keys[ch.Key]; twice || ch.Value == nil {
			c.wrong = append(c.wrong, "a reset has a key twice, or a deleted one: "+ch.Key)
		}
		c.keys[ch.Key], c.newest[ch.Key] = string(ch.Value), ch.Sequence
	}
}

func (c *copyOf) Apply(ch ledger.Change) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.events = append(c.events, "apply")
	if ch.Sequence <= c.newest[ch.Key] {
		c.wrong = append(c.wrong, fmt.Sprintf("%s went back from %d to %d", ch.Key, c.newest[ch.Key], ch.Sequence))
	}
	c.newest[ch.Key] = ch.Sequence
	if ch.Value == nil {
		delete(c.keys, ch.Key)
		return
	}
	c.keys[ch.Key] = string(ch.Value)
}

func (c *copyOf) Stale(reason error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.events = append(c.events, "stale")
	c.reasons = append(c.reasons, reason)
}

func (c *copyOf) is(want map[string]string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.keys != nil && maps.Equal(c.keys, want)
}

func (c *copyOf) times(event string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, e := range c.events {
		if e == event {
			n++
		}
	}
	return n
}

func mirror(t *testing.T, nc *nats.Conn, js jetstream.JetStream, o ledger.MirrorOptions) (*copyOf, *ledger.Mirror) {
	t.Helper()
	if o.Bucket == "" {
		o.Bucket = ledger.DirectoryBucket
	}
	c := &copyOf{}
	m := ledger.NewMirror(nc, js, o, c)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := m.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		for _, w := range c.wrong {
			t.Error(w)
		}
	})
	return c, m
}

func bucket(t *testing.T, js jetstream.JetStream, name string) jetstream.KeyValue {
	t.Helper()
	kv, err := js.KeyValue(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return kv
}

func put(t *testing.T, kv jetstream.KeyValue, key, value string) {
	t.Helper()
	if _, err := kv.Put(t.Context(), key, []byte(value)); err != nil {
		t.Fatal(err)
	}
}

func TestAMirrorHasAllKeysThenEveryChange(t *testing.T) {
	t.Parallel()
	for _, name := range []string{ledger.DecisionsBucket, ledger.DirectoryBucket} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, nc, js := provisioned(t)
			kv := bucket(t, js, name)
			put(t, kv, "a.1", "old")
			put(t, kv, "a.1", "1")
			put(t, kv, "b.2", "2")
			put(t, kv, "gone", "x")
			put(t, kv, "empty", "")
			if err := kv.Delete(t.Context(), "gone"); err != nil {
				t.Fatal(err)
			}
			c, _ := mirror(t, nc, js, ledger.MirrorOptions{Bucket: name})
			eventually(t, "the copy has all keys", func() bool { return c.is(map[string]string{"a.1": "1", "b.2": "2", "empty": ""}) })
			put(t, kv, "a.1", "3")
			put(t, kv, "c", "4")
			if err := kv.Purge(t.Context(), "b.2"); err != nil {
				t.Fatal(err)
			}
			if err := kv.Delete(t.Context(), "empty"); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the copy has the changes", func() bool { return c.is(map[string]string{"a.1": "3", "c": "4"}) })
			if c.times("reset") != 1 || c.times("stale") != 0 || c.times("apply") != 4 {
				t.Errorf("the copy saw %v", c.events)
			}
		})
	}
}

func TestAnEmptyBucketIsMirroredToo(t *testing.T) {
	t.Parallel()
	_, nc, js := provisioned(t)
	c, _ := mirror(t, nc, js, ledger.MirrorOptions{})
	eventually(t, "the copy is reset", func() bool { return c.is(map[string]string{}) })
	if n := consumers(t, js, "KV_"+ledger.DirectoryBucket); n != 0 {
		t.Errorf("%d consumers were left at the server", n)
	}
}

// Keys are overwritten while mirrors read them: a reset must have every key
// that was there all the time, and no change may go back.
func TestAMirrorThatBeginsAmidWritesMissesNoKey(t *testing.T) {
	t.Parallel()
	_, nc, js := provisioned(t)
	kv := bucket(t, js, ledger.DirectoryBucket)
	const keys = 200
	want := map[string]string{}
	for i := range keys {
		put(t, kv, fmt.Sprint("k", i), "0")
		want[fmt.Sprint("k", i)] = "0"
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		rng := rand.New(rand.NewPCG(1, 1))
		for n := 1; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			k, v := fmt.Sprint("k", rng.IntN(keys)), fmt.Sprint(n)
			if _, err := kv.Put(context.Background(), k, []byte(v)); err != nil {
				t.Error(err)
				return
			}
			want[k] = v
		}
	}()
	var copies []*copyOf
	for range 10 {
		c, _ := mirror(t, nc, js, ledger.MirrorOptions{})
		copies = append(copies, c)
		eventually(t, "the copy is reset", func() bool { return c.times("reset") > 0 })
		c.mu.Lock()
		if len(c.keys) != keys {
			t.Errorf("a reset amid writes has %d of %d keys", len(c.keys), keys)
		}
		c.mu.Unlock()
	}
	close(stop)
	<-stopped
	for _, c := range copies {
		eventually(t, "the copy has the last writes", func() bool { return c.is(want) })
		if c.times("stale") != 0 {
			t.Errorf("writes alone made the copy stale: %v", c.reasons)
		}
	}
}

// drop sends a message on the feed's subject that says it is a change far
// ahead, as if those before it had been lost.
func forge(t *testing.T, nc *nats.Conn, bucket string, sequence uint64) {
	t.Helper()
	m := nats.NewMsg("feed." + bucket + ".x")
	m.Header.Set("Nats-Sequence", fmt.Sprint(sequence))
	m.Header.Set("Nats-Subject", "$KV."+bucket+".x")
	if err := nc.PublishMsg(m); err != nil {
		t.Fatal(err)
	}
}

func TestALostChangeMakesTheMirrorReadAllAnew(t *testing.T) {
	t.Parallel()
	_, nc, js := provisioned(t)
	kv := bucket(t, js, ledger.DirectoryBucket)
	put(t, kv, "a", "1")
	c, _ := mirror(t, nc, js, ledger.MirrorOptions{})
	eventually(t, "the copy is there", func() bool { return c.is(map[string]string{"a": "1"}) })
	forge(t, nc, ledger.DirectoryBucket, 5)
	eventually(t, "the copy is reset", func() bool { return c.times("reset") == 2 })
	if c.times("stale") != 1 || !c.is(map[string]string{"a": "1"}) {
		t.Errorf("the copy saw %v and has %v", c.events, c.keys)
	}
	put(t, kv, "a", "2")
	eventually(t, "changes come again", func() bool { return c.is(map[string]string{"a": "2"}) })
}

// silence stops the republishing of a bucket, so that changes are stored and
// nobody hears of them.
func silence(t *testing.T, js jetstream.JetStream, bucket string) (restore func()) {
	t.Helper()
	s, err := js.Stream(t.Context(), "KV_"+bucket)
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	quiet := cfg
	quiet.RePublish = &jetstream.RePublish{Source: cfg.RePublish.Source, Destination: "elsewhere." + bucket + ".>"}
	if _, err := js.UpdateStream(t.Context(), quiet); err != nil {
		t.Fatal(err)
	}
	return func() {
		if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAnAnnouncedChangeThatDoesNotComeMakesTheMirrorReadAllAnew(t *testing.T) {
	t.Parallel()
	_, nc, js := provisioned(t)
	kv := bucket(t, js, ledger.DirectoryBucket)
	put(t, kv, "a", "1")
	c, m := mirror(t, nc, js, ledger.MirrorOptions{Check: time.Hour})
	eventually(t, "the copy is there", func() bool { return c.is(map[string]string{"a": "1"}) })
	restore := silence(t, js, ledger.DirectoryBucket)
	defer restore()
	put(t, kv, "a", "2")
	m.Announce(1) // known
	m.Announce(2)
	eventually(t, "the copy has the change", func() bool { return c.is(map[string]string{"a": "2"}) })
	if c.times("stale") == 0 {
		t.Error("it was not called stale")
	}
}

// Beacons of many shards come more often than a change's grace lasts; they
// must not put off the finding that nothing arrives.
func TestAnnouncementsWithoutPauseDoNotHideALostChange(t *testing.T) {
	t.Parallel()
	_, nc, js := provisioned(t)
	kv := bucket(t, js, ledger.DirectoryBucket)
	put(t, kv, "a", "1")
	c, m := mirror(t, nc, js, ledger.MirrorOptions{Check: time.Hour})
	eventually(t, "the copy is there", func() bool { return c.is(map[string]string{"a": "1"}) })
	restore := silence(t, js, ledger.DirectoryBucket)
	defer restore()
	eventually(t, "the copy is stale", func() bool {
		rev, err := kv.Put(t.Context(), "a", []byte("2"))
		if err != nil {
			t.Fatal(err)
		}
		m.Announce(rev)
		return c.times("stale") > 0
	})
}

func TestAChangeThatNobodyAnnouncedIsFoundByTheCheck(t *testing.T) {
	t.Parallel()
	_, nc, js := provisioned(t)
	kv := bucket(t, js, ledger.DirectoryBucket)
	put(t, kv, "a", "1")
	c, _ := mirror(t, nc, js, ledger.MirrorOptions{Check: 50 * time.Millisecond})
	eventually(t, "the copy is there", func() bool { return c.is(map[string]string{"a": "1"}) })
	restore := silence(t, js, ledger.DirectoryBucket)
	defer restore()
	put(t, kv, "a", "2")
	eventually(t, "the copy has the change", func() bool { return c.is(map[string]string{"a": "2"}) })
}

func TestChecksDuringSteadyWritesDoNotMakeTheMirrorStale(t *testing.T) {
	t.Parallel()
	_, nc, js := provisioned(t)
	kv := bucket(t, js, ledger.DecisionsBucket)
	c, m := mirror(t, nc, js, ledger.MirrorOptions{Bucket: ledger.DecisionsBucket, Check: 2 * time.Millisecond})
	eventually(t, "the copy is there", func() bool { return c.is(map[string]string{}) })
	for i := range 1000 {
		rev, err := kv.Put(t.Context(), fmt.Sprint("k", i%7), []byte("x"))
		if err != nil {
			t.Fatal(err)
		}
		m.Announce(rev)
	}
	eventually(t, "all changes have come", func() bool { return c.times("apply") == 1000 })
	if c.times("stale") != 0 {
		t.Errorf("it was called stale: %v", c.reasons)
	}
}

func TestARestartOfTheServerMakesTheMirrorStaleAndThenCurrent(t *testing.T) {
	t.Parallel()
	e, nc, js := provisioned(t)
	kv := bucket(t, js, ledger.DirectoryBucket)
	put(t, kv, "a", "1")
	// The check must have no part in it.
	c, _ := mirror(t, nc, js, ledger.MirrorOptions{Check: time.Hour})
	eventually(t, "the copy is there", func() bool { return c.is(map[string]string{"a": "1"}) })
	e.stop()
	eventually(t, "the copy is stale while the server is away", func() bool { return c.times("stale") > 0 })
	if c.times("reset") != 1 {
		t.Errorf("the copy saw %v", c.events)
	}
	e.start()
	eventually(t, "the copy is reset", func() bool { return c.times("reset") > 1 })
	eventually(t, "a key can be written", func() bool { _, err := kv.Put(t.Context(), "a", []byte("2")); return err == nil })
	eventually(t, "changes come again", func() bool { return c.is(map[string]string{"a": "2"}) })
}

// A link that breaks before everything is through, again and again, still brings all in
// the end, also while the bucket is written to; one word a hundred messages tells how far.
func TestAMirrorOverALinkThatBreaksGoesOnWhereItWas(t *testing.T) {
	t.Parallel()
	for _, name := range []string{ledger.DecisionsBucket, ledger.DirectoryBucket} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, _, js := provisioned(t)
			kv := bucket(t, js, name)
			const keys = 600
			value := strings.Repeat("x", 8<<10)
			want := map[string]string{}
			for i := range keys {
				key := fmt.Sprint("k", i)
				want[key] = fmt.Sprint(i, value)
				if _, err := js.PublishAsync("$KV."+name+"."+key, []byte(want[key])); err != nil {
					t.Fatal(err)
				}
			}
			select {
			case <-js.PublishAsyncComplete():
			case <-t.Context().Done():
			}
			if err := kv.Delete(t.Context(), "k7"); err != nil {
				t.Fatal(err)
			}
			delete(want, "k7")

			// Each connection breaks after a fourth of it; each time something was
			// changed, written anew and deleted that may have been read already.
			var mu sync.Mutex
			breaks := 0
			addr := brittle(t, e.s.Addr().String(), keys*len(value)/4, func() {
				mu.Lock()
				defer mu.Unlock()
				breaks++
				for i, key := range []string{"k0", fmt.Sprint("new", breaks), fmt.Sprint("k", keys-1)} {
					want[key] = fmt.Sprint("again ", breaks, i)
					if _, err := kv.Put(t.Context(), key, []byte(want[key])); err != nil {
						t.Error(err)
					}
				}
				gone := fmt.Sprint("k", 10*breaks)
				if err := kv.Delete(t.Context(), gone); err != nil {
					t.Error(err)
				}
				delete(want, gone)
			})
			nc, err := nats.Connect("nats://"+addr, nats.MaxReconnects(-1), nats.ReconnectWait(time.Millisecond))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(nc.Close)
			over, err := jetstream.New(nc)
			if err != nil {
				t.Fatal(err)
			}
			var told []uint64
			c, _ := mirror(t, nc, over, ledger.MirrorOptions{Bucket: name, Progress: func(read, of uint64) {
				mu.Lock()
				defer mu.Unlock()
				if told = append(told, read); read > of {
					t.Errorf("%d of %d are read", read, of)
				}
			}})
			eventually(t, "the copy is whole", func() bool {
				mu.Lock()
				defer mu.Unlock()
				return c.is(want)
			})
			mu.Lock()
			defer mu.Unlock()
			if breaks < 3 || !slices.IsSorted(told) || len(told) < 4 {
				t.Errorf("the link broke %d times, and progress was told as %v", breaks, told)
			}
		})
	}
}

// brittle forwards connections to a server, and breaks each after so many bytes from it;
// then broke is called.
func brittle(t *testing.T, to string, after int, broke func()) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", to)
			if err != nil {
				_ = client.Close()
				continue
			}
			mu.Lock()
			open[client], open[server] = true, true
			mu.Unlock()
			wg.Go(func() { _, _ = io.Copy(server, client) })
			wg.Go(func() {
				_, err := io.CopyN(client, server, int64(after))
				_ = client.Close()
				_ = server.Close()
				if err == nil {
					broke()
				}
			})
		}
	})
	return l.Addr().String()
}

func TestAMirrorOfABucketThatIsNotThereYetWaitsForIt(t *testing.T) {
	t.Parallel()
	_, nc, js := provisioned(t)
	if err := js.DeleteStream(t.Context(), "KV_"+ledger.DirectoryBucket); err != nil {
		t.Fatal(err)
	}
	c, _ := mirror(t, nc, js, ledger.MirrorOptions{})
	eventually(t, "the copy is stale", func() bool { return c.times("stale") > 0 })
	if _, err := ledger.Provision(t.Context(), js, ledger.ProvisionOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the copy is there", func() bool { return c.is(map[string]string{}) })
	if !errors.Is(c.reasons[0], jetstream.ErrStreamNotFound) {
		t.Errorf("the reason was %v", c.reasons[0])
	}
}
