// Package applied shows how far applying plans is.
package applied

import (
	"io"
	"time"

	"github.com/schollz/progressbar/v3"
)

// progressAfter is from when on a person wants to see that it gets on.
const progressAfter = 2 * time.Second

// Progress draws a bar when applying takes long.
type Progress struct {
	Out   io.Writer
	Now   func() time.Time
	begun time.Time
	bar   *progressbar.ProgressBar
}

// Show is called with how much is done; total is 0 when that is not known.
func (p *Progress) Show(done, total int) {
	now := p.Now()
	if p.begun.IsZero() {
		p.begun = now
	}
	if total == 0 || now.Sub(p.begun) < progressAfter {
		return
	}
	if p.bar == nil {
		p.bar = progressbar.NewOptions(total, progressbar.OptionSetWriter(p.Out), progressbar.OptionSetDescription("entries and records"),
			progressbar.OptionShowCount(), progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionClearOnFinish())
	}
	p.bar.ChangeMax(total)
	_ = p.bar.Set(done) // for people; its loss harms nothing
}

// End takes the bar away.
func (p *Progress) End() {
	if p.bar != nil {
		_ = p.bar.Clear() // as above
	}
}
