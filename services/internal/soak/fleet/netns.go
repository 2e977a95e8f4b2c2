package fleet

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"
)

// Namespaces gives processes network namespaces of their own, joined by a bridge,
// so that a cable between them can really be pulled. A gateway has a second
// cable, to its clients and its upstream, which stays. It needs root and ip(8).
type Namespaces struct {
	id  string // four letters or digits
	net int    // third byte of the addresses

	mu    sync.Mutex
	known map[string]int // process → its number, which is its address's last byte
}

// NewNamespaces makes the bridges. net, 0 to 127, tells networks of one machine
// apart. An error that wraps ErrNoNamespaces says that this machine can't.
func NewNamespaces(ctx context.Context, id string, network int) (*Namespaces, error) {
	n := &Namespaces{id: id, net: network, known: map[string]int{}}
	if _, err := exec.LookPath("ip"); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoNamespaces, err)
	}
	if err := n.ip(ctx, "netns add "+n.space("probe")); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoNamespaces, err)
	}
	if err := n.ip(ctx, "netns del "+n.space("probe")); err != nil {
		return nil, err
	}
	for i, bridge := range []string{n.bridge("c"), n.bridge("f")} {
		for _, args := range []string{
			"link add " + bridge + " type bridge",
			fmt.Sprintf("addr add %s/24 dev %s", n.address(i == 1, 254), bridge),
			"link set " + bridge + " up",
		} {
			if err := n.ip(ctx, args); err != nil {
				return nil, errors.Join(fmt.Errorf("%w: %w", ErrNoNamespaces, err), n.Close())
			}
		}
	}
	return n, nil
}

// ErrNoNamespaces says that this machine does not allow network namespaces.
var ErrNoNamespaces = errors.New("network namespaces are not possible here")

func (n *Namespaces) ip(ctx context.Context, args string) error {
	out, err := exec.CommandContext(ctx, "ip", strings.Fields(args)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("ip %s: %w: %s", args, err, strings.TrimSpace(string(out)))
	}
	return nil
}

func (n *Namespaces) space(process string) string { return "tk" + n.id + "-" + process }
func (n *Namespaces) bridge(which string) string  { return "tk" + n.id + which }

// address of a process's core cable, or of its front one.
func (n *Namespaces) address(front bool, number int) string {
	second := 231
	if front {
		second = 232
	}
	return fmt.Sprintf("10.%d.%d.%d", second, n.net, number)
}

// Harness is the address at which gateways reach the harness.
func (n *Namespaces) Harness() string { return n.address(true, 254) }

// host makes the process's namespace, if there is none yet, and returns its
// address on the core bridge.
func (n *Namespaces) host(process string) (string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	number, ok := n.known[process]
	if !ok {
		number = len(n.known) + 1
		if err := n.join(process, number); err != nil {
			return "", err
		}
		n.known[process] = number
	}
	return n.address(false, number), nil
}

// front is the process's address for clients.
func (n *Namespaces) front(process string) (string, error) {
	if _, err := n.host(process); err != nil {
		return "", err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.address(true, n.known[process]), nil
}

func (n *Namespaces) join(process string, number int) error {
	ctx, space := context.Background(), n.space(process)
	commands := []string{"netns add " + space, "-n " + space + " link set lo up"}
	for _, which := range []string{"c", "f"} {
		outer := fmt.Sprintf("tk%s%s%d", n.id, which, number)
		commands = append(commands,
			fmt.Sprintf("link add %s type veth peer name %s0 netns %s", outer, which, space),
			fmt.Sprintf("link set %s master %s", outer, n.bridge(which)),
			"link set "+outer+" up",
			fmt.Sprintf("-n %s addr add %s/24 dev %s0", space, n.address(which == "f", number), which),
			fmt.Sprintf("-n %s link set %s0 up", space, which),
		)
	}
	for _, c := range commands {
		if err := n.ip(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// inside returns the command that runs argv in the process's namespace, if it has
// one.
func (n *Namespaces) inside(process string, argv []string) []string {
	if !n.has(process) {
		return argv
	}
	return append([]string{"ip", "netns", "exec", n.space(process)}, argv...)
}

func (n *Namespaces) has(process string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, ok := n.known[process]
	return ok
}

func (n *Namespaces) cut(process string) error  { return n.set(process, "down") }
func (n *Namespaces) mend(process string) error { return n.set(process, "up") }

func (n *Namespaces) set(process, state string) error {
	n.mu.Lock()
	number, ok := n.known[process]
	n.mu.Unlock()
	if !ok {
		return fmt.Errorf("%s has no namespace", process)
	}
	return n.ip(context.Background(), fmt.Sprintf("link set tk%sc%d %s", n.id, number, state))
}

// Close removes namespaces and bridges, with all that is in them. The processes
// must have ended.
func (n *Namespaces) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	var errs []error
	ctx := context.Background()
	for process := range n.known {
		errs = append(errs, n.ip(ctx, "netns del "+n.space(process)))
	}
	for _, which := range []string{"c", "f"} {
		if err := n.ip(ctx, "link del "+n.bridge(which)); err != nil && !strings.Contains(err.Error(), "Cannot find device") {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
