package console

import (
	"embed"
	"fmt"
	"io/fs"
)

//go:embed all:web/dist
var dist embed.FS

func embeddedPage() (fs.FS, error) {
	web, err := fs.Sub(dist, "web/dist")
	if err != nil {
		return nil, fmt.Errorf("console: %w", err)
	}
	return web, nil
}
