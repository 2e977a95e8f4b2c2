package modelserver

import (
	"context"
	"fmt"
	"net"

	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

// Run serves on a free port of loopback until ctx is done. ready is called with the URL.
func Run(ctx context.Context, o Options, ready func(url string)) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("listen for the demo upstream: %w", err)
	}
	ready("http://" + l.Addr().String())
	return telemetry.Serve(ctx, telemetry.ServeOptions{Listener: l, Handler: Handler(o)})
}
