package simulation

import (
	"flag"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

var (
	seed   = flag.Uint64("simulation.seed", 0, "seed of the first world; 0: a new one")
	worlds = flag.Int("simulation.worlds", 1000, "how many worlds are simulated")
	trace  = flag.Bool("simulation.trace", false, "print what happens")
)

// kinds of worlds, by seed, so that one thing that goes wrong is not always in
// the company of all others.
func options(seed uint64) Options {
	o := Options{Seed: seed, Trouble: 25 * time.Second}
	switch seed % 8 {
	case 0: // nothing goes wrong
	case 1:
		o.Kills = 0.8
	case 2:
		o.Stops, o.Takeovers = 0.6, 0.3
	case 3:
		o.Cuts = 0.6
	case 4:
		o.Loss = 0.08
	case 5:
		o.Takeovers = 1
	case 6:
		o.Ends, o.Takeovers = 0.4, 0.2
	default:
		o.Ends, o.Kills, o.Stops, o.Cuts, o.Takeovers, o.Loss = 0.1, 0.4, 0.3, 0.3, 0.2, 0.03
	}
	return o
}

func TestTheLawsHoldInEveryWorld(t *testing.T) {
	t.Parallel()
	first := *seed
	if first == 0 {
		first = rand.Uint64() >> 16
	}
	var (
		mu    sync.Mutex
		total Report
		group errgroup.Group
	)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for i := range uint64(*worlds) {
		group.Go(func() error {
			o := options(first + i)
			if *trace {
				o.Trace = func(line string) { t.Log(line) }
			}
			report, err := Run(o)
			mu.Lock()
			defer mu.Unlock()
			total.Add(&report)
			if err != nil {
				t.Errorf("%v\n%s\nagain with: go test ./internal/simulation -simulation.seed=%d -simulation.worlds=1 -simulation.trace", err, report.String(), o.Seed)
			}
			return err
		})
	}
	if group.Wait() == nil {
		t.Logf("%d worlds from seed %d on: %s", *worlds, first, total.String())
	}
	// A run in which nothing happens proves nothing.
	if *worlds >= 100 && (total.Grants == 0 || total.Denials == 0 || total.Decisions == 0 || total.Kills == 0 || total.Ends == 0 || total.Warm == 0 || total.DuplicateFrames == 0 || total.RepeatedRows == 0 || total.Answered == 0) {
		t.Errorf("too little happened: %s", total.String())
	}
}

func TestASeedGivesTheSameRun(t *testing.T) {
	t.Parallel()
	for s := range uint64(4) {
		first, err := Run(options(s + 4))
		if err != nil {
			t.Fatal(err)
		}
		if second, _ := Run(options(s + 4)); first != second {
			t.Errorf("seed %d: %s\nand then %s", s+4, first.String(), second.String())
		}
	}
}
