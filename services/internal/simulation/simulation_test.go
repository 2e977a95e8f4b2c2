package simulation

import (
	"flag"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sync/errgroup"
)

var (
	seed   = flag.Uint64("simulation.seed", 0, "seed of the first world; 0: a new one")
	worlds = flag.Int("simulation.worlds", 500, "how many worlds are simulated")
	trace  = flag.Bool("simulation.trace", false, "print what happens")
)

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
			o := Draw(first + i)
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
	if *worlds >= 100 && (total.Grants == 0 || total.Denials == 0 || total.Decisions == 0 || total.Kills == 0 || total.Ends == 0 || total.Warm == 0 || total.DuplicateFrames == 0 || total.RepeatedRows == 0 || total.Returned == 0 || total.Answered == 0) {
		t.Errorf("too little happened: %s", total.String())
	}
}

func TestASeedGivesTheSameRun(t *testing.T) {
	t.Parallel()
	for s := range uint64(4) {
		first, err := Run(Draw(s + 4))
		if err != nil {
			t.Fatal(err)
		}
		if second, _ := Run(Draw(s + 4)); first != second {
			t.Errorf("seed %d: %s\nand then %s", s+4, first.String(), second.String())
		}
	}
}
