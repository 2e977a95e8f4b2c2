package main

import (
	"os"
	"testing"

	"github.com/alecthomas/kong"
	"github.com/rs/zerolog"
)

// A command that a person waits for says on standard error what is wrong; a service says
// also what goes well.
func TestCommandsLogWhatIsWrongUnlessMoreIsAskedFor(t *testing.T) {
	t.Setenv("TOLLKEEPER_LOG_LEVEL", "") // put back at the end
	if err := os.Unsetenv("TOLLKEEPER_LOG_LEVEL"); err != nil {
		t.Fatal(err)
	}
	level := func(args ...string) zerolog.Level {
		t.Helper()
		var c cli
		k, err := kong.New(&c, kong.Name("tollkeeper"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := k.Parse(args); err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		var log interface {
			Logger(string) (zerolog.Logger, error)
		}
		switch args[0] {
		case "apply":
			log = c.Apply
		case "explain":
			log = c.Explain
		case "audit":
			log = c.Audit
		case "correct":
			log = c.Correct
		case "replay":
			log = c.Replay
		case "up":
			log = c.Up
		}
		l, err := log.Logger("test")
		if err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		return l.GetLevel()
	}
	commands := [][]string{
		{"apply", "-f", "plans.yaml"}, {"explain", "id"}, {"audit"},
		{"correct", "--account", "acme", "--meter", "calls=-1", "--reason", "twice"}, {"replay", "--format", "csv", "log_test.go"},
		{"up"}, // which writes a line for each part
	}
	for _, args := range commands {
		if got := level(args...); got != zerolog.WarnLevel {
			t.Errorf("%v logs from %v on", args, got)
		}
		if got := level(append(args, "--verbose")...); got != zerolog.InfoLevel {
			t.Errorf("%v --verbose logs from %v on", args, got)
		}
		if got := level(append(args, "-v", "--log-level", "debug")...); got != zerolog.DebugLevel {
			t.Errorf("%v -v --log-level debug logs from %v on", args, got)
		}
	}
}
