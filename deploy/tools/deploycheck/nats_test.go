package deploycheck

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

// cluster is the three nodes of compose.yaml on loopback, each with its own
// environment and the one configuration file.
type cluster struct {
	nodes     []*server.Server
	addresses []string
	passwords map[string]string
}

// startCluster must not run beside other tests: the configuration is read from
// this process's environment.
func startCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{passwords: map[string]string{}}
	for name, value := range env(t) {
		if user, ok := strings.CutPrefix(name, "NATS_"); ok {
			c.passwords[strings.ToLower(strings.TrimSuffix(user, "_PASSWORD"))] = value
		}
	}
	p := project(t)
	names := []string{"nats-1", "nats-2", "nats-3"}
	var all []*server.Options
	routes := map[string]string{}
	for _, name := range names {
		for k, v := range p.Services[name].Environment {
			if v != nil {
				t.Setenv(k, *v)
			}
		}
		o, err := server.ProcessConfigFile(filepath.Join(root, "deploy/nats/nats.conf"))
		if err != nil {
			t.Fatalf("nats.conf: %v", err)
		}
		if o.ServerName != name || o.Host != "0.0.0.0" || o.Port != 4222 || !o.SyncAlways || o.HTTPHost != "127.0.0.1" || o.Cluster.Password == "" {
			t.Fatalf("%s is not what compose.yaml says: %s, %s:%d, sync always %v, monitoring on %s", name, o.ServerName, o.Host, o.Port, o.SyncAlways, o.HTTPHost)
		}
		// Loopback and free ports instead of the container's own network.
		o.Host, o.Port, o.HTTPPort = "127.0.0.1", server.RANDOM_PORT, 0
		o.Cluster.Host, o.Cluster.Port = "127.0.0.1", freePort(t)
		o.StoreDir, o.NoSigs, o.NoLog = t.TempDir(), true, true
		o.LameDuckDuration, o.LameDuckGracePeriod = 0, 0
		routes[name] = net.JoinHostPort("127.0.0.1", strconv.Itoa(o.Cluster.Port))
		all = append(all, o)
	}
	for _, o := range all {
		for _, r := range o.Routes {
			here, ok := routes[r.Hostname()]
			if !ok {
				t.Fatalf("route %s leads to no node of compose.yaml", r.Host)
			}
			*r = url.URL{Scheme: r.Scheme, Host: here, User: r.User}
		}
		ns, err := server.NewServer(o)
		if err != nil {
			t.Fatal(err)
		}
		ns.Start()
		t.Cleanup(func() { ns.Shutdown(); ns.WaitForShutdown() })
		c.nodes = append(c.nodes, ns)
	}
	for _, ns := range c.nodes {
		if !ns.ReadyForConnections(10 * time.Second) {
			t.Fatalf("%s does not listen", ns.Name())
		}
		c.addresses = append(c.addresses, ns.Addr().String())
	}
	waitFor(t, "the cluster has a leader that all nodes follow", func() bool {
		for _, ns := range c.nodes {
			if !ns.JetStreamIsCurrent() {
				return false
			}
		}
		return true
	})
	return c
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }() // only its number was wanted
	return l.Addr().(*net.TCPAddr).Port
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

// urls is the cluster's address for a user, as compose.yaml writes it.
func (c *cluster) urls(user string) string {
	var all []string
	for _, a := range c.addresses {
		all = append(all, "nats://"+user+":"+c.passwords[user]+"@"+a)
	}
	return strings.Join(all, ",")
}

// client is a connection that remembers what it was not allowed to do.
type client struct {
	*nats.Conn
	js jetstream.JetStream

	mu      sync.Mutex
	refused []string
}

func (c *cluster) connect(t *testing.T, user string) *client {
	t.Helper()
	cl := &client{}
	var err error
	cl.Conn, err = nats.Connect(c.urls(user), nats.PermissionErrOnSubscribe(true), nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
		cl.mu.Lock()
		defer cl.mu.Unlock()
		cl.refused = append(cl.refused, err.Error())
	}))
	if err != nil {
		t.Fatalf("%s can't connect: %v", user, err)
	}
	t.Cleanup(cl.Close)
	if cl.js, err = jetstream.New(cl.Conn, jetstream.WithDefaultTimeout(5*time.Second)); err != nil {
		t.Fatal(err)
	}
	return cl
}

func (c *client) violations() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.refused...)
}

// mayNot publishes on a subject and waits for the server's refusal.
func (c *client) mayNot(t *testing.T, subject string) {
	t.Helper()
	before := len(c.violations())
	if err := c.Publish(subject, nil); err != nil {
		t.Fatal(err)
	}
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	deadline := time.After(5 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		for _, v := range c.violations()[before:] {
			if strings.Contains(v, subject) {
				return
			}
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Errorf("it may publish on %s", subject)
			return
		}
	}
}

func (c *client) mayNotHear(t *testing.T, subject string) {
	t.Helper()
	sub, err := c.SubscribeSync(subject)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	if _, err := sub.NextMsg(time.Second); !errors.Is(err, nats.ErrPermissionViolation) {
		t.Errorf("it may subscribe to %s (%v)", subject, err)
	}
}

// read returns the first n entries of a stream as a service gets them.
func (c *client) read(ctx context.Context, stream string, n int, subjects ...string) ([]ledger.Message, error) {
	enough := errors.New("enough")
	var all []ledger.Message
	err := ledger.Read(ctx, c.js, ledger.ReadOptions{Stream: stream, Subjects: subjects}, func(m ledger.Message) error {
		if all = append(all, m); len(all) == n {
			return enough
		}
		return nil
	})
	if errors.Is(err, enough) {
		return all, nil
	}
	if err == nil {
		err = fmt.Errorf("only %d of %d entries of %s came", len(all), n, stream)
	}
	return all, err
}

// next takes a consumer's next message. A consumer that was just made on another
// node may not be known here yet.
func next(ctx context.Context, t *testing.T, c jetstream.Consumer) jetstream.Msg {
	t.Helper()
	var m jetstream.Msg
	waitFor(t, "the consumer answers", func() bool {
		var err error
		m, err = c.Next(jetstream.FetchMaxWait(2 * time.Second))
		if err != nil && !errors.Is(err, nats.ErrNoResponders) {
			t.Fatalf("take a message: %v", err)
		}
		return err == nil || ctx.Err() != nil
	})
	must(t, "take a message", ctx.Err())
	return m
}

// What was just written is read again: any replica may answer, and one that lags
// says that there is nothing.

func object(ctx context.Context, t *testing.T, o jetstream.ObjectStore, name string) (data []byte) {
	t.Helper()
	again(t, name, jetstream.ErrObjectNotFound, func() (err error) { data, err = o.GetBytes(ctx, name); return err })
	return data
}

func value(ctx context.Context, t *testing.T, kv jetstream.KeyValue, key string) {
	t.Helper()
	again(t, key, jetstream.ErrKeyNotFound, func() error { _, err := kv.Get(ctx, key); return err })
}

func last(ctx context.Context, t *testing.T, s jetstream.Stream, subject string) {
	t.Helper()
	again(t, subject, jetstream.ErrMsgNotFound, func() error { _, err := s.GetLastMsgForSubject(ctx, subject); return err })
}

func again(t *testing.T, what string, missing error, read func() error) {
	t.Helper()
	waitFor(t, what+" can be read", func() bool {
		err := read()
		if err != nil && !errors.Is(err, missing) {
			t.Fatalf("read %s: %v", what, err)
		}
		return err == nil
	})
}

// mirrorProbe hears which keys come to a gateway, by a change or by reading anew.
type mirrorProbe struct {
	loaded chan struct{}
	keys   chan string
	stale  chan error
}

func (m *mirrorProbe) Reset(all []ledger.Change) {
	for _, c := range all {
		m.keys <- c.Key
	}
	select {
	case m.loaded <- struct{}{}:
	default:
	}
}
func (m *mirrorProbe) Apply(c ledger.Change) { m.keys <- c.Key }
func (m *mirrorProbe) Stale(err error) {
	select {
	case m.stale <- err:
	default:
	}
}

// hears waits until a key has come.
func (m *mirrorProbe) hears(ctx context.Context, t *testing.T, key string) {
	t.Helper()
	for within(ctx, t, "key "+key+" at a gateway", m.keys) != key {
		continue
	}
}

// mirror follows a bucket and returns once its contents have been read.
func (c *client) mirror(ctx context.Context, t *testing.T, bucket string) *mirrorProbe {
	t.Helper()
	p := &mirrorProbe{loaded: make(chan struct{}, 1), keys: make(chan string, 1024), stale: make(chan error, 1)}
	go func() { _ = ledger.NewMirror(c.Conn, c.js, ledger.MirrorOptions{Bucket: bucket}, p).Run(ctx) }() // ends with ctx
	select {
	case <-p.loaded:
	case err := <-p.stale:
		t.Fatalf("bucket %s can't be mirrored: %v", bucket, err)
	case <-ctx.Done():
		t.Fatalf("bucket %s can't be mirrored", bucket)
	}
	return p
}

func within[T any](ctx context.Context, t *testing.T, what string, from <-chan T) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-ctx.Done():
		t.Fatalf("did not come: %s", what)
		panic("unreachable")
	}
}

func must(t *testing.T, what string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}

// The subtests share a cluster, and each user finds what those before it left.
func TestNATSUsersMayDoTheirWorkAndNoMore(t *testing.T) {
	c := startCluster(t)
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	kv := func(t *testing.T, cl *client, bucket string) jetstream.KeyValue {
		t.Helper()
		b, err := cl.js.KeyValue(ctx, bucket)
		must(t, "bucket "+bucket, err)
		return b
	}

	t.Run("nobody without credentials", func(t *testing.T) {
		for _, u := range []string{"nats://" + c.addresses[0], "nats://gateway:wrong@" + c.addresses[0], "nats://gateway@" + c.addresses[0]} {
			if nc, err := nats.Connect(u); err == nil {
				nc.Close()
				t.Errorf("connected to %s", u)
			}
		}
	})

	aggregator := c.connect(t, "aggregator")
	made := t.Run("aggregator makes the streams with three replicas", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		var notice string
		g, err := ledger.Provision(ctx, aggregator.js, ledger.ProvisionOptions{Shards: 64, Replicas: 3, Notice: func(s string) { notice = s }})
		must(t, "make the streams", err)
		if g.Shards != 64 {
			t.Errorf("%d shards", g.Shards)
		}
		t.Logf("notice: %s", notice)
		s, err := aggregator.js.Stream(ctx, ledger.Stream)
		must(t, "stream", err)
		// 96 GiB in a file store of 32 GB are a quarter each, and no less.
		if c := s.CachedInfo().Config; c.Replicas != 3 || c.MaxBytes != 16<<30 {
			t.Errorf("the ledger has %d replicas and room for %d bytes", c.Replicas, c.MaxBytes)
		}
	})
	if !made {
		t.FailNow()
	}

	gateway := c.connect(t, "gateway")
	t.Run("gateway appends calls, retires its producer and reads the geometry", func(t *testing.T) {
		var g ledger.Geometry
		again(t, "the geometry", jetstream.ErrKeyNotFound, func() (err error) { g, err = ledger.ReadGeometry(ctx, gateway.js); return err })
		if g.Shards != 64 {
			t.Errorf("%d shards", g.Shards)
		}
		for _, subject := range []string{ledger.CallsSubject(3), ledger.ClosingsSubject(3), ledger.LeasesSubject(3), ledger.DeadLetterIntake("x")} {
			_, err := gateway.js.Publish(ctx, subject, []byte("x"))
			must(t, subject, err)
		}
	})
	t.Run("gateway may not decide, correct, register or read calls", func(t *testing.T) {
		for _, subject := range []string{
			"control.3", "$KV.decisions.3.a.l", "$KV.directory.key.x", "$KV.config.ledger.shards", "alerts.x", "beacon.3", "feed.decisions.3.a.l",
			"answers.x", "$KV.ownership.shard.3", "feed.ownership.shard.3",
			"deadletter.ledger.3.1", "$O.snapshots.C.x", "query.usage.3",
			"$JS.API.STREAM.DELETE.LEDGER", "$JS.API.STREAM.PURGE.LEDGER", "$JS.API.STREAM.UPDATE.LEDGER", "$JS.API.STREAM.CREATE.X",
			"$JS.API.CONSUMER.CREATE.LEDGER.x", "$JS.API.DIRECT.GET.LEDGER.calls.3", "$JS.API.STREAM.MSG.GET.LEDGER", "$JS.API.CONSUMER.CREATE.ALERTS.x",
		} {
			gateway.mayNot(t, subject)
		}
		for _, subject := range []string{"calls.*", "closings.*", ">", "$KV.>", "query.usage.*"} {
			gateway.mayNotHear(t, subject)
		}
	})

	// The gateways' mirrors follow what the others write from here on.
	mirrors := c.connect(t, "gateway")
	directory := mirrors.mirror(ctx, t, ledger.DirectoryBucket)
	decisions := mirrors.mirror(ctx, t, ledger.DecisionsBucket)
	beacons := make(chan *nats.Msg, 1)
	_, err := mirrors.ChanSubscribe(ledger.AllBeacons, beacons)
	must(t, "subscribe to beacons", err)
	answers := make(chan *nats.Msg, 1)
	_, err = mirrors.ChanSubscribe("answers.x", answers)
	must(t, "subscribe to answers", err)
	must(t, "flush", mirrors.Flush())

	t.Run("aggregator reads the ledger, decides in batches, keeps snapshots, answers", func(t *testing.T) {
		got, err := aggregator.read(ctx, ledger.Stream, 2)
		must(t, "read the ledger", err)
		if got[0].Subject != ledger.CallsSubject(3) {
			t.Errorf("first entry is on %s", got[0].Subject)
		}
		_, err = aggregator.read(ctx, ledger.Stream, 2, ledger.ShardSubjects(3)...)
		must(t, "read a shard", err)
		checkpoint := &nats.Msg{Subject: "$KV.decisions." + ledger.CheckpointKey(3), Data: []byte("c")}
		ledger.ExpectLast(checkpoint, 0)
		_, err = ledger.PublishBatch(ctx, aggregator.Conn, []*nats.Msg{{Subject: "$KV.decisions." + ledger.DecisionKey(3, "a", "p/l"), Data: []byte("d")}, checkpoint})
		must(t, "publish decisions", err)
		// Where it stands it asks the leaders.
		newest, found, err := ledger.LastMessage(ctx, aggregator.js, "KV_"+ledger.DecisionsBucket, checkpoint.Subject)
		must(t, "read the checkpoint", err)
		if !found {
			t.Error("the checkpoint is not there")
		}
		for stream, subject := range map[string]string{ledger.Stream: ledger.CallsSubject(3), "OBJ_" + ledger.SnapshotsBucket: "$O.snapshots.M.x"} {
			_, _, err = ledger.LastMessage(ctx, aggregator.js, stream, subject)
			must(t, "ask the leader of "+stream, err)
		}
		// One decision alone, under the checkpoint.
		lone := &nats.Msg{Subject: "$KV.decisions." + ledger.DecisionKey(3, "b", "p/l"), Data: []byte("d")}
		ledger.ExpectLastOf(lone, checkpoint.Subject, newest.Sequence)
		_, err = aggregator.js.PublishMsg(ctx, lone)
		must(t, "publish one decision", err)
		for _, subject := range []string{ledger.ControlSubject(3), ledger.DeadLetterSubject(3, 1)} {
			_, err := aggregator.js.Publish(ctx, subject, []byte("x"))
			must(t, subject, err)
		}
		// Again and again, as the service does: the nodes tell each other of
		// subscriptions only after a moment.
		waitFor(t, "a beacon at a gateway", func() bool {
			must(t, "beacon", aggregator.Publish(ledger.BeaconSubject(3), []byte("b")))
			return len(beacons) > 0
		})
		waitFor(t, "an answer at a gateway", func() bool {
			must(t, "answer", aggregator.Publish("answers.x", []byte("a")))
			return len(answers) > 0
		})
		decisions.hears(ctx, t, ledger.DecisionKey(3, "a", "p/l"))

		snapshots, err := aggregator.js.ObjectStore(ctx, ledger.SnapshotsBucket)
		must(t, "snapshots", err)
		// Large enough for the flow control of its reading.
		large := make([]byte, 16<<20)
		_, err = snapshots.PutBytes(ctx, "shard-3/1-1", large)
		must(t, "write a snapshot", err)
		if back := object(ctx, t, snapshots, "shard-3/1-1"); len(back) != len(large) {
			t.Errorf("%d bytes of %d came back", len(back), len(large))
		}
		must(t, "delete a snapshot", snapshots.Delete(ctx, "shard-3/1-1"))
		mayTidy(ctx, t, aggregator, ledger.SnapshotsBucket)
		// What no shard reads it looks for, and keeps up to where it has.
		entries, err := aggregator.js.Stream(ctx, ledger.Stream)
		must(t, "the ledger", err)
		_, err = entries.Info(ctx, jetstream.WithSubjectFilter(">"))
		must(t, "the ledger's subjects", err)
		_, err = entries.GetMsg(ctx, 1, jetstream.WithGetMsgSubject(ledger.CallsSubject(3)))
		must(t, "an entry of a subject", err)
		_, err = kv(t, aggregator, ledger.ConfigBucket).Put(ctx, "ledger.strays", []byte("{}"))
		must(t, "where all strays are kept", err)

		_, err = aggregator.Subscribe(ledger.UsageSubject(3), func(m *nats.Msg) { _ = m.Respond([]byte("used")) })
		must(t, "subscribe to questions", err)
		must(t, "flush", aggregator.Flush())
	})
	t.Run("aggregators share the shards", func(t *testing.T) {
		// As services/internal/ownership does.
		_, err := aggregator.js.CreateStream(ctx, jetstream.StreamConfig{
			Name: "KV_ownership", Subjects: []string{"$KV.ownership.>"}, Replicas: 3, MaxMsgsPerSubject: 1, MaxBytes: 16 << 20,
			AllowDirect: true, AllowMsgTTL: true, RePublish: &jetstream.RePublish{Source: "$KV.ownership.>", Destination: "feed.ownership.>"},
		})
		must(t, "make the bucket", err)
		feed := make(chan *nats.Msg, 8)
		_, err = aggregator.ChanSubscribe("feed.ownership.>", feed)
		must(t, "follow who owns what", err)
		_, err = aggregator.js.Publish(ctx, "$KV.ownership.shard.3", []byte("{}"))
		must(t, "claim a shard", err)
		within(ctx, t, "a claim", feed)
		_, err = aggregator.RequestWithContext(ctx, "$JS.API.DIRECT.GET.KV_ownership", []byte(`{"multi_last":["$KV.ownership.shard.>"]}`))
		must(t, "read who owns what", err)
	})
	t.Run("aggregator has had every right it needed", func(t *testing.T) { noViolations(t, aggregator) })
	t.Run("aggregator may not call, register, delete or purge", func(t *testing.T) {
		for _, subject := range []string{
			"calls.3", "closings.3", "$KV.directory.key.x", "$KV.config.plans.applied", "alerts.x", "$KV.alerter.x", "$KV.historian.calls", "deadletter.intake.x",
			"$JS.API.STREAM.DELETE.LEDGER", "$JS.API.STREAM.DELETE.KV_decisions", "$JS.API.STREAM.DELETE.OBJ_snapshots", "$JS.API.STREAM.DELETE.ALERTS", "$JS.API.STREAM.DELETE.KV_ownership",
			"$JS.API.STREAM.PURGE.LEDGER", "$JS.API.STREAM.UPDATE.LEDGER", "$JS.API.STREAM.MSG.DELETE.LEDGER", "$JS.API.CONSUMER.CREATE.ALERTS.x",
		} {
			aggregator.mayNot(t, subject)
		}
	})

	console := c.connect(t, "console")
	t.Run("console asks, applies plans and watches", func(t *testing.T) {
		_, err := ledger.Provision(ctx, console.js, ledger.ProvisionOptions{Shards: 1, Replicas: 1})
		must(t, "find the ledger", err)
		waitFor(t, "the owner of the shard answers", func() bool {
			answer, err := console.RequestWithContext(ctx, ledger.UsageSubject(3), []byte("{}"))
			if err != nil && !errors.Is(err, nats.ErrNoResponders) {
				t.Fatalf("ask for usage: %v", err)
			}
			return err == nil && string(answer.Data) == "used"
		})
		config := kv(t, console, ledger.ConfigBucket)
		_, err = config.Create(ctx, "plans.applied", []byte("{}"))
		must(t, "write the plans", err)
		value(ctx, t, config, "plans.applied")
		_, err = console.RequestWithContext(ctx, "$JS.API.STREAM.MSG.GET.KV_config", []byte(`{"last_by_subj":"$KV.config.plans.applied"}`))
		must(t, "read the plans from the leader", err)
		_, err = config.Put(ctx, "plans.document.x.0", []byte("{}"))
		must(t, "write a document", err)
		keys, err := config.ListKeysFiltered(ctx, "plans.document.>")
		must(t, "list documents", err)
		if key := within(ctx, t, "the document's key", keys.Keys()); key != "plans.document.x.0" {
			t.Errorf("listed is %s", key)
		}
		stream, err := console.js.Stream(ctx, "KV_"+ledger.ConfigBucket)
		must(t, "config", err)
		must(t, "remove a document", stream.Purge(ctx, jetstream.WithPurgeSubject("$KV.config.plans.document.x.*")))
		_, err = console.js.Publish(ctx, ledger.ControlSubject(3), []byte("x"))
		must(t, "append a control entry", err)
		_, err = console.js.Publish(ctx, "$KV.directory.key.x", []byte("x"))
		must(t, "register a key", err)
		directory.hears(ctx, t, "key.x")
		w, err := kv(t, console, ledger.DirectoryBucket).WatchAll(ctx, jetstream.MetaOnly())
		must(t, "watch the directory", err)
		within(ctx, t, "a key of the directory", w.Updates())
		must(t, "stop watching", w.Stop())
		console.mirror(ctx, t, ledger.DecisionsBucket)
		_, err = console.read(ctx, ledger.Stream, 1)
		must(t, "read the ledger", err)
		_, err = console.read(ctx, ledger.DeadLetterStream, 2)
		must(t, "read dead letters", err)
		_, err = console.SubscribeSync(ledger.AllBeacons)
		must(t, "hear beacons", err)
		must(t, "flush", console.Flush())
		noViolations(t, console)
	})
	t.Run("console may not call or decide", func(t *testing.T) {
		for _, subject := range []string{
			"calls.3", "closings.3", "$KV.decisions.3.a.l", "$KV.config.ledger.shards", "alerts.x", "beacon.3", "$O.snapshots.C.x", "deadletter.intake.x",
			"$JS.API.STREAM.DELETE.LEDGER", "$JS.API.STREAM.PURGE.LEDGER", "$JS.API.STREAM.CREATE.X", "$JS.API.STREAM.PURGE.DEADLETTER",
		} {
			console.mayNot(t, subject)
		}
	})

	alerter := c.connect(t, "alerter")
	t.Run("alerter reads calls, keeps episodes, appends and delivers transitions", func(t *testing.T) {
		_, err := ledger.Provision(ctx, alerter.js, ledger.ProvisionOptions{})
		must(t, "find the ledger", err)
		state := kv(t, alerter, ledger.AlerterBucket)
		rev, err := state.Create(ctx, "state.r.s", []byte("1"))
		must(t, "create a state", err)
		_, err = state.Update(ctx, "state.r.s", []byte("2"), rev)
		must(t, "update a state", err)
		value(ctx, t, state, "state.r.s")
		_, err = alerter.read(ctx, ledger.Stream, 1)
		must(t, "read the ledger", err)
		// Its place by time, as after a restart.
		stream, err := alerter.js.Stream(ctx, ledger.Stream)
		must(t, "stream", err)
		start := time.Now().Add(-time.Hour)
		seek, err := stream.CreateConsumer(ctx, jetstream.ConsumerConfig{DeliverPolicy: jetstream.DeliverByStartTimePolicy, OptStartTime: &start, AckPolicy: jetstream.AckNonePolicy, HeadersOnly: true, MemoryStorage: true, InactiveThreshold: 10 * time.Second})
		must(t, "seek", err)
		next(ctx, t, seek)
		durable, err := alerter.js.CreateOrUpdateConsumer(ctx, ledger.AlertsStream, jetstream.ConsumerConfig{Durable: "alerter_webhook", DeliverPolicy: jetstream.DeliverNewPolicy, AckPolicy: jetstream.AckExplicitPolicy})
		must(t, "durable consumer", err)
		_, err = alerter.js.Publish(ctx, "alerts.episode", []byte("{}"), jetstream.WithMsgID("episode:firing"), jetstream.WithExpectLastSequencePerSubject(0))
		must(t, "append a transition", err)
		must(t, "acknowledge a transition", next(ctx, t, durable).DoubleAck(ctx))
		alerts, err := alerter.js.Stream(ctx, ledger.AlertsStream)
		must(t, "alerts", err)
		if info := within(ctx, t, "the list of receivers", alerts.ListConsumers(ctx).Info()); info == nil || info.Name != "alerter_webhook" {
			t.Errorf("the list of receivers has %v", info)
		}
		last(ctx, t, alerts, "alerts.episode")
		noViolations(t, alerter)
	})
	t.Run("alerter may not call, decide or register", func(t *testing.T) {
		for _, subject := range []string{
			"calls.3", "control.3", "closings.3", "$KV.decisions.3.a.l", "$KV.directory.key.x", "$KV.config.plans.applied", "$KV.historian.calls", "beacon.3",
			"$JS.API.STREAM.DELETE.ALERTS", "$JS.API.STREAM.PURGE.ALERTS", "$JS.API.STREAM.CREATE.X", "$JS.ACK.LEDGER.x.1.1.1.1.0",
		} {
			alerter.mayNot(t, subject)
		}
	})

	historian := c.connect(t, "historian")
	t.Run("historian reads everything, keeps boundaries and snapshots", func(t *testing.T) {
		_, err := ledger.Provision(ctx, historian.js, ledger.ProvisionOptions{})
		must(t, "find the ledger", err)
		for stream, subjects := range map[string][]string{ledger.Stream: nil, "KV_" + ledger.DecisionsBucket: nil, ledger.AlertsStream: nil} {
			_, err := historian.read(ctx, stream, 1, subjects...)
			must(t, "read "+stream, err)
		}
		_, err = historian.read(ctx, ledger.Stream, 1, ledger.AllControl, ledger.AllClosings)
		must(t, "read control entries", err)
		boundaries := kv(t, historian, ledger.HistorianBucket)
		rev, err := boundaries.Update(ctx, "calls", []byte("1"), 0)
		must(t, "write a boundary", err)
		_, err = boundaries.Update(ctx, "calls", []byte("2"), rev)
		must(t, "move a boundary", err)
		value(ctx, t, boundaries, "calls")
		snapshots, err := historian.js.ObjectStore(ctx, ledger.SnapshotsBucket)
		must(t, "snapshots", err)
		for range 2 { // the second replaces the first
			_, err = snapshots.PutBytes(ctx, "historian/calls.0", make([]byte, 1<<20))
			must(t, "write a snapshot", err)
		}
		object(ctx, t, snapshots, "historian/calls.0")
		noViolations(t, historian)
	})
	auditor := c.connect(t, "auditor")
	t.Run("auditor reads calls and claims, asks the counters, keeps books and findings", func(t *testing.T) {
		_, err := ledger.Provision(ctx, auditor.js, ledger.ProvisionOptions{})
		must(t, "find the streams", err)
		_, err = gateway.js.Publish(ctx, ledger.ClaimSubject("p"), []byte("claim"))
		must(t, "claim", err)
		_, err = auditor.read(ctx, ledger.Stream, 1)
		must(t, "read the ledger", err)
		_, err = auditor.read(ctx, ledger.AuditStream, 1)
		must(t, "read claims", err)
		found := kv(t, auditor, ledger.AuditBucket)
		_, err = found.Put(ctx, ledger.AuditStatusKey, []byte("{}"))
		must(t, "write the status", err)
		keys, err := found.Keys(ctx)
		must(t, "list findings", err)
		if len(keys) != 1 {
			t.Errorf("keys %v", keys)
		}
		must(t, "forget a finding", found.Purge(ctx, ledger.AuditFindingPrefix+"x"))
		if _, err := kv(t, auditor, ledger.HistorianBucket).Get(ctx, "calls"); err != nil && !errors.Is(err, jetstream.ErrKeyNotFound) {
			t.Errorf("how far the history is: %v", err)
		}
		books, err := auditor.js.ObjectStore(ctx, ledger.BooksBucket)
		must(t, "books", err)
		for range 2 {
			_, err = books.PutBytes(ctx, "books.0", make([]byte, 1<<20))
			must(t, "write books", err)
		}
		object(ctx, t, books, "books.0")
		mayTidy(ctx, t, auditor, ledger.BooksBucket)
		answer, err := auditor.RequestWithContext(ctx, ledger.UsageSubject(3), nil)
		must(t, "ask the counters", err)
		if string(answer.Data) != "used" {
			t.Errorf("the counters answer %q", answer.Data)
		}
		noViolations(t, auditor)
	})
	t.Run("auditor may change nothing that it looks at", func(t *testing.T) {
		for _, subject := range []string{
			"calls.3", "control.3", "leases.3", "closings.3", "audit.gateway.p", "alerts.x", "$KV.decisions.3.a.l", "$KV.directory.key.x", "$KV.config.plans.applied", "$KV.historian.calls",
			"$JS.API.STREAM.PURGE.LEDGER", "$JS.API.STREAM.DELETE.AUDIT", "$JS.API.STREAM.PURGE.AUDIT",
			"$O.snapshots.C.x", "$JS.API.STREAM.PURGE.OBJ_snapshots", "$JS.API.STREAM.DELETE.OBJ_snapshots", "$JS.API.CONSUMER.CREATE.OBJ_snapshots.x",
			"$JS.API.STREAM.DELETE.OBJ_books", "$JS.API.STREAM.PURGE.KV_audit",
		} {
			auditor.mayNot(t, subject)
		}
	})
	t.Run("historian may write nothing that changes a verdict", func(t *testing.T) {
		for _, subject := range []string{
			"calls.3", "control.3", "leases.3", "closings.3", "alerts.x", "$KV.decisions.3.a.l", "$KV.directory.key.x", "$KV.config.plans.applied", "$KV.alerter.x", "beacon.3",
			"$JS.API.STREAM.DELETE.LEDGER", "$JS.API.STREAM.PURGE.LEDGER", "$JS.API.STREAM.PURGE.KV_decisions", "$JS.API.STREAM.CREATE.X",
		} {
			historian.mayNot(t, subject)
		}
	})

	operator := c.connect(t, "operator")
	t.Run("a ledger without closings is served, and the operator is told what to do", func(t *testing.T) {
		stream, err := operator.js.Stream(ctx, ledger.Stream)
		must(t, "stream", err)
		old := stream.CachedInfo().Config
		old.Subjects = []string{ledger.AllCalls, ledger.AllControl, ledger.AllLeases}
		_, err = operator.js.UpdateStream(ctx, old)
		must(t, "make an old ledger", err)
		var notice string
		_, err = ledger.Provision(ctx, c.connect(t, "aggregator").js, ledger.ProvisionOptions{Notice: func(s string) { notice = s }})
		must(t, "find the old ledger", err)
		if !strings.Contains(notice, "nats stream edit LEDGER --subjects 'calls.*,control.*,leases.*,closings.*'") {
			t.Errorf("it is told %q", notice)
		}
		_, err = ledger.Provision(ctx, operator.js, ledger.ProvisionOptions{Notice: func(s string) { t.Error(s) }})
		must(t, "mend the old ledger", err)
		_, err = gateway.js.Publish(ctx, ledger.ClosingsSubject(3), []byte("x"))
		must(t, "close", err)
	})
	t.Run("operator may do everything in the account, system asks the servers", func(t *testing.T) {
		s, err := operator.js.Stream(ctx, ledger.DeadLetterStream)
		must(t, "dead letters", err)
		must(t, "purge dead letters", s.Purge(ctx))
		noViolations(t, operator)
		system := c.connect(t, "system")
		_, err = system.RequestWithContext(ctx, "$SYS.REQ.SERVER.PING", nil)
		must(t, "ask the servers", err)
		if _, err := system.js.Stream(ctx, ledger.Stream); err == nil {
			t.Error("the system account reads the ledger")
		}
	})
}

// mayTidy does with a bucket of objects what services/internal/leftovers does.
func mayTidy(ctx context.Context, t *testing.T, c *client, bucket string) {
	t.Helper()
	const left = ".C.left"
	_, err := c.js.Publish(ctx, "$O."+bucket+left, []byte("x"))
	must(t, "begin to write", err)
	stream, err := c.js.Stream(ctx, "OBJ_"+bucket)
	must(t, "bucket "+bucket, err)
	info, err := stream.Info(ctx, jetstream.WithSubjectFilter("$O."+bucket+".C.>"))
	must(t, "what there is", err)
	if info.State.Subjects["$O."+bucket+left] != 1 {
		t.Errorf("there is %v", info.State.Subjects)
	}
	_, found, err := ledger.LastMessage(ctx, c.js, "OBJ_"+bucket, "$O."+bucket+left)
	must(t, "ask the leader", err)
	if !found {
		t.Error("what was written is not there")
	}
	must(t, "remove it", stream.Purge(ctx, jetstream.WithPurgeSubject("$O."+bucket+left), jetstream.WithPurgeSequence(info.State.LastSeq+1)))
}

func noViolations(t *testing.T, c *client) {
	t.Helper()
	if v := c.violations(); len(v) > 0 {
		t.Errorf("it was refused what its work needs: %v", v)
	}
}
