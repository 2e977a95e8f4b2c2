//go:build !linux

package embedclickhouse

// MaybeRunChild does nothing here: the engine exists for Linux only.
func MaybeRunChild() {}
