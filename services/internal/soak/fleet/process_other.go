//go:build !linux

package fleet

import "syscall"

func attributes() *syscall.SysProcAttr { return nil }
