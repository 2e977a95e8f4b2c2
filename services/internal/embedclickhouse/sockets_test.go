package embedclickhouse

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/iotest"
)

func TestProcAddressesAreReadInTheMachinesOrder(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"0100007F:2328":                         "127.0.0.1:9000",
		"00000000:1FBB":                         "0.0.0.0:8123",
		"00000000000000000000000001000000:2328": "[::1]:9000",
		"0000000000000000FFFF00000100007F:2328": "127.0.0.1:9000",
	} {
		got, ok := parseProcAddr(text)
		if !ok || got != netip.MustParseAddrPort(want) {
			t.Errorf("%s is read as %v, %v; want %s", text, got, ok, want)
		}
	}
	for _, text := range []string{"", "0100007F", "0100007:2328", "0100007F:", "0100007F:12345", "xx:1", "010000:1"} {
		if got, ok := parseProcAddr(text); ok {
			t.Errorf("%q is read as %v, want it refused", text, got)
		}
	}
}

func TestAListenerBelongsToTheProcessThatHoldsIt(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	addr := netip.MustParseAddrPort(l.Addr().String())
	if owned, err := ownsListeners(os.Getpid(), addr); err != nil || !owned {
		t.Errorf("own listener: %v, %v; want it owned", owned, err)
	}
	// The parent sees the same table, but the socket isn't its own.
	if owned, err := ownsListeners(os.Getppid(), addr); err == nil && owned {
		t.Error("another process's listener counts as owned")
	}
	if owned, err := ownsListeners(os.Getpid(), addr, netip.MustParseAddrPort("127.0.0.1:1")); err != nil || owned {
		t.Errorf("one of two listeners: %v, %v; want not owned", owned, err)
	}
}

// A gateway's machine has many thousands of connections, and this looks every few seconds.
func TestConnectionsBehindTheListenersAreNotRead(t *testing.T) {
	t.Parallel()
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1FBB 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 71 1 0000000000000000 100 0 0 10 0
   1: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 72 1 0000000000000000 100 0 0 10 0
   2: 0100007F:2328 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 73 1 0000000000000000 100 0 0 10 0
`
	tooFar := errors.New("read too far")
	http, tcp := netip.MustParseAddrPort("127.0.0.1:8123"), netip.MustParseAddrPort("127.0.0.1:9000")
	found := make(map[netip.AddrPort]string)
	rest := io.MultiReader(strings.NewReader(table), iotest.ErrReader(tooFar))
	if err := parseListeners(rest, []netip.AddrPort{http, tcp}, found); err != nil || found[http] != "71" || found[tcp] != "73" {
		t.Errorf("found %v, %v", found, err)
	}
	missing := netip.MustParseAddrPort("127.0.0.1:1")
	rest = io.MultiReader(strings.NewReader(table), iotest.ErrReader(tooFar))
	if err := parseListeners(rest, []netip.AddrPort{missing}, make(map[netip.AddrPort]string)); !errors.Is(err, tooFar) {
		t.Errorf("a table that can't be read to its end: %v", err)
	}
}
