// Package replayed measures how many rows of a trace a replay drives through everything
// in a second: real HTTP calls through the gateway, ledger, counters and ClickHouse.
package replayed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strconv"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/replay"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
)

// Options of the measurement.
type Options struct {
	Rows int
	Seed uint64
	// Replay replays rows into a Tollkeeper of its own.
	Replay func(ctx context.Context, rows []trace.Row) (*replay.Report, error)
	Out    io.Writer
}

const (
	accounts = 1000
	// aim is what a replay is to reach on two cores, calls a second.
	aim = 15_000
)

// Run measures and prints. An error is also that the points of conservation differ.
func Run(ctx context.Context, o Options) error {
	rows := generate(o.Rows, o.Seed)
	from, err := cpu()
	if err != nil {
		return err
	}
	report, err := o.Replay(ctx, rows)
	if err != nil {
		return fmt.Errorf("replay: %w", err)
	}
	if err := report.Err(); err != nil {
		return fmt.Errorf("replay: %w", err)
	}
	to, err := cpu()
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(o.Out, 0, 0, 3, ' ', 0)
	rate := float64(len(rows)) / max(report.Seen.Took.Seconds(), 1e-9)
	_, err = fmt.Fprintf(w, "\nreplay of %d rows, %d accounts: HTTP, gateway, upstream, ledger, counters and ClickHouse on %d CPUs\n"+
		"  calls answered\t%.0f a second\t%.2f of the aim, %d\n  CPU time a call, start and end of everything included\t%.1f µs\t\n",
		len(rows), accounts, runtime.NumCPU(), rate, rate/aim, aim, float64((to-from).Nanoseconds())/1e3/float64(len(rows)))
	return errors.Join(err, w.Flush())
}

// generate makes calls of a chat model; accounts are drawn from a zipf distribution.
func generate(n int, seed uint64) []trace.Row {
	r := rand.New(rand.NewPCG(seed, 15))
	zipf := rand.NewZipf(r, 1.1, 1, accounts-1)
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	rows := make([]trace.Row, n)
	for i := range rows {
		at = at.Add(time.Duration(r.IntN(int(20 * time.Millisecond))))
		rows[i] = trace.Row{
			Time: at, Account: "a" + strconv.FormatUint(zipf.Uint64(), 10), Method: "POST", Route: "chat", Model: "m", File: "generated", Line: i + 1,
			Meters: []usage.Quantity{{Meter: usage.InputTokens, Value: r.Int64N(4000)}, {Meter: usage.OutputTokens, Value: r.Int64N(500)}},
		}
	}
	return rows
}

// cpu is what this process and those of its children that have ended have used.
func cpu() (time.Duration, error) {
	sum := time.Duration(0)
	for _, who := range [...]int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var u syscall.Rusage
		if err := syscall.Getrusage(who, &u); err != nil {
			return 0, fmt.Errorf("read the CPU time: %w", err)
		}
		sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	return sum, nil
}
