package embedclickhouse

// What the supervisor and its child agree on.
const (
	childMarker = "TOLLKEEPER_EMBEDDED_CLICKHOUSE_CHILD"

	// The supervisor passes these as inherited files.
	controlFD = 3
	lockFD    = 4

	controlReady = 'r'
)

// childSpec is the first line on the control pipe. It goes there and not into argv or the
// environment, where other users of the machine could read it.
type childSpec struct {
	EnginePath string   `json:"engine_path"`
	Args       []string `json:"args"`
	Ports      []uint16 `json:"ports"`
}
