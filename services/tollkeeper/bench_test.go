package tollkeeper_test

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/services/tollkeeper"
)

// The bench runs and prints every figure; its numbers mean nothing at this size.
func TestTheBenchPrintsEveryFigure(t *testing.T) {
	t.Parallel()
	dir, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	err = tollkeeper.Bench(within(t, 4*time.Minute), tollkeeper.BenchOptions{
		Rounds: 1, Calls: 20_000, Accounts: 500, Crossings: 3, Seed: 1, Callers: 4, Load: 100 * time.Millisecond, Import: 200, Kills: 1, Replay: 2_000, Program: filepath.Join(dir, "tollkeeper"), Logger: zerolog.Nop(), Out: &out,
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"bare JetStream", "publish → counted", "clickhouse-go's own", "publish → durable", "admission", "crossing call", "p99", "a bare concurrent map", "ReverseProxy", "Tollkeeper: gateway", "plain", "chat", "streamed chat", "of bare", "import (tollkeeper apply)", "memory", "the ClickHouse engine ", "kill -9", "replay of 2000 rows"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the bench does not print %q", want)
		}
	}
	t.Log(out.String())
}
