package fleet

import "syscall"

// attributes let no process outlive the harness.
func attributes() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }
