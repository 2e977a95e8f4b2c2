// Command soak tries for a long time to make Tollkeeper break its laws, and
// reports what came of it.
package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"github.com/tollkeeper/tollkeeper/services/internal/soak"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/fleet"
	"github.com/tollkeeper/tollkeeper/services/internal/soak/report"
)

type flags struct {
	Scenario []string      `help:"Which to run; all when none is given." sep:","`
	List     bool          `help:"Say which scenarios there are."`
	Rounds   int           `help:"Rounds of each; 0 is each scenario's own number."`
	Short    bool          `help:"Few rounds and little load, as the tests do it."`
	Rate     float64       `help:"Calls a second; 0 is each scenario's own."`
	Seed     uint64        `help:"Seed of everything random; drawn and printed when 0."`
	Programs string        `help:"Folder with the built programs; built when empty." type:"path"`
	Dir      string        `help:"Folder for data and logs; a temporary one, removed when no law is broken, when empty." type:"path"`
	Report   string        `help:"File for the report as JSON." type:"path"`
	Timeout  time.Duration `help:"How long all of it may take." default:"3h"`
}

func main() {
	fleet.MaybeRunNode()
	var f flags
	kong.Parse(&f, kong.Name("soak"), kong.Description("Tries for a long time to make Tollkeeper break its laws. Exit status 1: one was broken, or it could not be tried."))
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, f)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, f flags) (err error) {
	if f.List {
		for _, s := range soak.Scenarios() {
			fmt.Printf("%-14s %s (%d rounds)\n", s.Name, s.About, s.Rounds)
		}
		return nil
	}
	chosen, err := choose(f.Scenario)
	if err != nil {
		return err
	}
	if f.Seed == 0 {
		f.Seed = rand.Uint64N(1 << 53)
	}
	scratch := f.Dir == ""
	if scratch {
		if f.Dir, err = os.MkdirTemp("", "tollkeeper-soak-"); err != nil {
			return fmt.Errorf("make a folder: %w", err)
		}
	}
	if f.Programs == "" {
		f.Programs = filepath.Join(f.Dir, "programs")
		if err := build(ctx, f.Programs); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, f.Timeout, fmt.Errorf("not done within %s: give it longer with --timeout", f.Timeout))
	defer cancel()
	began := time.Now()
	say := func(format string, args ...any) {
		fmt.Printf("%6.1f s  "+format+"\n", append([]any{time.Since(began).Seconds()}, args...)...)
	}
	report := &report.Report{Seed: f.Seed, Started: began.UTC()}
	say("seed %d, data and logs in %s", f.Seed, f.Dir)
	var errs []error
	for _, s := range chosen {
		say("%s: %s", s.Name, s.About)
		out, err := s.Run(ctx, soak.Options{Programs: f.Programs, Dir: f.Dir, Seed: f.Seed, Rounds: f.Rounds, Short: f.Short, Rate: f.Rate, Say: say})
		errs = append(errs, err)
		report.Scenarios = append(report.Scenarios, out)
		if ctx.Err() != nil {
			break
		}
	}
	report.Seconds = time.Since(began).Seconds()
	errs = append(errs, write(report, f.Report))
	if broken := report.Broken(); len(broken) > 0 {
		errs = append(errs, fmt.Errorf("%d laws broken; data and logs are kept in %s", len(broken), f.Dir))
	} else if scratch {
		errs = append(errs, os.RemoveAll(f.Dir))
	}
	return errors.Join(errs...)
}

func choose(names []string) ([]soak.Scenario, error) {
	all := soak.Scenarios()
	if len(names) == 0 {
		return all, nil
	}
	var out []soak.Scenario
	for _, name := range names {
		i := slices.IndexFunc(all, func(s soak.Scenario) bool { return s.Name == name })
		if i < 0 {
			var known []string
			for _, s := range all {
				known = append(known, s.Name)
			}
			return nil, fmt.Errorf("there is no scenario %q: there are %s", name, strings.Join(known, ", "))
		}
		out = append(out, all[i])
	}
	return out, nil
}

func write(r *report.Report, file string) (err error) {
	fmt.Println()
	if err := r.WriteText(os.Stdout); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	if file == "" {
		return nil
	}
	w, err := os.Create(file)
	if err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	if err := errors.Join(r.WriteJSON(w), w.Close()); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return nil
}

// build builds the programs, when it is run inside the repository.
func build(ctx context.Context, dir string) error {
	const services = "github.com/tollkeeper/tollkeeper/services/"
	c := exec.CommandContext(ctx, "go", "build", "-o", dir+string(filepath.Separator), services+"tollkeeper/cmd/tollkeeper",
		services+"aggregator/cmd/aggregator", services+"historian/cmd/historian", services+"gateway/cmd/gateway", services+"auditor/cmd/auditor")
	c.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("build the programs (or name a folder that has them with --programs): %w\n%s", err, out)
	}
	return nil
}
