// Package archtest holds the repository to the design's rules: who may import
// whom, how large a package may be, what its words are.
package archtest

import (
	"fmt"
	"slices"
	"strings"
)

const root = "github.com/tollkeeper/tollkeeper/"

// core are the packages of pkg that hold state machines: time and state in,
// values out.
var core = []string{"pkg/alert", "pkg/audit", "pkg/dedup", "pkg/lease", "pkg/quota", "pkg/window"}

// large are the packages of more than maxLines lines: why they need to be, and
// how large they may become before somebody has to think about it again.
var large = map[string]struct {
	lines int
	why   string
}{
	"services/internal/plans/planfile":  {1850, "one document: its reader, its checks and its differences tell problems by their places in the file, which only they know"},
	"pkg/gate/outbox":                   {2300, "sender, disk and bounds of one queue; its state machines are packages of their own below it"},
	"pkg/gate/wallet":                   {1600, "a purse on its way between calls, ledger, journal and shelf, under the lock of its shard: the parts would hand that lock to each other"},
	"pkg/lease":                         {2100, "two state machines and the words between them: apart, each would be tested against a description of the other"},
	"pkg/ledger":                        {4120, "the wire is known in one place; half of it is one codec, a writer and a distrustful reader of the same columns, which a package of its own would have to export all over again"},
	"pkg/quota":                         {4700, "one state machine: counting, deciding, leases, retired and open counters, corrections, snapshot and queries share a state without pointers; packages for them would export its innards to each other and to nobody else"},
	"services/aggregator":               {1850, "the owner of a shard is one loop over one state: it reads, folds, publishes, keeps and hands over; what is pure or only asks NATS has rooms of its own"},
	"services/internal/embedclickhouse": {2300, "installing, configuring and supervising one foreign process"},
	"services/internal/soak":            {1700, "one file a scenario; what they share has rooms of its own below"},
	"services/internal/simulation":      {2600, "one world: every part of it is written against all others, and nothing else may use them"},
	"services/internal/history":         {1800, "the only room that knows a driver: what is asked of one server goes over one client with one set of bounds"},
}

const maxLines = 1500

// pkgModules are what a program that imports pkg has to take with it,
// testModules come with pkg's tests only, indirectModules with either.
var (
	pkgModules = []string{
		"github.com/nats-io/nats.go", "github.com/prometheus/client_golang", "github.com/rs/zerolog",
		"github.com/segmentio/ksuid", "github.com/tollkeeper/tollkeeper/schemas", "google.golang.org/protobuf",
	}
	testModules     = []string{"github.com/google/go-cmp", "go.uber.org/goleak", "pgregory.net/rapid"}
	indirectModules = []string{
		"github.com/beorn7/perks", "github.com/cespare/xxhash/v2", "github.com/klauspost/compress", "github.com/kylelemons/godebug",
		"github.com/mattn/go-colorable", "github.com/mattn/go-isatty", "github.com/munnerz/goautoneg", "github.com/nats-io/nkeys",
		"github.com/nats-io/nuid", "github.com/prometheus/client_model", "github.com/prometheus/common", "github.com/prometheus/procfs",
		"github.com/santhosh-tekuri/jsonschema/v6", "go.yaml.in/yaml/v2", "golang.org/x/crypto", "golang.org/x/sys", "golang.org/x/text",
	}
)

var clickHouseDrivers = []string{"github.com/ClickHouse/clickhouse-go", "github.com/ClickHouse/ch-go"}

// within reports whether path is dir or in it.
func within(path string, dirs ...string) bool {
	return slices.ContainsFunc(dirs, func(dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") })
}

func standard(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return !strings.Contains(first, ".")
}

// forbidden returns why a file of package from (a folder of the repository)
// must not import a package (an import path); empty: it may.
func forbidden(from, imported string, test bool) string {
	if why := forbiddenOutside(from, imported, test); why != "" {
		return why
	}
	to, ours := strings.CutPrefix(imported, root)
	if !ours || within(to, from) && to == from {
		return ""
	}
	switch {
	case within(from, "schemas"):
		return unless(within(to, "schemas"), "schemas imports nobody")
	case within(from, "deploy"):
		return unless(within(to, "deploy", "schemas") || test && within(to, "pkg", "services/internal"), "tools know the schemas at most, their tests what is deployed")
	case within(from, "pkg/usage"):
		return "usage imports the standard library only"
	case within(from, core...):
		return unless(within(to, "pkg/usage") || within(to, core...), "the core imports usage only")
	case within(from, "pkg/ledger"):
		return unless(within(to, "pkg/ledger", "pkg/usage", "schemas"), "ledger imports usage and schemas")
	case within(from, "pkg/testclock"):
		return unless(within(to, "pkg/usage", "pkg/ledger", "schemas"), "testclock imports usage, ledger and schemas")
	case within(from, "pkg/gate"):
		return unless(within(to, "pkg/gate", "pkg/usage", "pkg/ledger", "schemas") || within(to, core...), "gate imports usage, core and ledger")
	case within(from, "pkg"):
		return "this package is in no row of the table of who may import whom: add it there"
	case within(from, "services/internal"):
		return unless(within(to, "pkg", "schemas", "services/internal"), "what services share knows no service")
	case within(from, "services"):
		own, _, _ := strings.Cut(strings.TrimPrefix(from, "services/"), "/")
		service, below, _ := strings.Cut(strings.TrimPrefix(to, "services/"), "/")
		switch {
		case within(to, "pkg", "schemas", "services/internal"), within(to, "services/"+own):
			return ""
		case own == "tollkeeper" && within(to, "services") && service != "" && below == "":
			return "" // it wires the services through their top packages
		}
		return "a service imports pkg, schemas, services/internal and its own"
	}
	return "this folder is in no row of the table of who may import whom: add it there"
}

func unless(ok bool, why string) string {
	if ok {
		return ""
	}
	return why
}

// forbiddenOutside is forbidden for what is not ours.
func forbiddenOutside(from, imported string, test bool) string {
	if within(imported, clickHouseDrivers...) || slices.ContainsFunc(clickHouseDrivers, func(d string) bool { return strings.HasPrefix(imported, d+"/") }) {
		return unless(test || within(from, "services/internal/history"), "only services/internal/history knows a ClickHouse driver")
	}
	if within(imported, strings.TrimSuffix(root, "/")) || standard(imported) {
		if within(from, core...) && !test && within(imported, "net", "os", "database/sql", "math/rand", "crypto/rand") {
			return "the core does no I/O and knows no chance"
		}
		return ""
	}
	switch {
	case within(from, "pkg/usage"):
		return unless(test && within(imported, testModules...), "usage imports the standard library only")
	case within(from, core...):
		return unless(within(imported, "github.com/segmentio/ksuid") || test && within(imported, testModules...), "the core imports usage only")
	case within(from, "pkg"):
		return unless(within(imported, pkgModules...) || test && within(imported, testModules...), "whoever imports pkg would have to take this module too")
	case within(from, "schemas"):
		return unless(within(imported, "google.golang.org/protobuf") || test, "schemas needs protobuf at most")
	}
	return ""
}

// badName returns why a package must not be called so.
func badName(name string) string {
	return unless(!slices.Contains([]string{"util", "utils", "common", "helper", "helpers", "misc", "shared", "lib", "base"}, strings.TrimSuffix(name, "_test")),
		"a package is named for what it does")
}

// tooLarge returns why a package must not have so many lines without tests.
func tooLarge(folder string, lines int) string {
	reason, listed := large[folder]
	switch {
	case lines > maxLines && !listed:
		return fmt.Sprintf("%d lines without tests, at most %d: divide it, or list it with a reason", lines, maxLines)
	case listed && lines > reason.lines:
		return fmt.Sprintf("%d lines without tests, at most %d although %s: divide it", lines, reason.lines, reason.why)
	case listed && lines <= maxLines:
		return fmt.Sprintf("%d lines without tests: it needs no reason for being large any more", lines)
	}
	return ""
}

// badText returns what a line of Go that is not a test must not say.
func badText(line string) string {
	line = strings.ReplaceAll(line, `placeholder:"`, "") // kong's tag for how a flag's value is shown
	for _, word := range strings.FieldsFunc(line, func(r rune) bool {
		return r != '_' && (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z')
	}) {
		switch {
		case word == "TODO", word == "FIXME", word == "XXX", word == "HACK":
			return "says " + word + ": do it, or write an issue"
		case strings.EqualFold(word, "placeholder"), strings.EqualFold(word, "placeholders"):
			return "says placeholder: make the real thing"
		}
	}
	for _, place := range machinePlaces {
		if strings.Contains(line, place) {
			return "names a place of one machine"
		}
	}
	return ""
}

// Written in two so that this file does not say them.
var machinePlaces = []string{"/work" + "/main", "/work" + "/shared", "/root" + "/", "/tmp" + "/tk"}

// badRequirement returns why pkg/go.mod must not require a module.
func badRequirement(module string) string {
	return unless(slices.Contains(pkgModules, module) || slices.Contains(testModules, module) || slices.Contains(indirectModules, module),
		"a gateway that imports pkg would have it in its module graph: do without, or add it to the list with the others' consent")
}
