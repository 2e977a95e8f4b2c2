package outboxtest

import (
	"net"

	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
)

func port(s *embednats.Server) int { return s.Addr().(*net.TCPAddr).Port }
