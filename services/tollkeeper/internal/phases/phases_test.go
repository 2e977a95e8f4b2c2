package phases

import (
	"bytes"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
)

func TestALineTellsHowLongEachPartTook(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := Begin()
		time.Sleep(120 * time.Millisecond) // of the bubble's clock
		p.Ended("nats")
		p.Ended("plans")
		time.Sleep(30 * time.Millisecond)
		p.Ended("ledger")
		p.Beside("clickhouse", 2*time.Second)
		var out bytes.Buffer
		p.Tell(zerolog.New(&out))
		const want = `{"level":"info","total_ms":150,"phases":{"nats_ms":120,"ledger_ms":30,"clickhouse_beside_ms":2000},"message":"every part has started"}` + "\n"
		if got := out.String(); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	})
}
