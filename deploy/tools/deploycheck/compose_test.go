package deploycheck

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/dotenv"
	"github.com/compose-spec/compose-go/v2/types"
	"github.com/sirupsen/logrus"
)

// root is the repository's, seen from this package.
const root = "../../.."

func read(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// environment is what deploy/tools/dotenv makes of deploy/.env.example, made once.
var environment = sync.OnceValues(func() (types.Mapping, error) {
	cmd := exec.Command("go", "run", "../dotenv", "-example", filepath.Join(root, "deploy/.env.example"))
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("dotenv: %w: %s", err, errs.String())
	}
	return dotenv.Parse(&out)
})

func env(t testing.TB) types.Mapping {
	t.Helper()
	m, err := environment()
	if err != nil {
		t.Fatal(err)
	}
	return maps.Clone(m)
}

// load reads the compose file as compose does, with the given environment and
// nothing of ours.
func load(m types.Mapping) (*types.Project, error) {
	pairs := make([]string, 0, len(m))
	for k, v := range m {
		pairs = append(pairs, k+"="+v)
	}
	o, err := cli.NewProjectOptions([]string{filepath.Join(root, "deploy/compose.yaml")}, cli.WithEnv(pairs))
	if err != nil {
		return nil, err
	}
	return o.LoadProject(context.Background())
}

var loaded = sync.OnceValues(func() (*types.Project, error) {
	m, err := environment()
	if err != nil {
		return nil, err
	}
	return load(m)
})

// project is what all tests share; none changes it.
func project(t testing.TB) *types.Project {
	t.Helper()
	p, err := loaded()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestComposeLoadsWithTheGeneratedEnvironment(t *testing.T) {
	t.Parallel()
	p := project(t)
	want := []string{
		"aggregator", "alerter", "alertmanager", "auditor", "clickhouse", "console", "gateway-1", "gateway-2", "grafana", "historian",
		"nats-1", "nats-1-exporter", "nats-2", "nats-2-exporter", "nats-3", "nats-3-exporter", "prometheus",
	}
	if got := p.ServiceNames(); !slices.Equal(got, want) {
		t.Errorf("services are %v, want %v", got, want)
	}
}

func TestNoSecretHasADefault(t *testing.T) {
	t.Parallel()
	for name := range env(t) {
		if !secretName.MatchString(name) {
			continue
		}
		without := env(t)
		delete(without, name)
		if _, err := load(without); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("compose starts without %s (error: %v)", name, err)
		}
	}
}

var secretName = regexp.MustCompile(`_(PASSWORD|TOKEN|BCRYPT)$`)

var variable = regexp.MustCompile(`\$\{([A-Z0-9_]+)(:[-?][^}]*)?\}`)

func TestEveryVariableIsDocumentedAndEveryDocumentedOneIsUsed(t *testing.T) {
	t.Parallel()
	documented := env(t)
	used := map[string]bool{}
	for _, line := range strings.Split(string(read(t, "deploy/compose.yaml")), "\n") {
		if strings.HasPrefix(strings.TrimSpace(line), "#") {
			continue
		}
		for _, m := range variable.FindAllStringSubmatch(line, -1) {
			used[m[1]] = true
			if _, ok := documented[m[1]]; !ok {
				t.Errorf("${%s} stands in compose.yaml and not in .env.example", m[1])
			}
		}
	}
	for _, s := range project(t).Secrets {
		used[s.Environment] = true
	}
	for name := range documented {
		if !used[name] {
			t.Errorf("%s stands in .env.example and nothing uses it", name)
		}
	}
}

func TestDefaultsInComposeAreThoseOfTheExample(t *testing.T) {
	t.Parallel()
	documented := env(t)
	for _, m := range regexp.MustCompile(`\$\{([A-Z0-9_]+):-([^}]*)\}`).FindAllStringSubmatch(string(read(t, "deploy/compose.yaml")), -1) {
		if documented[m[1]] != m[2] {
			t.Errorf("%s is %q in compose.yaml and %q in .env.example", m[1], m[2], documented[m[1]])
		}
	}
}

func TestEverythingIsPublishedOnLoopbackOnly(t *testing.T) {
	t.Parallel()
	taken := map[string]string{}
	for name, s := range project(t).Services {
		if s.NetworkMode == "host" {
			t.Errorf("%s is in the host's network", name)
		}
		for _, p := range s.Ports {
			if p.HostIP != "127.0.0.1" {
				t.Errorf("%s publishes %d on %q", name, p.Target, p.HostIP)
			}
			if other, ok := taken[p.Published]; ok {
				t.Errorf("%s and %s both publish port %s", name, other, p.Published)
			}
			taken[p.Published] = name
		}
	}
}

func TestEveryServiceIsBoundedRestartedAndWatched(t *testing.T) {
	t.Parallel()
	for name, s := range project(t).Services {
		if s.Restart != "unless-stopped" {
			t.Errorf("%s: restart is %q", name, s.Restart)
		}
		if s.Deploy == nil || s.Deploy.Resources.Limits == nil || s.Deploy.Resources.Limits.MemoryBytes == 0 || s.Deploy.Resources.Limits.NanoCPUs == 0 || s.Deploy.Resources.Limits.Pids == 0 {
			t.Errorf("%s has no bounds of memory, CPU and processes", name)
		}
		if s.Logging == nil || s.Logging.Options["max-size"] == "" {
			t.Errorf("%s: its log grows for ever", name)
		}
		if s.HealthCheck == nil && !strings.HasSuffix(name, "-exporter") {
			t.Errorf("%s has no health check", name)
		}
		if strings.HasSuffix(s.Image, ":latest") || !strings.Contains(s.Image, ":") {
			t.Errorf("%s: image %s is not pinned to a version", name, s.Image)
		}
		if s.Privileged || len(s.CapAdd) > 0 {
			t.Errorf("%s has more rights than it needs", name)
		}
	}
}

func TestEveryMountedFileExists(t *testing.T) {
	t.Parallel()
	for name, s := range project(t).Services {
		for _, v := range s.Volumes {
			if v.Type != types.VolumeTypeBind {
				continue
			}
			if _, err := os.Stat(v.Source); err != nil {
				t.Errorf("%s mounts %s: %v", name, v.Source, err)
			}
			if !v.ReadOnly {
				t.Errorf("%s can write to %s", name, v.Source)
			}
		}
		for _, f := range s.EnvFiles {
			t.Errorf("%s reads the whole of %s: name what it needs", name, f.Path)
		}
	}
}

func TestASpoolBelongsToOneGateway(t *testing.T) {
	t.Parallel()
	owner := map[string]string{}
	for name, s := range project(t).Services {
		for _, v := range s.Volumes {
			if v.Type != types.VolumeTypeVolume {
				continue
			}
			if other, ok := owner[v.Source]; ok {
				t.Errorf("%s and %s share volume %s", name, other, v.Source)
			}
			owner[v.Source] = name
			if dir := s.Environment["TOLLKEEPER_SPOOL_DIR"]; dir != nil && *dir != v.Target {
				t.Errorf("%s spools to %s, its volume is at %s", name, *dir, v.Target)
			}
		}
	}
	for _, name := range []string{"gateway-1", "gateway-2"} {
		if !slices.Contains(slices.Collect(maps.Values(owner)), name) {
			t.Errorf("%s has no volume for its spool", name)
		}
	}
}

// binaries are our programs, built once for all tests into a folder that TestMain
// removes.
var binaries = sync.OnceValues(func() (string, error) {
	build := exec.Command("go", "build", "-o", binDir+"/")
	for _, name := range []string{"gateway", "aggregator", "historian", "alerter", "auditor", "console"} {
		build.Args = append(build.Args, "./"+name+"/cmd/"+name)
	}
	build.Dir = filepath.Join(root, "services")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the programs: %w: %s", err, out)
	}
	return binDir, nil
})

var binDir string

func TestMain(m *testing.M) {
	var err error
	if binDir, err = os.MkdirTemp("", "deploycheck-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	// compose-go warns of the variables that a test leaves out on purpose.
	logrus.SetOutput(io.Discard)
	code := m.Run()
	_ = os.RemoveAll(binDir) // what is left lies among the system's temporary files
	os.Exit(code)
}

func binary(t *testing.T, program string) string {
	t.Helper()
	dir, err := binaries()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, program)
}

func help(t *testing.T, program string) string {
	t.Helper()
	out, err := exec.Command(binary(t, program), "--help").CombinedOutput()
	if err != nil {
		t.Fatalf("%s --help: %v\n%s", program, err, out)
	}
	return string(out)
}

func TestServicesKnowWhatTheyAreTold(t *testing.T) {
	t.Parallel()
	for name, s := range project(t).Services {
		if len(s.Entrypoint) == 0 || !strings.HasPrefix(s.Entrypoint[0], "/usr/local/bin/") {
			continue
		}
		program := filepath.Base(s.Entrypoint[0])
		text := help(t, program)
		for variable := range s.Environment {
			if strings.HasPrefix(variable, "TOLLKEEPER_") && !regexp.MustCompile(`\$`+variable+`\b`).MatchString(text) {
				t.Errorf("%s: %s does not know %s", name, program, variable)
			}
		}
		for _, arg := range append(slices.Clone(s.Entrypoint[1:]), s.Command...) {
			flag, _, _ := strings.Cut(arg, "=")
			if strings.HasPrefix(flag, "-") && !strings.Contains(text, flag) {
				t.Errorf("%s: %s does not know %s", name, program, flag)
			}
		}
	}
}

func TestWhatListensForOthersAsksForCredentials(t *testing.T) {
	t.Parallel()
	token := regexp.MustCompile(`^TOLLKEEPER_.*TOKEN(_FILE)?$`)
	for name, s := range project(t).Services {
		if len(s.Entrypoint) == 0 || !strings.HasPrefix(s.Entrypoint[0], "/usr/local/bin/") {
			continue
		}
		asks := false
		for variable, value := range s.Environment {
			if !token.MatchString(variable) || value == nil || *value == "" {
				continue
			}
			asks = true
			if file, ok := strings.CutPrefix(*value, "/run/secrets/"); ok && !slices.ContainsFunc(s.Secrets, func(c types.ServiceSecretConfig) bool { return c.Source == file }) {
				t.Errorf("%s reads secret %s and is not given it", name, file)
			}
		}
		if !asks {
			t.Errorf("%s has no token, and would refuse to listen where others reach it", name)
		}
		value := func(name string) string {
			if v := s.Environment[name]; v != nil {
				return *v
			}
			return ""
		}
		if url := value("TOLLKEEPER_NATS_URL"); url != "nats://nats-1:4222,nats://nats-2:4222,nats://nats-3:4222" {
			t.Errorf("%s does not know all three nodes: %s", name, url)
		}
		user := program(s)
		if value("TOLLKEEPER_NATS_USER") != user || value("TOLLKEEPER_NATS_PASSWORD") != env(t)["NATS_"+strings.ToUpper(user)+"_PASSWORD"] {
			t.Errorf("%s connects to NATS as another user than %s", name, user)
		}
	}
}

type composeSecret = types.ServiceSecretConfig

func program(s types.ServiceConfig) string { return filepath.Base(s.Entrypoint[0]) }
