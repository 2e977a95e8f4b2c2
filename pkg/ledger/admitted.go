package ledger

import (
	"strings"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// The ids that a gateway gives to calls it only answers for begin so. Whether the call
// itself is in the ledger is in the id, and not in a gateway's memory: the call's event
// may come late, twice, after a restart, or by another gateway.
const (
	recordedPrefix = "admitted-recorded-"
	openPrefix     = "admitted-open-"
)

// AdmittedID returns the id that the event of an admitted call must have. recorded: the
// call is in the ledger, and its event adds only what else the call has used.
func AdmittedID(recorded bool) string {
	if recorded {
		return recordedPrefix + ksuid.New().String()
	}
	return openPrefix + ksuid.New().String()
}

// onlyRest takes off an event what the ledger has already of its call: one of its calls,
// where the gateway that admitted it recorded it.
func onlyRest(c *usage.Call) {
	rest, recorded := strings.CutPrefix(c.EventID, recordedPrefix)
	if _, err := ksuid.Parse(rest); !recorded || err != nil || !c.Admitted() {
		return
	}
	calls, known := c.Quantities.BuiltIn(usage.CallsIndex)
	if !known {
		calls = 1
	}
	if calls >= 0 {
		c.Quantities.SetBuiltIn(usage.CallsIndex, max(calls-1, 0))
	}
}
