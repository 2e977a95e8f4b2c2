package embednats

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

func TestThreeNodesKeepAnR3StreamThroughTheLossOfItsLeader(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var nodes []Options
	for _, name := range []string{"n1", "n2", "n3"} {
		nodes = append(nodes, Options{
			Name: name, StoreDir: t.TempDir(),
			Cluster: &ClusterOptions{Name: "toll", User: "route", Password: "s3cret"},
		})
	}
	servers, err := StartCluster(ctx, nodes)
	if err != nil {
		t.Fatal(err)
	}
	var urls []string
	for _, s := range servers {
		t.Cleanup(func() { stop(t, s) })
		urls = append(urls, s.ClientURL())
	}
	nc, err := nats.Connect(strings.Join(urls, ","), nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: "LEDGER", Subjects: []string{"calls.*"}, Replicas: 3}); err != nil {
		t.Fatal(err)
	}
	store := func(id string, want uint64) {
		t.Helper()
		// A new stream, or a new leader of one, is heard of by the other
		// nodes a little later; the message id makes the repeats harmless.
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			try, done := context.WithTimeout(ctx, time.Second)
			ack, err := js.Publish(try, "calls.1", []byte(id), jetstream.WithMsgID(id))
			done()
			if err == nil {
				if ack.Sequence != want {
					t.Errorf("%s is stored as %d, want %d", id, ack.Sequence, want)
				}
				return
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				t.Fatalf("%s is not taken: %v", id, err)
			}
		}
	}
	store("before", 1)

	leader := -1
	for i, s := range servers {
		if s.LeadsStream("LEDGER") {
			leader = i
		}
	}
	if leader < 0 {
		t.Fatal("nobody leads the stream")
	}
	stop(t, servers[leader])

	// Two of three go on, once they have elected a leader.
	store("after", 2)

	// The lost node comes back in its place and catches up.
	back, err := Start(ctx, servers[leader].Options())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, back) })
	if back.ClientURL() != servers[leader].ClientURL() {
		t.Errorf("came back at %s, was at %s", back.ClientURL(), servers[leader].ClientURL())
	}
	if err := back.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		stream, err := js.Stream(ctx, "LEDGER")
		current := 0
		if err == nil {
			if c := stream.CachedInfo().Cluster; c != nil && c.Leader != "" {
				current++
				for _, r := range c.Replicas {
					if r.Current && !r.Offline {
						current++
					}
				}
			}
		}
		if current == 3 {
			break
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%d of 3 replicas are current: %v", current, err)
		}
	}
}

func TestAClusterWithoutItsOthersIsNotReady(t *testing.T) {
	t.Parallel()
	s := start(t, Options{Name: "alone", Cluster: &ClusterOptions{Name: "c", Routes: []string{"nats://127.0.0.1:1"}}})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	err := s.WaitReady(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no leader") {
		t.Errorf("got %v", err)
	}
	if s.LeadsMeta() {
		t.Error("one of two can't lead")
	}
	stop(t, s)
	if err := s.WaitReady(t.Context()); err == nil {
		t.Error("a stopped server is not ready")
	}
}

func TestAClusterThatCannotStartLeavesNothingRunning(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if _, err := StartCluster(t.Context(), []Options{{Name: "n1", StoreDir: dir}, {Name: "n2", StoreDir: dir}}); !errors.Is(err, ErrStoreInUse) {
		t.Errorf("got %v", err)
	}
	start(t, Options{StoreDir: dir})
}
