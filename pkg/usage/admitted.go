package usage

import "strings"

// The ids that a gateway gives to calls it only answers for (GET /v1/admit) begin so, and
// go on with a ksuid. Whether the call itself is in the ledger is in the id, and not in a
// gateway's memory: the call's event may come late, twice, after a restart, or by another
// gateway.
const (
	AdmittedRecordedPrefix = "admitted-recorded-"
	AdmittedOpenPrefix     = "admitted-open-"
)

// ksuidLength is that of a ksuid's text.
const ksuidLength = 27

// AdmittedEvent reports that an event's id is one that a gateway gave to a call it admitted,
// and whether the gateway has recorded the call.
func AdmittedEvent[T ~string | ~[]byte](id T) (admitted, recorded bool) {
	if len(id) < len(AdmittedOpenPrefix)+ksuidLength || id[0] != AdmittedOpenPrefix[0] {
		return false, false
	}
	rest, recorded := strings.CutPrefix(string(id), AdmittedRecordedPrefix)
	if !recorded {
		rest, admitted = strings.CutPrefix(rest, AdmittedOpenPrefix)
		if !admitted {
			return false, false
		}
	}
	if len(rest) != ksuidLength {
		return false, false
	}
	for i := range len(rest) {
		if c := rest[i]; (c < '0' || c > '9') && (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') {
			return false, false
		}
	}
	return true, recorded
}
