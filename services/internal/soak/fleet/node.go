package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
)

// nodeVariable makes this program a NATS server; its value is a node.
const nodeVariable = "TOLLKEEPER_SOAK_NATS_NODE"

// node is one NATS server, alone when it has no routes.
type node struct {
	Name        string
	Host        string
	Port        int
	StoreDir    string
	ClusterPort int
	Routes      []string
	User        string
	Password    string
}

// MaybeRunNode makes this process a NATS server if it was started as one, and
// then does not return. It is to be called before anything else by every program
// that starts a fleet.
func MaybeRunNode() {
	value := os.Getenv(nodeVariable)
	if value == "" {
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := runNode(ctx, value); err != nil {
		fmt.Fprintln(os.Stderr, "NATS node:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func runNode(ctx context.Context, value string) error {
	var n node
	if err := json.Unmarshal([]byte(value), &n); err != nil {
		return fmt.Errorf("%s: %w", nodeVariable, err)
	}
	o := embednats.Options{
		Name: n.Name, Host: n.Host, Port: n.Port, StoreDir: n.StoreDir, User: n.User, Password: n.Password,
		Logger: zerolog.New(os.Stderr).With().Timestamp().Logger(),
	}
	if len(n.Routes) > 0 {
		o.Cluster = &embednats.ClusterOptions{
			Name: "soak", Host: n.Host, Port: n.ClusterPort, Routes: n.Routes, User: n.User, Password: n.Password,
		}
	}
	// Its predecessor was killed a moment ago, and the kernel may not have let
	// go of everything it held.
	s, err := embednats.Start(ctx, o)
	for try := 0; err != nil && try < 100 && (errors.Is(err, embednats.ErrStoreInUse) || errors.Is(err, syscall.EADDRINUSE)); try++ {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
		s, err = embednats.Start(ctx, o)
	}
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
	case <-s.Done():
		return errors.New("the server ended by itself")
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	return s.Stop(end)
}
