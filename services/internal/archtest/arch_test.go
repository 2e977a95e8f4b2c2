package archtest

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// source is a Go file of the repository.
type source struct {
	folder, path string // from the repository's root, with slashes
	pkg          string
	test         bool
	generated    bool
	imports      []string
	text         []byte
}

// repository finds the root: the folder with go.work above this one.
func repository(t *testing.T) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.work")); err == nil {
			return dir
		}
		if dir == filepath.Dir(dir) {
			t.Fatal("there is no go.work above this folder")
		}
		dir = filepath.Dir(dir)
	}
}

// sources parses every Go file, whatever system it is built for.
func sources(t *testing.T, dir string) []source {
	t.Helper()
	var all []source
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() && path != dir && (strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") || name == "testdata" || name == "node_modules" || name == "vendor") {
			return filepath.SkipDir
		}
		if d.IsDir() || filepath.Ext(name) != ".go" {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, text, parser.ImportsOnly|parser.ParseComments)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		s := source{
			folder: filepath.ToSlash(filepath.Dir(rel)), path: filepath.ToSlash(rel), pkg: f.Name.Name,
			test: strings.HasSuffix(name, "_test.go"), generated: ast.IsGenerated(f), text: text,
		}
		for _, i := range f.Imports {
			imported, err := strconv.Unquote(i.Path.Value)
			if err != nil {
				return err
			}
			s.imports = append(s.imports, imported)
		}
		all = append(all, s)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 50 {
		t.Fatalf("only %d Go files were found in %s: the rules would hold of nothing", len(all), dir)
	}
	return all
}

func TestEveryPackageImportsOnlyWhatItMay(t *testing.T) {
	t.Parallel()
	for _, s := range sources(t, repository(t)) {
		for _, i := range s.imports {
			if why := forbidden(s.folder, i, s.test); why != "" {
				t.Errorf("%s imports %s: %s", s.path, i, why)
			}
		}
	}
}

func TestPackagesAreNamedForWhatTheyDoAndStaySmall(t *testing.T) {
	t.Parallel()
	lines := map[string]int{}
	for _, s := range sources(t, repository(t)) {
		for _, name := range []string{s.pkg, filepath.Base(s.folder)} {
			if why := badName(name); why != "" {
				t.Errorf("%s: package %s: %s", s.path, name, why)
			}
		}
		if !s.test && !s.generated {
			lines[s.folder] += bytes.Count(s.text, []byte("\n"))
		}
	}
	for folder := range large {
		lines[folder] += 0
	}
	for folder, n := range lines {
		if why := tooLarge(folder, n); why != "" {
			t.Errorf("%s has %s", folder, why)
		}
	}
}

func TestNoFilePromisesWhatItDoesNotDo(t *testing.T) {
	t.Parallel()
	for _, s := range sources(t, repository(t)) {
		if s.test || s.generated {
			continue
		}
		for i, line := range strings.Split(string(s.text), "\n") {
			if why := badText(line); why != "" {
				t.Errorf("%s:%d %s", s.path, i+1, why)
			}
		}
	}
}

// requirements reads the modules of a go.mod's require lines.
func requirements(text string) []string {
	var all []string
	block := false
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(strings.TrimSpace(line), "//")
		fields := strings.Fields(line)
		switch {
		case len(fields) == 2 && fields[0] == "require" && fields[1] == "(":
			block = true
		case len(fields) == 1 && fields[0] == ")":
			block = false
		case block && len(fields) == 2:
			all = append(all, fields[0])
		case len(fields) == 3 && fields[0] == "require":
			all = append(all, fields[1])
		}
	}
	return all
}

func TestPkgStaysLight(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(filepath.Join(repository(t), "pkg", "go.mod"))
	if err != nil {
		t.Fatal(err)
	}
	required := requirements(string(text))
	if !slices.Contains(required, "github.com/nats-io/nats.go") {
		t.Fatalf("pkg/go.mod requires %v: it was not understood", required)
	}
	for _, module := range required {
		if why := badRequirement(module); why != "" {
			t.Errorf("pkg/go.mod requires %s: %s", module, why)
		}
	}
}

// The modules are imported from outside of this workspace too.
func TestModulesBuildWithoutTheWorkspace(t *testing.T) {
	t.Parallel()
	dir := repository(t)
	for _, module := range []string{"schemas", "pkg", "services"} {
		cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-f", "{{.ImportPath}}", "./...")
		cmd.Dir = filepath.Join(dir, module)
		cmd.Env = append(os.Environ(), "GOWORK=off", "GOFLAGS=-mod=readonly")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("GOWORK=off go list in %s: %v\n%s", module, err, out)
			continue
		}
		if module == "pkg" {
			for _, dep := range []string{"github.com/nats-io/nats-server", "github.com/alecthomas/kong", "github.com/ClickHouse"} {
				if bytes.Contains(out, []byte(dep)) {
					t.Errorf("pkg is built with %s", dep)
				}
			}
		}
	}
}

// The rules on imports that do not exist: a rule that nothing can break is none.
func TestTheRulesAreBrokenByWhatBreaksThem(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		from, imported string
		test           bool
		allowed        bool
	}{
		{"schemas", "embed", false, true},
		{"schemas/gen/tollkeeperv1", "google.golang.org/protobuf/proto", false, true},
		{"schemas", root + "pkg/usage", false, false},
		{"schemas", "github.com/nats-io/nats.go", false, false},
		{"pkg/usage", "strings", false, true},
		{"pkg/usage", root + "pkg/window", false, false},
		{"pkg/usage", "github.com/segmentio/ksuid", false, false},
		{"pkg/usage", "pgregory.net/rapid", true, true},
		{"pkg/usage", "pgregory.net/rapid", false, false},
		{"pkg/quota", root + "pkg/usage", false, true},
		{"pkg/quota", root + "pkg/dedup", false, true},
		{"pkg/quota", root + "pkg/ledger", false, false},
		{"pkg/quota", root + "schemas/gen/tollkeeperv1", false, false},
		{"pkg/quota", "net/http", false, false},
		{"pkg/quota", "os", false, false},
		{"pkg/quota", "os", true, true},
		{"pkg/quota", "github.com/nats-io/nats.go", false, false},
		{"pkg/ledger", root + "schemas", false, true},
		{"pkg/ledger", root + "pkg/quota", false, false},
		{"pkg/ledger", root + "pkg/gate", false, false},
		{"pkg/ledger", "github.com/nats-io/nats.go/jetstream", false, true},
		{"pkg/ledger", "github.com/nats-io/nats-server/v2/server", true, false},
		{"pkg/gate/outbox", root + "pkg/ledger", false, true},
		{"pkg/gate/outbox", root + "pkg/gate/outbox/internal/spool", false, true},
		{"pkg/gate", root + "services/internal/run", false, false},
		{"pkg/gate", "github.com/alecthomas/kong", false, false},
		{"pkg/new", root + "pkg/usage", false, false},
		{"services/gateway", root + "pkg/gate", false, true},
		{"services/gateway", root + "services/internal/run", false, true},
		{"services/gateway", root + "services/gateway/internal/routes", false, true},
		{"services/gateway/cmd/gateway", root + "services/gateway", false, true},
		{"services/gateway", root + "services/aggregator", false, false},
		{"services/gateway", root + "services/gatewayx", false, false},
		{"services/gateway", root + "services/aggregator", true, false},
		{"services/gateway", root + "services/tollkeeper", false, false},
		{"services/tollkeeper", root + "services/aggregator", false, true},
		{"services/tollkeeper/cmd/tollkeeper", root + "services/aggregator", false, true},
		{"services/tollkeeper", root + "services/aggregator/internal/owner", false, false},
		{"services/internal/run", root + "services/gateway", false, false},
		{"services/internal/run", root + "services/internal/telemetry", false, true},
		{"services/internal/history", "github.com/ClickHouse/clickhouse-go/v2", false, true},
		{"services/internal/history/columns", "github.com/ClickHouse/ch-go/proto", false, true},
		{"services/internal/historyx", "github.com/ClickHouse/ch-go/proto", false, false},
		{"services/historian", "github.com/ClickHouse/clickhouse-go/v2", false, false},
		{"services/historian", "github.com/ClickHouse/clickhouse-go/v2", true, true},
		{"services/console", "github.com/ClickHouse/ch-go", false, false},
		{"deploy/tools/protogen", root + "services/internal/run", false, false},
		{"elsewhere", root + "pkg/usage", false, false},
	} {
		if why := forbidden(c.from, c.imported, c.test); (why == "") != c.allowed {
			t.Errorf("%s imports %s (test: %v): got %q, allowed should be %v", c.from, c.imported, c.test, why, c.allowed)
		}
	}
	for name, want := range map[string]bool{"util": false, "common": false, "helpers": false, "common_test": false, "ledger": true, "telemetry": true} {
		if (badName(name) == "") != want {
			t.Errorf("a package named %s: allowed should be %v", name, want)
		}
	}
	for line, want := range map[string]bool{
		"// TODO: later": false, "// FIXME": false, "return nil // placeholder": false, "Placeholder: true,": false,
		"Plan string `placeholder:\"NAME\"`": true, `dir := "/work` + `/main"`: false, "// what is still to do": true, "todos := 1": true, "x.TODOS()": true,
	} {
		if (badText(line) == "") != want {
			t.Errorf("%q: allowed should be %v", line, want)
		}
	}
	for _, c := range []struct {
		folder string
		lines  int
		ok     bool
	}{{"pkg/window", maxLines, true}, {"pkg/window", maxLines + 1, false}, {"pkg/ledger", maxLines + 1, true}, {"pkg/ledger", 10, false}, {"pkg/ledger", 100_000, false}} {
		if (tooLarge(c.folder, c.lines) == "") != c.ok {
			t.Errorf("%s with %d lines: allowed should be %v", c.folder, c.lines, c.ok)
		}
	}
	got := requirements("module x\n\ngo 1.26\n\nrequire a.b/c v1.0.0 // indirect\nrequire (\n\td.e/f v2.0.0\n\tg.h/i v3.0.0 // indirect\n)\nreplace a.b/c => ../c\n")
	if fmt.Sprint(got) != "[a.b/c d.e/f g.h/i]" {
		t.Errorf("requirements: %v", got)
	}
	for module, want := range map[string]bool{
		"github.com/nats-io/nats.go": true, "github.com/nats-io/nats-server/v2": false, "github.com/alecthomas/kong": false,
		"github.com/go-task/task/v3": false, "github.com/ClickHouse/ch-go": false,
	} {
		if (badRequirement(module) == "") != want {
			t.Errorf("a requirement of %s: allowed should be %v", module, want)
		}
	}
}
