package embedclickhouse

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
)

// ownsListeners tells whether the process pid itself listens on every address. A port that answers
// proves nothing: it may belong to another server.
func ownsListeners(pid int, want ...netip.AddrPort) (bool, error) {
	listening := make(map[netip.AddrPort]string)
	for _, table := range []string{"tcp", "tcp6"} {
		err := readListeners(fmt.Sprintf("/proc/%d/net/%s", pid, table), want, listening)
		if err != nil && (table != "tcp6" || !os.IsNotExist(err)) { // a kernel without IPv6 has none
			return false, err
		}
	}
	if len(listening) != len(want) {
		return false, nil
	}
	fds := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(fds)
	if err != nil {
		return false, err
	}
	owned := make(map[string]bool)
	for _, entry := range entries {
		target, err := os.Readlink(fds + "/" + entry.Name())
		if err != nil {
			continue // closed since it was listed
		}
		if inode, ok := strings.CutPrefix(target, "socket:["); ok {
			owned[strings.TrimSuffix(inode, "]")] = true
		}
	}
	for _, inode := range listening {
		if !owned[inode] {
			return false, nil
		}
	}
	return true, nil
}

// readListeners is parseListeners of a file.
func readListeners(file string, want []netip.AddrPort, found map[netip.AddrPort]string) (err error) {
	if len(found) == len(want) {
		return nil
	}
	table, err := os.Open(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, table.Close()) }()
	return parseListeners(table, want, found)
}

// parseListeners adds the inode of each wanted listening socket in a /proc/net/tcp table. It reads
// no further than it has to: the kernel lists listeners before all connections of the machine, of
// which a busy gateway has many thousands.
func parseListeners(table io.Reader, want []netip.AddrPort, found map[netip.AddrPort]string) error {
	const (
		stateListen   = "0A"
		localField    = 1
		stateField    = 3
		inodeField    = 9
		fieldsAtLeast = 10
	)
	lines := bufio.NewScanner(table)
	for len(found) < len(want) && lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < fieldsAtLeast || fields[stateField] != stateListen {
			continue
		}
		local, ok := parseProcAddr(fields[localField])
		if ok && slices.Contains(want, local) {
			found[local] = fields[inodeField]
		}
	}
	return lines.Err()
}

// parseProcAddr reads "0100007F:2328": each 32-bit word of the address in the machine's order
// (little-endian here), the port in plain hex.
func parseProcAddr(text string) (netip.AddrPort, bool) {
	host, port, ok := strings.Cut(text, ":")
	if !ok {
		return netip.AddrPort{}, false
	}
	raw, err := hex.DecodeString(host)
	if err != nil || len(raw)%4 != 0 {
		return netip.AddrPort{}, false
	}
	for word := range slices.Chunk(raw, 4) {
		slices.Reverse(word)
	}
	addr, ok := netip.AddrFromSlice(raw)
	if !ok {
		return netip.AddrPort{}, false
	}
	number, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(addr.Unmap(), uint16(number)), true
}
