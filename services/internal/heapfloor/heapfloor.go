// Package heapfloor keeps Go from collecting a small heap several times a second. A
// gateway that holds a few dozen megabytes makes as much garbage with a few thousand
// calls: by Go's own rule (collect when the heap has doubled) a tenth of its time went
// into collections.
package heapfloor

import (
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
)

// DefaultBytes is the floor of our programs. A heap of half as much, or more, is collected
// by Go's own rule.
const DefaultBytes = 192 << 20

// ownRule is Go's own: a collection when the heap has grown by its own size.
const ownRule = 100

// Set makes the heap grow to floor bytes before it is collected, from the next collection
// on, for the rest of the process. It does nothing where the operator has said how memory
// is to be used (GOGC, GOMEMLIMIT), and reports whether it does.
func Set(floor uint64) bool {
	if os.Getenv("GOGC") != "" || debug.SetMemoryLimit(-1) != math.MaxInt64 {
		return false
	}
	debug.SetGCPercent(percent(floor, live()))
	watch(floor)
	return true
}

// percent is the GOGC with which a heap is collected when it reaches floor, or has
// doubled.
func percent(floor, live uint64) int {
	const least = 1 << 20 // a heap that is nearly empty must not make it absurd
	live = max(live, least)
	if floor < 2*live {
		return ownRule
	}
	return int((floor - live) * 100 / live)
}

// watch adjusts the percentage after every collection: a finalizer runs then.
func watch(floor uint64) {
	type sentinel struct{ _ [16]byte }
	var adjust func(*sentinel)
	adjust = func(s *sentinel) {
		debug.SetGCPercent(percent(floor, live()))
		runtime.SetFinalizer(s, adjust)
	}
	runtime.SetFinalizer(&sentinel{}, adjust)
}

// live is what the newest collection has left, bytes.
func live() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(sample)
	if sample[0].Value.Kind() != metrics.KindUint64 {
		return 0
	}
	return sample[0].Value.Uint64()
}
