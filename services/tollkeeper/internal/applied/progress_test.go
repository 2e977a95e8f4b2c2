package applied

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestProgressIsShownOfWhatTakesLong(t *testing.T) {
	t.Parallel()
	now := time.Unix(1, 0)
	var out bytes.Buffer
	p := &Progress{Out: &out, Now: func() time.Time { return now }}
	p.Show(0, 0)
	for i := range 19 {
		now = now.Add(100 * time.Millisecond)
		p.Show(i, 1000)
	}
	p.End()
	if out.Len() != 0 {
		t.Errorf("before two seconds: %q", out.String())
	}
	now = now.Add(200 * time.Millisecond)
	p.Show(500, 1000)
	if !strings.Contains(out.String(), "entries and records") {
		t.Errorf("after two seconds: %q", out.String())
	}
	p.End()
}
