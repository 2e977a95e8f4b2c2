// Package embednats runs nats-server inside this process: on real sockets, so
// that any NATS client can connect, with JetStream on disk.
package embednats

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// DefaultMaxMemory bounds what memory-backed streams may hold.
const DefaultMaxMemory = 256 << 20

// Options configures a Server. StoreDir is needed; the rest has defaults that suit
// one server on loopback.
type Options struct {
	// Name is the server's name, which in a cluster must be its own and stay
	// the same over restarts; empty means "tollkeeper".
	Name string
	// Host is the address that clients connect to; empty means 127.0.0.1. One
	// that other machines can reach is refused without credentials.
	Host string
	// Port for clients; 0 takes a free one.
	Port int
	// Flag is the name, without dashes, of the flag that Host and Port came
	// from, for errors; empty means nats-listen.
	Flag string

	// StoreDir is where JetStream keeps its files; it is created. One server at
	// a time may use it.
	StoreDir string
	// StoreWait is how long Start waits for a store or, after that, a port that another
	// server holds: a process that was killed keeps both until its memory is freed.
	// 0: not at all.
	StoreWait time.Duration
	// Sync is how often what was acknowledged is forced to disk. 0, the
	// default, means before every acknowledgement. With anything else a power
	// cut loses up to that much of what was acknowledged; a kill -9 loses
	// nothing in either case.
	Sync time.Duration
	// MaxMemory bounds memory-backed streams in bytes; 0 means DefaultMaxMemory.
	MaxMemory int64
	// MaxFile bounds file-backed streams in bytes; 0 means three quarters of
	// what the disk has free at the start.
	MaxFile int64

	// Credentials that clients must show, on loopback as well. One kind.
	User, Password string
	Token          string
	NKeys          []string // public user nkeys (U…)

	// MonitorPort serves nats-server's own monitoring over HTTP, on 127.0.0.1
	// only because it knows no credentials; 0 means none, -1 a free port.
	MonitorPort int

	// Cluster, if set, makes the server one node of a cluster.
	Cluster *ClusterOptions

	// Logger hears the server's log, without credentials.
	Logger zerolog.Logger
}

// ClusterOptions is a node's view of its cluster.
type ClusterOptions struct {
	Name string // the same on all nodes
	// Host and Port are where other nodes connect to. Host empty means
	// 127.0.0.1; one that other machines can reach needs User and Password.
	Host string
	Port int
	// Flag is the name, without dashes, of the flag that Host and Port came
	// from; empty means nats-cluster-listen.
	Flag string
	// Routes are the other nodes as nats://host:port (its own address is
	// harmless). JetStream needs at least one, and takes their number for the
	// cluster's size at its very first start.
	Routes []string
	// User and Password, the same on all nodes, guard the routes.
	User, Password string
}

// Server is a running server. Its methods are safe for concurrent use.
type Server struct {
	o      Options
	ns     *server.Server
	lock   *os.File
	stops  chan struct{} // closed when somebody began to stop
	done   chan struct{} // closed when it is stopped and the store is free
	cancel context.CancelFunc

	// Kept because the server forgets them when it stops. Never changed after
	// Start; the last two may be nil.
	addr, clusterAddr, monitorAddr net.Addr
}

// ErrStoreInUse is wrapped by Start's error when another server has the store.
var ErrStoreInUse = errors.New("another server uses it")

// Start starts a server and returns when clients can connect and the streams on
// disk are recovered (in a cluster: before there is a leader, see WaitReady). ctx
// bounds the start only. A taken port gives a *telemetry.ListenError that names
// the flag.
func Start(ctx context.Context, o Options) (*Server, error) {
	o = withDefaults(o)
	sopts, err := serverOptions(o)
	if err != nil {
		return nil, err
	}
	lock, err := claim(ctx, o)
	if err != nil {
		return nil, err
	}
	ns, err := server.NewServer(sopts)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("embedded NATS: %w", err), lock.Close())
	}
	fatal := make(chan error, 1)
	ns.SetLoggerV2(newLogger(o, fatal), o.Logger.GetLevel() <= zerolog.TraceLevel, false, false)

	runCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s := &Server{o: o, ns: ns, lock: lock, stops: make(chan struct{}), done: make(chan struct{}), cancel: cancel}
	started := make(chan struct{})
	go func() { ns.Start(); close(started) }()
	go func() {
		// The only goroutine that stops the server and frees the store. A
		// start that was given up is stopped when its recovery is over: the
		// store must not be free before.
		<-runCtx.Done()
		close(s.stops)
		<-started
		ns.Shutdown()
		ns.WaitForShutdown()
		// Closing drops the lock; there is nothing to do about an error.
		_ = lock.Close()
		close(s.done)
	}()

	err = s.awaitStart(ctx, started, fatal)
	if err == nil {
		return s, nil
	}
	cancel()
	if ctx.Err() == nil {
		<-s.done // so that the caller may try again at once
	}
	return nil, err
}

func (s *Server) awaitStart(ctx context.Context, started <-chan struct{}, fatal <-chan error) error {
	select {
	case <-started:
	case err := <-fatal:
		return err
	case <-ctx.Done():
		return fmt.Errorf("start embedded NATS: %w", ctx.Err())
	}
	if s.o.Cluster != nil {
		// The port for the other nodes is opened by a goroutine of its own.
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for s.ns.ClusterAddr() == nil {
			select {
			case <-tick.C:
			case err := <-fatal:
				return err
			case <-ctx.Done():
				return fmt.Errorf("start embedded NATS: %w", ctx.Err())
			}
		}
	}
	select {
	case err := <-fatal:
		return err
	default:
	}
	if s.addr = s.ns.Addr(); s.addr == nil || !s.ns.JetStreamEnabled() {
		return errors.New("embedded NATS did not come up: its log says why")
	}
	if a := s.ns.ClusterAddr(); a != nil {
		s.clusterAddr = a
	}
	if a := s.ns.MonitorAddr(); a != nil {
		s.monitorAddr = a
	}
	return nil
}

// ClientURL is where clients connect to, without credentials.
func (s *Server) ClientURL() string { return "nats://" + s.addr.String() }

// Addr is the client listener's address.
func (s *Server) Addr() net.Addr { return s.addr }

// MonitorURL is the address of the monitoring pages; empty if there are none.
func (s *Server) MonitorURL() string {
	if s.monitorAddr == nil {
		return ""
	}
	return "http://" + s.monitorAddr.String()
}

// ClusterURL is where other nodes connect to, without credentials; empty if the
// server is not in a cluster.
func (s *Server) ClusterURL() string {
	if s.clusterAddr == nil {
		return ""
	}
	return "nats://" + s.clusterAddr.String()
}

// InProcess gives connections that need no socket, for natsconn.Options or
// nats.InProcessServer. Credentials are still asked for.
func (s *Server) InProcess() nats.InProcessConnProvider { return s.ns }

// WaitReady waits until JetStream can be used: at once on a single server, when a
// leader is elected and this node has caught up in a cluster.
func (s *Server) WaitReady(ctx context.Context) error {
	if s.o.Cluster == nil {
		return nil
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !s.ns.JetStreamIsCurrent() {
		select {
		case <-tick.C:
		case <-s.stops:
			return errors.New("embedded NATS was stopped")
		case <-ctx.Done():
			return fmt.Errorf("embedded NATS: the cluster %s has no leader that %s follows (%d of its routes are connected): %w",
				s.o.Cluster.Name, s.o.Name, s.ns.NumRoutes(), ctx.Err())
		}
	}
	return nil
}

// LeadsMeta says whether this node leads its cluster's assignment of streams.
func (s *Server) LeadsMeta() bool { return s.o.Cluster != nil && s.ns.JetStreamIsLeader() }

// LeadsStream says whether this node leads a stream of the default account; for
// tests and drills that stop exactly that node.
func (s *Server) LeadsStream(stream string) bool {
	return s.o.Cluster != nil && s.ns.JetStreamIsStreamLeader(server.DEFAULT_GLOBAL_ACCOUNT, stream)
}

// Done is closed when the server is stopped and its store may be used again.
func (s *Server) Done() <-chan struct{} { return s.done }

// Stop closes the connections, writes what JetStream holds and waits for it until
// ctx is done. It may be called more than once.
func (s *Server) Stop(ctx context.Context) error {
	s.cancel()
	select {
	case <-s.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("stop embedded NATS: %w", ctx.Err())
	}
}

func withDefaults(o Options) Options {
	if o.Name == "" {
		o.Name = "tollkeeper"
	}
	if o.Host == "" {
		o.Host = "127.0.0.1"
	}
	if o.Flag == "" {
		o.Flag = "nats-listen"
	}
	if o.MaxMemory == 0 {
		o.MaxMemory = DefaultMaxMemory
	}
	if o.Cluster != nil {
		c := *o.Cluster
		if c.Host == "" {
			c.Host = "127.0.0.1"
		}
		if c.Flag == "" {
			c.Flag = "nats-cluster-listen"
		}
		o.Cluster = &c
	}
	return o
}

func serverOptions(o Options) (*server.Options, error) {
	if o.StoreDir == "" {
		return nil, errors.New("embedded NATS: no store directory is given")
	}
	if o.MaxMemory < 0 || o.MaxFile < 0 || o.Sync < 0 {
		return nil, errors.New("embedded NATS: bounds and sync interval must not be negative")
	}
	kinds := 0
	for _, given := range []bool{o.User != "" || o.Password != "", o.Token != "", len(o.NKeys) > 0} {
		if given {
			kinds++
		}
	}
	if kinds > 1 {
		return nil, errors.New("embedded NATS: several kinds of credentials are given: choose user and password, token, or nkeys")
	}
	if (o.User == "") != (o.Password == "") {
		return nil, errors.New("embedded NATS: user and password belong together")
	}
	if err := checkHost(o.Flag, o.Host, o.Port, kinds == 1); err != nil {
		return nil, err
	}
	so := &server.Options{
		ServerName:             o.Name,
		Host:                   o.Host,
		Port:                   portOrFree(o.Port),
		NoSigs:                 true,
		JetStream:              true,
		DisableJetStreamBanner: true,
		StoreDir:               o.StoreDir,
		JetStreamMaxMemory:     o.MaxMemory,
		JetStreamMaxStore:      o.MaxFile,
		SyncAlways:             o.Sync == 0,
		SyncInterval:           o.Sync,
		Username:               o.User,
		Password:               o.Password,
		Authorization:          o.Token,
	}
	for i, k := range o.NKeys {
		// The server would take anything and then refuse everybody. The key
		// is not repeated: it may be a seed by mistake.
		if !nkeys.IsValidPublicUserKey(k) {
			return nil, fmt.Errorf("embedded NATS: nkey %d is not a user's public key (U…)", i+1)
		}
		so.Nkeys = append(so.Nkeys, &server.NkeyUser{Nkey: k})
	}
	if o.MonitorPort != 0 {
		so.HTTPHost, so.HTTPPort = "127.0.0.1", o.MonitorPort
	}
	if c := o.Cluster; c != nil {
		if err := clusterOptions(so, c); err != nil {
			return nil, err
		}
	}
	return so, nil
}

func clusterOptions(so *server.Options, c *ClusterOptions) error {
	if c.Name == "" || len(c.Routes) == 0 {
		return errors.New("embedded NATS: a cluster needs a name and routes to its other nodes")
	}
	if (c.User == "") != (c.Password == "") {
		return errors.New("embedded NATS: the cluster's user and password belong together")
	}
	if err := checkHost(c.Flag, c.Host, c.Port, c.User != ""); err != nil {
		return err
	}
	so.Cluster = server.ClusterOpts{
		Name: c.Name, Host: c.Host, Port: portOrFree(c.Port),
		Username: c.User, Password: c.Password,
	}
	for i, r := range c.Routes {
		u, err := url.Parse(r)
		if err != nil || u.Host == "" {
			// url's error repeats the route, which may have a password.
			return fmt.Errorf("embedded NATS: cluster route %d is not of the form nats://host:port", i+1)
		}
		if u.User == nil && c.User != "" {
			u.User = url.UserPassword(c.User, c.Password)
		}
		so.Routes = append(so.Routes, u)
	}
	return nil
}

// portOrFree translates "0 is a free port" to nats-server, where 0 is its default.
func portOrFree(port int) int {
	if port == 0 {
		return server.RANDOM_PORT
	}
	return port
}

func checkHost(flag, host string, port int, guarded bool) error {
	addr := net.JoinHostPort(host, strconv.Itoa(port))
	loopback, err := telemetry.IsLoopback(host)
	if err != nil {
		return &telemetry.ListenError{Flag: flag, Addr: addr, Err: err}
	}
	if !loopback && !guarded {
		return &telemetry.ListenError{Flag: flag, Addr: addr, Err: telemetry.ErrNotLoopback}
	}
	return nil
}

// checkPorts opens and closes the ports that were asked for by number.
func checkPorts(o Options) error {
	type ask struct {
		flag, host string
		port       int
	}
	asks := []ask{{o.Flag, o.Host, o.Port}}
	if o.MonitorPort > 0 {
		asks = append(asks, ask{"nats-monitor-port", "127.0.0.1", o.MonitorPort})
	}
	if c := o.Cluster; c != nil {
		asks = append(asks, ask{c.Flag, c.Host, c.Port})
	}
	for _, a := range asks {
		if a.port == 0 {
			continue
		}
		// Whether other machines may reach it was decided before.
		l, err := telemetry.Listen(a.flag, net.JoinHostPort(a.host, strconv.Itoa(a.port)), true)
		if err != nil {
			return err
		}
		if err := l.Close(); err != nil {
			return err
		}
	}
	return nil
}

// claimEvery is how often claim looks again.
const claimEvery = 20 * time.Millisecond

// claim locks the store, and finds out whether the ports are free: now rather than by the
// server, which opens them only after the recovery of what may be gigabytes.
func claim(ctx context.Context, o Options) (*os.File, error) {
	began := time.Now()
	var lock *os.File
	var waited bool
	for {
		var err error
		if lock == nil {
			lock, err = lockStore(o.StoreDir)
		}
		if err == nil {
			if err = checkPorts(o); err == nil {
				return lock, nil
			}
		}
		// A killed process frees its store before its ports. Where nobody held the
		// store, the port is another program's.
		passes := errors.Is(err, ErrStoreInUse) || waited && errors.Is(err, syscall.EADDRINUSE)
		if !passes || time.Since(began) >= o.StoreWait {
			if lock != nil {
				err = errors.Join(err, lock.Close())
			}
			return nil, err
		}
		if !waited {
			waited = true
			o.Logger.Warn().Str("store", o.StoreDir).Dur("at_most_ms", o.StoreWait).Msg("another server holds the NATS store; waiting for it to end; stop it if it lives")
		}
		select {
		case <-time.After(claimEvery):
		case <-ctx.Done():
			if lock != nil {
				err = errors.Join(err, lock.Close())
			}
			return nil, errors.Join(ctx.Err(), err)
		}
	}
}

// lockStore creates dir and takes its lock, which ends with the process if not
// before.
func lockStore(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("embedded NATS: store directory: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("embedded NATS: store directory: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = ErrStoreInUse
		}
		return nil, errors.Join(fmt.Errorf("embedded NATS: store directory %s: %w: stop it, or choose another directory", dir, err), f.Close())
	}
	return f, nil
}

// secrets are what must not appear in the log.
func (o Options) secrets() []string {
	all := []string{o.Password, o.Token}
	if c := o.Cluster; c != nil {
		all = append(all, c.Password)
		for _, r := range c.Routes {
			if u, err := url.Parse(r); err == nil && u.User != nil {
				if p, ok := u.User.Password(); ok {
					all = append(all, p)
				} else {
					all = append(all, u.User.Username())
				}
			}
		}
	}
	var some []string
	for _, s := range all {
		if s != "" {
			some = append(some, s, url.QueryEscape(s), url.PathEscape(s))
		}
	}
	return some
}

func newReplacer(secrets []string) *strings.Replacer {
	pairs := make([]string, 0, 2*len(secrets))
	for _, s := range secrets {
		pairs = append(pairs, s, "…")
	}
	return strings.NewReplacer(pairs...)
}
