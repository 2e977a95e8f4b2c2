package lane

import (
	"unsafe"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// MaxGateway bounds the gateway's name, which every frame carries.
const MaxGateway = 64

// callBytes is what a call takes while it waits, itself, and it bounds its
// fixed-width part of a frame from above. The 128 beyond its own size are for
// the frame's header and blocks, so that a frame of a single call is within
// its charge too.
const callBytes = int64(unsafe.Sizeof(usage.Call{})) + 128

// ownMeterBytes is the same for a reading of a user's own meter; when it is the
// only one of its meter in a full frame, it brings name, bitmap and block.
const ownMeterBytes = int64(unsafe.Sizeof(usage.Quantity{})) + 64 + (1000+7)/8 + 32

// Charge bounds from above the bytes that a call takes in memory before its
// frame is sealed, and what it adds to the frame.
func Charge(c *usage.Call) int64 {
	return callBytes + int64(len(c.Account)+len(c.KeyID)+len(c.RequestID)+len(c.Method)+len(c.Route)+len(c.Model)+len(c.Region)+
		len(c.Code)+len(c.DecisionID)+len(c.Source)+len(c.EventID)+len(c.PriceVersion)+len(c.Currency)) +
		int64(len(c.Quantities.Custom()))*ownMeterBytes
}
