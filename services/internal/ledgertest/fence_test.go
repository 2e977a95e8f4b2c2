package ledgertest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
)

const decisionsStream = "KV_" + ledger.DecisionsBucket

// nodes starts a cluster without streams.
func nodes(t *testing.T, n int) []*embednats.Server {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var all []embednats.Options
	for i := range n {
		all = append(all, node(t, i))
	}
	servers, err := embednats.StartCluster(ctx, all)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range servers {
		t.Cleanup(func() { stop(t, s) })
	}
	return servers
}

func node(t *testing.T, i int) embednats.Options {
	return embednats.Options{
		Name: fmt.Sprint("n", i), StoreDir: t.TempDir(), MaxFile: 100 << 30, Sync: time.Minute,
		Cluster: &embednats.ClusterOptions{Name: "toll", User: "route", Password: "s3cret"},
	}
}

func stop(t *testing.T, s *embednats.Server) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := s.Stop(ctx); err != nil {
		t.Error(err)
	}
}

// cluster returns clients of three servers with streams on all of them.
func cluster(t *testing.T, clients int) (ncs []*nats.Conn, jss []jetstream.JetStream) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	servers := nodes(t, 3)
	for i := range clients {
		nc, err := nats.Connect(servers[i%len(servers)].ClientURL(), nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		js, err := jetstream.New(nc)
		if err != nil {
			t.Fatal(err)
		}
		ncs, jss = append(ncs, nc), append(jss, js)
	}
	if _, err := ledger.Provision(ctx, jss[0], ledger.ProvisionOptions{Replicas: 3}); err != nil {
		t.Fatal(err)
	}
	return ncs, jss
}

func TestALoneDecisionOfAStaleOwnerIsRejected(t *testing.T) {
	t.Parallel()
	_, nc, js := provisioned(t)
	fence(t, []*nats.Conn{nc, nc}, []jetstream.JetStream{js, js})
}

func TestALoneDecisionOfAStaleOwnerIsRejectedByACluster(t *testing.T) {
	t.Parallel()
	ncs, jss := cluster(t, 2)
	fence(t, ncs, jss)
}

// Services of a cluster are started together with it, and one node may be late.
func TestStreamsForAllNodesAreMadeWhenTheLastNodeIsThere(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	servers := nodes(t, 2)
	nc, err := nats.Connect(servers[1].ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	provisioned := make(chan error, 1)
	go func() {
		_, err := ledger.Provision(ctx, js, ledger.ProvisionOptions{Replicas: 3})
		provisioned <- err
	}()
	// Now streams are refused: whoever gave up at that would have given up here.
	for i := 0; ; i++ {
		name := fmt.Sprint("REFUSED_", i)
		_, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: name, Subjects: []string{name}, Replicas: 3})
		var api *jetstream.APIError
		if errors.As(err, &api) && api.ErrorCode == 10005 {
			break
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
	third := node(t, 2)
	third.Cluster.Host, third.Cluster.Routes = "127.0.0.1", servers[0].Options().Cluster.Routes
	late, err := embednats.Start(ctx, third)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, late) })
	if err := <-provisioned; err != nil {
		t.Fatal(err)
	}
}

// fence lets an owner publish decisions one by one while another takes its
// shard over: none is stored after the takeover, and who takes over finds the
// newest of them by asking after it.
func fence(t *testing.T, ncs []*nats.Conn, jss []jetstream.JetStream) {
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	const checkpointSubject = "$KV.decisions.checkpoint.3"
	takeOver := func(i int) uint64 {
		for {
			m, _, err := ledger.LastMessage(ctx, jss[i], decisionsStream, checkpointSubject)
			if err == nil {
				c := decision("checkpoint.3", fmt.Sprint("owner ", i))
				ledger.ExpectLast(c, m.Sequence)
				var at uint64
				if at, err = ledger.PublishBatch(ctx, ncs[i], []*nats.Msg{c}); err == nil {
					return at
				}
			}
			// Another write is under way, or the stream has no leader yet.
			if ctx.Err() != nil {
				t.Fatal(err)
			}
		}
	}
	at := takeOver(0)
	var stored uint64 // of the newest decision that the first owner knows to be stored
	var wg sync.WaitGroup
	begun := make(chan struct{})
	wg.Go(func() {
		for n := 0; ; n++ {
			d := decision("3.acme.free=2Fcalls", fmt.Sprint(n))
			ledger.ExpectLastOf(d, checkpointSubject, at)
			ack, err := jss[0].PublishMsg(ctx, d)
			if n == 20 {
				close(begun)
			}
			if err != nil {
				var api *jetstream.APIError
				if !errors.As(err, &api) || !strings.Contains(api.Description, "wrong last sequence") {
					t.Errorf("it was refused with %v", err)
				}
				return
			}
			stored = ack.Sequence
		}
	})
	<-begun
	next := takeOver(1)
	newest, found, err := ledger.LastMessage(ctx, jss[1], decisionsStream, "$KV.decisions.3.>")
	if err != nil || !found {
		t.Fatalf("%v, %v", found, err)
	}
	wg.Wait()
	if newest.Sequence != stored || newest.Sequence >= next {
		t.Errorf("the newest decision is %d, the old owner has stored %d, the fence stands at %d", newest.Sequence, stored, next)
	}
	again, _, err := ledger.LastMessage(ctx, jss[1], decisionsStream, "$KV.decisions.3.>")
	if err != nil || again.Sequence != newest.Sequence {
		t.Errorf("after the takeover there is %d, %v", again.Sequence, err)
	}
}

func TestTheNewestMessageIsToldByTheLeader(t *testing.T) {
	t.Parallel()
	_, nc, js := provisioned(t)
	if _, found, err := ledger.LastMessage(t.Context(), js, decisionsStream, "$KV.decisions.3.>"); found || err != nil {
		t.Errorf("of nothing: %v, %v", found, err)
	}
	if _, _, err := ledger.LastMessage(t.Context(), js, "NOWHERE", "a"); err == nil {
		t.Error("of a stream that is not there")
	}
	a, b := decision("3.a.x", "1"), decision("3.b.x", "2")
	b.Header = nats.Header{"A": {"b"}}
	if _, err := ledger.PublishBatch(t.Context(), nc, []*nats.Msg{a, b, decision("4.c.x", "3")}); err != nil {
		t.Fatal(err)
	}
	m, found, err := ledger.LastMessage(t.Context(), js, decisionsStream, "$KV.decisions.3.>")
	if err != nil || !found || m.Subject != b.Subject || string(m.Data) != "2" || m.Sequence != 2 || m.Header.Get("A") != "b" || m.Time.IsZero() {
		t.Errorf("got %+v, %v, %v", m, found, err)
	}
}
