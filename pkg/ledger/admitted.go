package ledger

import (
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// AdmittedID returns the id that the event of an admitted call must have. recorded: the
// call is in the ledger, and its event adds only what else the call has used.
func AdmittedID(recorded bool) string {
	if recorded {
		return usage.AdmittedRecordedPrefix + ksuid.New().String()
	}
	return usage.AdmittedOpenPrefix + ksuid.New().String()
}

// onlyRest takes off an event what the ledger has already of its call: one of its calls,
// where the gateway that admitted it recorded it.
func onlyRest(c *usage.Call) {
	if _, recorded := usage.AdmittedEvent(c.EventID); !recorded || !c.Admitted() {
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
