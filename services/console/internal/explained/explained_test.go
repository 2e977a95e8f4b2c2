package explained

import (
	"context"
	"fmt"
	"testing"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/explain"
)

func TestWhatHindersAnExplanationIsSaid(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		err    error
		status int
	}{
		{fmt.Errorf("x: %w", explain.ErrID), 400}, {fmt.Errorf("x: %w", explain.ErrCursor), 400}, {fmt.Errorf("x: %w", explain.ErrUnknown), 404}, {fmt.Errorf("x: %w", explain.ErrNotRefused), 404},
		{fmt.Errorf("x: %w", ledger.ErrPurged), 410}, {fmt.Errorf("x: %w", ledger.ErrRewound), 503}, {fmt.Errorf("x: %w", context.DeadlineExceeded), 503},
	} {
		if p := problem("id", c.err); p.Status != c.status || p.Detail == "" {
			t.Errorf("%v: %+v", c.err, p)
		}
	}
}
