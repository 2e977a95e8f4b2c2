package fleet

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// echo answers what it hears.
func echo(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); _ = c.Close() }()
		}
	}()
	return l.Addr().String()
}

func hears(t *testing.T, c net.Conn, want string, within time.Duration) bool {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(within)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	switch _, err := io.ReadFull(c, got); {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return false
	case err != nil:
		t.Fatal(err)
	}
	if string(got) != want {
		t.Fatalf("heard %q, want %q", got, want)
	}
	return true
}

func TestWhatIsSentWhileALinkIsCutArrivesWhenItIsMended(t *testing.T) {
	t.Parallel()
	k, err := NewLink(echo(t))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := k.Close(); err != nil {
			t.Error(err)
		}
	}()
	c, err := net.Dial("tcp", k.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	say := func(text string) {
		if _, err := io.WriteString(c, text); err != nil {
			t.Fatal(err)
		}
	}
	say("one")
	if !hears(t, c, "one", 10*time.Second) {
		t.Fatal("nothing came through a whole link")
	}
	for range 3 {
		k.Cut()
		say("two")
		if hears(t, c, "two", 50*time.Millisecond) {
			t.Fatal("a cut link let something through")
		}
		k.Mend()
		if !hears(t, c, "two", 10*time.Second) {
			t.Fatal("what was held back did not arrive")
		}
	}
	k.Cut()
	late, err := net.Dial("tcp", k.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = late.Close() }()
	if _, err := io.WriteString(late, "late"); err != nil {
		t.Fatal(err)
	}
	if hears(t, late, "late", 50*time.Millisecond) {
		t.Fatal("a connection through a cut link was answered")
	}
	k.Mend()
	if !hears(t, late, "late", 10*time.Second) {
		t.Fatal("the late connection was not carried")
	}
}

func TestALinkToNobodyCloses(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	target := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	k, err := NewLink(target)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", k.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection was not closed: %v", err)
	}
	if err := k.Close(); err != nil {
		t.Error(err)
	}
}
