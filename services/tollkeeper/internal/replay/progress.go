package replay

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mattn/go-isatty"
)

// How often progress is shown on a terminal and in a log.
const (
	terminalEvery = 200 * time.Millisecond
	logEvery      = 5 * time.Second
)

// ShowProgress shows how many of the calls are answered, how fast, and how long the
// rest will take at that pace: a bar on a terminal, a line now and then elsewhere.
// What it returns ends it.
func ShowProgress(w io.Writer, answered *atomic.Int64, total int64) (stop func()) {
	f, ok := w.(*os.File)
	terminal := ok && isatty.IsTerminal(f.Fd())
	every := logEvery
	if terminal {
		every = terminalEvery
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		begun := time.Now()
		for {
			select {
			case <-done:
				if terminal {
					_, _ = fmt.Fprint(w, "\r\x1b[K") // for people; its loss harms nothing
				}
				return
			case <-tick.C:
				line := progressLine(answered.Load(), total, time.Since(begun))
				if terminal {
					_, _ = fmt.Fprint(w, "\r\x1b[K"+line) // likewise
				} else {
					_, _ = fmt.Fprintln(w, line) // likewise
				}
			}
		}
	})
	return func() { close(done); wg.Wait() }
}

// barWidth is that of a bar, characters.
const barWidth = 24

func progressLine(n, total int64, since time.Duration) string {
	full := int(n * barWidth / max(total, 1))
	line := fmt.Sprintf("  [%s%s] %3d %%  %s of %s calls", strings.Repeat("#", full), strings.Repeat(".", barWidth-full), n*100/max(total, 1), number(n), number(total))
	rate := float64(n) / max(since.Seconds(), 1e-9)
	if n == 0 {
		return line
	}
	left := time.Duration(float64(total-n) / rate * float64(time.Second))
	return line + fmt.Sprintf(", %s a second; %s calls left, %s", number(int64(rate)), number(total-n), left.Round(time.Second))
}
