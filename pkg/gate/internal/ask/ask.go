// Package ask asks the ledger something until there is an answer.
package ask

import (
	"context"
	"fmt"
	"time"
)

// Until calls question, each time with two seconds, until it returns nil or ctx is
// done; then it reports false. waiting hears why there is no answer yet.
func Until(ctx context.Context, what string, waiting func(string), question func(context.Context) error) bool {
	wait := 50 * time.Millisecond
	for {
		once, cancel := context.WithTimeout(ctx, 2*time.Second)
		err := question(once)
		cancel()
		if err == nil {
			return true
		}
		waiting(fmt.Sprintf("%s can't be read (%v)", what, err))
		select {
		case <-ctx.Done():
			return false
		case <-time.After(wait):
		}
		wait = min(2*wait, time.Second)
	}
}
