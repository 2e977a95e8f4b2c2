package ids

import (
	"sync"
	"testing"
	"time"

	"github.com/segmentio/ksuid"
)

func TestNewRequestIDsAreTimedAndDiffer(t *testing.T) {
	t.Parallel()
	began := time.Now().Add(-time.Second)
	var mu sync.Mutex
	seen := make(map[string]bool)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 5000 {
				id := Request("")
				parsed, err := ksuid.Parse(id)
				mu.Lock()
				if err != nil || seen[id] || parsed.Time().Before(began.Truncate(time.Second)) {
					t.Errorf("%q: %v, seen before: %v", id, err, seen[id])
				}
				seen[id] = true
				mu.Unlock()
			}
		})
	}
	all.Wait()
}
