package usage

import (
	"encoding/hex"
	"strings"
)

// ParseTraceparent reads a W3C traceparent; what is not one is no trace.
func ParseTraceparent(s string) (trace [16]byte, span [8]byte, flags byte, ok bool) {
	// 00-<32 hex>-<16 hex>-<2 hex>; later versions may append "-…".
	if len(s) < 55 || s[2] != '-' || s[35] != '-' || s[52] != '-' || strings.ToLower(s[:55]) != s[:55] {
		return trace, span, 0, false
	}
	version := s[:2]
	var v, f [1]byte
	_, errV := hex.Decode(v[:], []byte(version))
	_, errT := hex.Decode(trace[:], []byte(s[3:35]))
	_, errS := hex.Decode(span[:], []byte(s[36:52]))
	_, errF := hex.Decode(f[:], []byte(s[53:55]))
	bad := errV != nil || errT != nil || errS != nil || errF != nil || version == "ff" ||
		version == "00" && len(s) != 55 || len(s) > 55 && s[55] != '-' || trace == [16]byte{} || span == [8]byte{}
	if bad {
		return [16]byte{}, [8]byte{}, 0, false
	}
	return trace, span, f[0], true
}
