package proxied

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
)

// startNginx starts nginx before an upstream; nil when it is not installed.
func startNginx(ctx context.Context, dir, upstream string) (*process, error) {
	program, err := exec.LookPath("nginx")
	if err != nil {
		return nil, nil
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	addr := free.Addr().String()
	if err := free.Close(); err != nil {
		return nil, err
	}
	// A folder for everybody: its workers may be of another user.
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(file, fmt.Appendf(nil, nginxConfig, runtime.NumCPU(), dir, dir, dir, dir, dir, dir, upstream, addr), 0o644); err != nil {
		return nil, err
	}
	p, err := start(exec.Command(program, "-p", dir, "-c", file, "-e", filepath.Join(dir, "error.log")))
	if err != nil {
		return nil, err
	}
	p.addr = addr
	within, cancel := context.WithTimeout(ctx, stuckAfter)
	defer cancel()
	err = await(within, func() (bool, error) {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return false, nil // not yet
		}
		return true, c.Close()
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("nginx does not listen: %w", err), p.stop())
	}
	return p, nil
}

const nginxConfig = `daemon off;
worker_processes %d;
pid %s/nginx.pid;
events { worker_connections 1024; }
http {
  access_log off;
  client_body_temp_path %s/body;
  proxy_temp_path %s/proxy;
  fastcgi_temp_path %s/fastcgi;
  uwsgi_temp_path %s/uwsgi;
  scgi_temp_path %s/scgi;
  client_body_buffer_size 64k;
  keepalive_requests 1000000000;
  upstream bench { server %s; keepalive 256; keepalive_requests 1000000000; }
  server {
    listen %s;
    location / {
      proxy_pass http://bench;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
    }
    location /stream {
      proxy_pass http://bench;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }
  }
}
`
