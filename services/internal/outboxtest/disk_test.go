package outboxtest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox"
	"github.com/tollkeeper/tollkeeper/pkg/gate/outbox/marks"
)

// A gateway whose disk is full in earnest needs a file system of its own: the test's
// child has one, in a namespace, and is what starts the gateways on it.
const (
	// childDisk: mount a small disk on the spool directory, fill it, recover it.
	childDisk = "TOLLKEEPER_OUTBOXTEST_DISK"
	// childFull: answer calls until there is no room for one, and say so.
	childFull = "TOLLKEEPER_OUTBOXTEST_FULL"
	diskBytes = 120 << 10
)

// fullVictim answers calls, without the ledger, until none is taken; then it waits to be
// killed.
func fullVictim(dir string) error {
	nc, err := nats.Connect("nats://127.0.0.1:1", nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1))
	if err != nil {
		return err
	}
	b, err := outbox.Open(outbox.Options{NATS: nc, Shards: shards, SpoolDir: dir, SpoolBeforeAnswer: true, OnFull: outbox.Refuse, Logger: zerolog.Nop()})
	if err != nil {
		return err
	}
	failed := make(chan error, 1)
	go func() { failed <- b.Run(context.Background()) }()
	for i := 0; ; i++ {
		ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
		err := b.Add(ctx, uint32(i%shards), bulky(i))
		cancel()
		switch {
		case errors.Is(err, outbox.ErrNotSafe):
			continue
		case errors.Is(err, outbox.ErrFull):
			if _, err := fmt.Println("full", i); err != nil {
				return err
			}
			return <-failed
		case err != nil:
			return err
		}
		if _, err := fmt.Printf("r%d-%s\n", i, filler); err != nil {
			return err
		}
	}
}

// smallDisk is the child with the file system: it has it filled, and then does what is
// done after that.
func smallDisk(url, dir string) error {
	if err := syscall.Mount("", "/", "", syscall.MS_PRIVATE|syscall.MS_REC, ""); err != nil {
		return fmt.Errorf("namespace: %w", err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprint("size=", diskBytes)); err != nil {
		return fmt.Errorf("namespace: %w", err)
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childDisk+"=", childFull+"=true")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() && !strings.HasPrefix(lines.Text(), "full") {
		fmt.Println("answered", lines.Text())
	}
	if err := cmd.Process.Kill(); err != nil {
		return err
	}
	if err := cmd.Wait(); err == nil {
		return errors.New("the victim ended by itself")
	}
	// What room is left somebody else takes.
	f, err := os.Create(filepath.Join(dir, "others"))
	for err == nil {
		_, err = f.Write(make([]byte, 512))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return afterFull(url, dir)
}

// afterFull is the gateway that is started on a full disk, first without the ledger.
func afterFull(url, dir string) error {
	nc, err := nats.Connect("nats://127.0.0.1:1", nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1))
	if err != nil {
		return err
	}
	defer nc.Close()
	o := outbox.Options{NATS: nc, Shards: shards, SpoolDir: dir, SpoolBeforeAnswer: true, OnFull: outbox.Refuse, Logger: zerolog.New(os.Stderr)}
	b, err := outbox.Open(o)
	if err != nil {
		return err
	}
	if err := b.Add(context.Background(), 0, call(0)); !errors.Is(err, outbox.ErrFull) {
		return fmt.Errorf("neither disk nor ledger: %w", err)
	}
	if err := b.Marks().Write(0, []marks.Mark{{Account: "acme", Limit: "free/calls", UsedAtMost: 1}}); !errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("a mark on a full disk: %w", err)
	}
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	if err := b.Close(gone); err != nil {
		return err
	}
	if o.NATS, err = nats.Connect(url, nats.MaxReconnects(-1)); err != nil {
		return err
	}
	defer o.NATS.Close()
	if b, err = outbox.Open(o); err != nil {
		return err
	}
	done := make(chan error, 1)
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	go func() { done <- b.Run(ctx) }()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for late := time.After(30 * time.Second); b.Stats().SpoolFailing || b.Stats().SpoolBytes > 4096; {
		select {
		case <-tick.C:
		case <-late:
			return fmt.Errorf("the spool is not sent, or makes no room: %+v", b.Stats())
		}
	}
	if err := b.Marks().Write(0, []marks.Mark{{Account: "acme", Limit: "free/calls", UsedAtMost: 1}}); err != nil {
		return err
	}
	if err := b.Add(context.Background(), 0, call(1<<20)); err != nil {
		return err
	}
	fmt.Println("answered r1048576")
	stop()
	if err := <-done; err != nil {
		return err
	}
	return b.Close(context.Background())
}

// A gateway that is started on a disk that the spool of the one before has filled sends
// that, which makes room; until then it does what its policy says.
func TestAFullDiskIsEmptiedByTheNextStart(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(os.Environ(), childURL+"="+r.s.ClientURL(), childSpool+"="+t.TempDir(), childDisk+"=true")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		if forbidden := errors.Is(err, syscall.EPERM) || strings.Contains(said.String(), "namespace:"); forbidden && !(os.Getuid() == 0 && os.Getenv("CI") == "true") {
			t.Skipf("NOT TESTED: a start on a full disk: this kernel allows no file system in a namespace: %v: %s", err, &said)
		}
		t.Fatalf("%v: %s", err, &said)
	}
	got, answered := r.read(t), 0
	for line := range strings.Lines(out.String()) {
		id, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "answered ")
		if !ok {
			t.Fatalf("it says %q", line)
		}
		answered++
		if got.calls[id] != 1 {
			t.Errorf("call %s was answered and is in the ledger %d times", id, got.calls[id])
		}
	}
	if answered < 10 || got.gaps != 0 {
		t.Errorf("%d were answered, %d gaps", answered, got.gaps)
	}
	t.Logf("%d calls were answered before %d bytes were full, %d are in the ledger", answered, diskBytes, len(got.calls))
}
