package tollkeeper_test

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A killed server's engine ends a moment later, and until then it listens: whoever
// starts the server again at once waits for that, and is not told that its port is
// another program's.
func TestAServerThatIsStartedAgainAtOnceWaitsForTheEngineOfTheKilledOne(t *testing.T) {
	t.Parallel()
	dir, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	s := &system{
		t: t, dir: t.TempDir(), programs: dir, running: map[string]*exec.Cmd{}, ended: map[string]chan struct{}{},
		clickhouse: freeAddr(t), clickhouseHTTP: freeAddr(t),
	}
	t.Cleanup(s.stop)
	s.start("clickhouse")
	engine := childOf(t, s.running["clickhouse"].Process.Pid)
	// It will be as slow to end as we like.
	if err := syscall.Kill(engine, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			_ = syscall.Kill(engine, syscall.SIGKILL) // stopped, it would stay for ever
		}
	})
	s.kill("clickhouse")

	again := s.command("clickhouse")
	again.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	said, err := again.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	s.running["clickhouse"], s.ended["clickhouse"] = again, ended
	waits := make(chan struct{})
	go func() {
		defer close(ended)
		lines := bufio.NewScanner(said)
		for lines.Scan() {
			if strings.Contains(lines.Text(), "data directory is in use") {
				close(waits)
			}
			t.Log(lines.Text())
		}
		_ = again.Wait() // it is ended by a signal, or has said why it failed
	}()
	select {
	case <-waits:
	case <-ended:
		t.Fatal("the server did not wait")
	}
	if err := syscall.Kill(engine, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(60 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !errors.Is(syscall.Kill(engine, 0), syscall.ESRCH) {
		if time.Now().After(deadline) {
			t.Fatal("the engine of the killed server does not end")
		}
		<-tick.C
	}
	s.awaitPort(s.clickhouse)
	select {
	case <-ended:
		t.Fatal("the second server ended")
	default:
	}
}

// childOf returns the process that another has started; there must be one.
func childOf(t *testing.T, pid int) int {
	t.Helper()
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	var children []string
	for _, list := range lists {
		// A thread may have ended meanwhile; its children are another's then.
		if text, err := os.ReadFile(list); err == nil {
			children = append(children, strings.Fields(string(text))...)
		}
	}
	if len(children) != 1 {
		t.Fatalf("process %d has the children %v, want one", pid, children)
	}
	child, err := strconv.Atoi(children[0])
	if err != nil {
		t.Fatal(err)
	}
	return child
}
