package heapfloor

import (
	"os"
	"runtime"
	"runtime/debug"
	"testing"
)

func TestALargeHeapIsCollectedByGosOwnRule(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		floor, live uint64
		want        int
	}{
		{192 << 20, 48 << 20, 300},
		{192 << 20, 96 << 20, 100},
		{192 << 20, 97 << 20, 100},
		{192 << 20, 4 << 30, 100},
		{192 << 20, 0, 19100},
		{0, 1 << 20, 100},
	} {
		if got := percent(c.floor, c.live); got != c.want {
			t.Errorf("a floor of %d MiB, %d MiB in use: GOGC %d, want %d", c.floor>>20, c.live>>20, got, c.want)
		}
	}
}

// It changes the whole process, so it is not parallel to others.
func TestASmallHeapIsCollectedSeldom(t *testing.T) {
	before := debug.SetGCPercent(100)
	defer debug.SetGCPercent(before)
	collections := func() uint32 {
		var from, to runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&from)
		for range 256 << 20 >> 16 {
			garbage = make([]byte, 1<<16)
		}
		runtime.ReadMemStats(&to)
		return to.NumGC - from.NumGC
	}
	often := collections()
	if !Set(64 << 20) {
		const why = "NOT TESTED: GOGC or GOMEMLIMIT is set, which decides instead of the floor; unset it"
		if os.Getenv("CI") != "" {
			t.Fatal(why)
		}
		t.Skip(why)
	}
	if seldom := collections(); seldom > 8 || often < 3*seldom {
		t.Errorf("256 MiB of garbage: %d collections, %d without the floor of 64 MiB", seldom, often)
	}
}

// garbage escapes to the heap.
var garbage []byte

func TestWhoSetsGOGCOrGOMEMLIMITIsObeyed(t *testing.T) {
	t.Setenv("GOGC", "50")
	if Set(64 << 20) {
		t.Error("GOGC is overruled")
	}
	t.Setenv("GOGC", "")
	before := debug.SetMemoryLimit(1 << 30)
	defer debug.SetMemoryLimit(before)
	if Set(64 << 20) {
		t.Error("GOMEMLIMIT is overruled")
	}
}
