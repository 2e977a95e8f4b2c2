package outboxtest

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
)

// busy adds calls from many requests at once, so that the disk never rests,
// until the returned stop is called; that returns how many were added.
func busy(t *testing.T, b *outbox.Outbox, prefix string) (stop func() int) {
	const requests = 256
	filler := strings.Repeat("x", 200)
	ended := make(chan struct{})
	var wg sync.WaitGroup
	added := make([]int, requests)
	for w := range requests {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := 0; ; i++ {
				select {
				case <-ended:
					added[w] = i
					return
				default:
				}
				c := call(i)
				c.RequestID = fmt.Sprintf("%s-%d-%d", prefix, w, i)
				c.Model, c.Region = c.RequestID+filler, filler+c.RequestID
				if err := b.Add(context.Background(), uint32(i+w)%shards, c); err != nil {
					t.Error(err)
					return
				}
			}
		}()
	}
	return func() int {
		close(ended)
		wg.Wait()
		n := 0
		for _, a := range added {
			n += a
		}
		return n
	}
}

func TestTheSpoolOfAnEarlierProducerIsSentUnderLoad(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := t.TempDir()
	first := open(t, outbox.Options{NATS: r.connect(), SpoolDir: dir})
	run(t, first)
	r.stop()
	const left = 1000
	for i := range left {
		if err := first.Add(t.Context(), uint32(i)%shards, call(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := first.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.start()
	b := open(t, outbox.Options{NATS: r.connect(), SpoolDir: dir, SpoolBeforeAnswer: true})
	stop := busy(t, b, "load") // before Run: it finds work for the disk at once
	run(t, b)
	began := time.Now()
	until(t, "the earlier producer's calls are sent", func() bool { return b.Stats().Recovered.Admitted == left })
	t.Logf("after %s of load", time.Since(began))
	stop()
	if err := b.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}
