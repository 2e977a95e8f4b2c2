package embednats

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"syscall"
)

// StartCluster starts the nodes as one cluster on loopback and returns when each
// has caught up with the elected leader; on an error none is left running. Every
// node needs its own Name and StoreDir; what its Cluster leaves out is filled in
// (name "tollkeeper", a free port, routes to all nodes). Start with Server.Options
// starts one node again in its place. This is for tests, drills and clusters on
// one machine; on several machines each node calls Start.
func StartCluster(ctx context.Context, nodes []Options) ([]*Server, error) {
	if len(nodes) < 2 {
		return nil, errors.New("embedded NATS: a cluster has at least two nodes")
	}
	const attempts = 3
	for try := 1; ; try++ {
		servers, err := startCluster(ctx, nodes)
		// Between finding a free port and opening it somebody else may.
		if err == nil || try == attempts || !errors.Is(err, syscall.EADDRINUSE) {
			return servers, err
		}
	}
}

func startCluster(ctx context.Context, nodes []Options) ([]*Server, error) {
	nodes, err := wire(nodes)
	if err != nil {
		return nil, err
	}
	servers := make([]*Server, len(nodes))
	errs := make([]error, len(nodes))
	var wg sync.WaitGroup
	for i, o := range nodes {
		wg.Go(func() {
			s, err := Start(ctx, o)
			if err != nil {
				errs[i] = fmt.Errorf("node %s: %w", o.Name, err)
				return
			}
			servers[i] = s
		})
	}
	wg.Wait()
	if err = errors.Join(errs...); err == nil {
		for i, s := range servers {
			errs[i] = s.WaitReady(ctx)
		}
		if err = errors.Join(errs...); err == nil {
			return servers, nil
		}
	}
	for _, s := range servers {
		if s != nil {
			// ctx may be what ended; a stop takes well under two seconds.
			err = errors.Join(err, s.Stop(context.WithoutCancel(ctx)))
		}
	}
	return nil, err
}

// wire gives every node its cluster's name, a port and the routes.
func wire(nodes []Options) ([]Options, error) {
	wired := make([]Options, len(nodes))
	var routes []string
	for i, o := range nodes {
		o = withDefaults(o)
		c := ClusterOptions{Host: "127.0.0.1", Flag: "nats-cluster-listen"}
		if o.Cluster != nil {
			c = *o.Cluster
		}
		if c.Name == "" {
			c.Name = "tollkeeper"
		}
		if c.Port == 0 {
			l, err := net.Listen("tcp", net.JoinHostPort(c.Host, "0"))
			if err != nil {
				return nil, err
			}
			// All are held until all are found, else two may be the same.
			defer func() { _ = l.Close() }()
			c.Port = l.Addr().(*net.TCPAddr).Port
		}
		routes = append(routes, "nats://"+net.JoinHostPort(c.Host, strconv.Itoa(c.Port)))
		o.Cluster = &c
		wired[i] = o
	}
	for _, o := range wired {
		if len(o.Cluster.Routes) == 0 {
			o.Cluster.Routes = routes
		}
	}
	return wired, nil
}

// Options are the options that start this server again in its place: the same
// ports and store.
func (s *Server) Options() Options {
	o := s.o
	if a, ok := s.addr.(*net.TCPAddr); ok {
		o.Port = a.Port
	}
	if o.Cluster != nil {
		c := *o.Cluster
		if a, ok := s.clusterAddr.(*net.TCPAddr); ok {
			c.Port = a.Port
		}
		o.Cluster = &c
	}
	return o
}
