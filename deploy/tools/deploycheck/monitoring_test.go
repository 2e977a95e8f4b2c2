package deploycheck

import (
	"bytes"
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// tool runs a program of Debian's packages; without it the check is not made,
// loudly, and never silently in CI.
func tool(t *testing.T, dir, name string, args ...string) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed: packages prometheus and prometheus-alertmanager", name)
		}
		t.Skipf("NOT CHECKED: %s is not installed (packages prometheus and prometheus-alertmanager)", name)
	}
	cmd := exec.Command(path, args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

func TestPrometheusRulesPassPromtool(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(root, "dashboards/prometheus")
	tool(t, dir, "promtool", "check", "rules", "tollkeeper.rules.yml")
	tool(t, dir, "promtool", "test", "rules", "tollkeeper.test.yml")
}

func TestPrometheusConfigurationPassesPromtool(t *testing.T) {
	t.Parallel()
	// As in the container: the rules beside it, and the secrets as files.
	dir := t.TempDir()
	text := string(read(t, "deploy/prometheus/prometheus.yml"))
	for _, secret := range regexp.MustCompile(`/run/secrets/\w+`).FindAllString(text, -1) {
		name := filepath.Base(secret)
		if !slices.ContainsFunc(project(t).Services["prometheus"].Secrets, func(s composeSecret) bool { return s.Source == name }) {
			t.Errorf("prometheus.yml reads %s, which compose.yaml does not give it", secret)
		}
		write(t, filepath.Join(dir, name), "secret")
	}
	write(t, filepath.Join(dir, "prometheus.yml"), strings.ReplaceAll(text, "/run/secrets/", ""))
	write(t, filepath.Join(dir, "rules/tollkeeper.rules.yml"), string(read(t, "dashboards/prometheus/tollkeeper.rules.yml")))
	tool(t, dir, "promtool", "check", "config", "prometheus.yml")
	for _, name := range []string{"prometheus_web", "alertmanager_web"} {
		write(t, filepath.Join(dir, name+".yml"), project(t).Configs[name].Content)
		tool(t, dir, "promtool", "check", "web-config", name+".yml")
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestEverythingScrapedIsInCompose(t *testing.T) {
	t.Parallel()
	var c struct {
		Scrapes []struct {
			Job    string `yaml:"job_name"`
			Static []struct {
				Targets []string `yaml:"targets"`
			} `yaml:"static_configs"`
			Authorization any `yaml:"authorization"`
			BasicAuth     any `yaml:"basic_auth"`
		} `yaml:"scrape_configs"`
	}
	if err := yaml.Unmarshal(read(t, "deploy/prometheus/prometheus.yml"), &c); err != nil {
		t.Fatal(err)
	}
	p := project(t)
	scraped := map[string]bool{}
	for _, s := range c.Scrapes {
		if s.Authorization == nil && s.BasicAuth == nil {
			t.Errorf("job %s shows no credentials", s.Job)
		}
		for _, target := range s.Static[0].Targets {
			host, port, _ := strings.Cut(target, ":")
			scraped[host] = true
			service, ok := p.Services[host]
			if !ok && host != "127.0.0.1" {
				t.Errorf("job %s: %s is not a service of compose.yaml", s.Job, host)
			}
			listens := ""
			for name, value := range service.Environment {
				if value != nil && strings.HasSuffix(name, "LISTEN") {
					listens += " " + *value
				}
			}
			if listens != "" && !strings.Contains(listens, ":"+port) {
				t.Errorf("job %s: %s listens on%s", s.Job, target, listens)
			}
		}
	}
	for name, s := range p.Services {
		if len(s.Entrypoint) > 0 && strings.HasPrefix(s.Entrypoint[0], "/usr/local/bin/") && !scraped[name] {
			t.Errorf("nobody looks at the metrics of %s", name)
		}
	}
}

func TestAlertmanagerConfigurationPassesAmtool(t *testing.T) {
	t.Parallel()
	tool(t, root, "amtool", "check-config", "deploy/alertmanager/alertmanager.yml")
}

type alertRules struct {
	Groups []struct {
		Rules []struct {
			Record, Alert, Expr string
			Labels, Annotations map[string]string
		}
	}
}

func rules(t *testing.T) (r alertRules) {
	t.Helper()
	if err := yaml.Unmarshal(read(t, "dashboards/prometheus/tollkeeper.rules.yml"), &r); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestEveryAlertHasARunbookATestAndAReceiver(t *testing.T) {
	t.Parallel()
	const base = "https://github.com/tollkeeper/tollkeeper/blob/main/"
	tests := string(read(t, "dashboards/prometheus/tollkeeper.test.yml"))
	routes := string(read(t, "deploy/alertmanager/alertmanager.yml"))
	known := map[string]bool{}
	for _, g := range rules(t).Groups {
		for _, r := range g.Rules {
			if r.Alert == "" {
				continue
			}
			known[r.Alert] = true
			if want := base + "dashboards/runbooks/" + r.Alert + ".md"; r.Annotations["runbook_url"] != want {
				t.Errorf("%s links %q, want %q", r.Alert, r.Annotations["runbook_url"], want)
			}
			if text := string(read(t, "dashboards/runbooks/"+r.Alert+".md")); !strings.HasPrefix(text, "# "+r.Alert+"\n") || !strings.Contains(text, "\n## Do\n") {
				t.Errorf("the runbook of %s has not its title, or says not what to do", r.Alert)
			}
			if !regexp.MustCompile(`alertname(=|=~)"[^"]*\b` + r.Alert + `\b`).MatchString(tests) {
				t.Errorf("%s has no test", r.Alert)
			}
			if s := r.Labels["severity"]; s != "page" && s != "ticket" && r.Alert != "TollkeeperDeadMan" {
				t.Errorf("%s has severity %q, which goes nowhere", r.Alert, s)
			}
		}
	}
	for _, text := range []string{tests, routes} {
		for _, name := range regexp.MustCompile(`\bTollkeeper[A-Z]\w+`).FindAllString(text, -1) {
			if !known[name] {
				t.Errorf("%s stands in tests or routes, and there is no such alert", name)
			}
		}
	}
	books, err := os.ReadDir(filepath.Join(root, "dashboards/runbooks"))
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range books {
		if name := strings.TrimSuffix(b.Name(), ".md"); !known[name] {
			t.Errorf("runbook %s is of no alert", b.Name())
		}
	}
	for name, s := range project(t).Services {
		if url := s.Environment["TOLLKEEPER_RUNBOOK_URL"]; url != nil {
			read(t, strings.TrimPrefix(*url, base))
			if !strings.HasPrefix(*url, base) {
				t.Errorf("%s links runbook %s", name, *url)
			}
		}
	}
}

var (
	fullName = regexp.MustCompile(`^tollkeeper_[a-z0-9_]*[a-z0-9]$`)
	prefix   = regexp.MustCompile(`^tollkeeper_[a-z0-9_]*_$`)
	fragment = regexp.MustCompile(`^[a-z][a-z0-9_]*$`)
)

// metrics returns the names of metrics in the Go sources: literals, and those
// that a package makes of a prefix and another literal.
func metrics(t *testing.T) map[string]bool {
	t.Helper()
	known := map[string]bool{}
	type literals struct{ prefixes, fragments []string }
	packages := map[string]*literals{}
	for _, dir := range []string{"pkg", "services"} {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				if os.IsNotExist(err) {
					return nil // somebody's temporary file
				}
				return err
			}
			if d.IsDir() && (d.Name() == "node_modules" || d.Name() == "testdata") {
				return filepath.SkipDir
			}
			if d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return nil
			}
			file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
			if err != nil {
				return err
			}
			p := packages[filepath.Dir(path)]
			if p == nil {
				p = &literals{}
				packages[filepath.Dir(path)] = p
			}
			ast.Inspect(file, func(n ast.Node) bool {
				lit, ok := n.(*ast.BasicLit)
				if !ok || lit.Kind != token.STRING {
					return true
				}
				switch s, err := strconv.Unquote(lit.Value); {
				case err != nil:
				case fullName.MatchString(s):
					known[s] = true
				case prefix.MatchString(s):
					p.prefixes = append(p.prefixes, s)
				case fragment.MatchString(s):
					p.fragments = append(p.fragments, s)
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range packages {
		for _, a := range p.prefixes {
			for _, b := range p.fragments {
				known[a+b] = true
			}
		}
	}
	return known
}

// exporter are the metrics of prometheus-nats-exporter 0.20.1 that are used here,
// looked up in its sources (varz are the fields of nats-server's /varz).
var exporter = []string{
	"gnatsd_varz_in_msgs", "gnatsd_varz_out_msgs", "gnatsd_varz_connections", "gnatsd_varz_slow_consumers",
	"jetstream_stream_total_bytes", "jetstream_stream_limit_bytes",
}

var metricName = regexp.MustCompile(`\b(?:tollkeeper|gnatsd|jetstream)[_:][a-zA-Z0-9_:]+`)

func checkMetrics(t *testing.T, known map[string]bool, where, expr string) {
	t.Helper()
	names := metricName.FindAllString(expr, -1)
	if len(names) == 0 && !strings.Contains(expr, "up{") && !strings.Contains(expr, "vector(1)") {
		t.Errorf("%s asks for nothing of ours: %s", where, expr)
	}
	for _, name := range names {
		base := name
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			if cut, ok := strings.CutSuffix(name, suffix); ok && known[cut] {
				base = cut
			}
		}
		if !known[base] {
			t.Errorf("%s: there is no metric %s", where, name)
		}
	}
}

func knownMetrics(t *testing.T) map[string]bool {
	t.Helper()
	known := metrics(t)
	for _, name := range exporter {
		known[name] = true
	}
	for _, g := range rules(t).Groups {
		for _, r := range g.Rules {
			if r.Record != "" {
				known[r.Record] = true
			}
		}
	}
	return known
}

func TestRulesAndTheirTestsUseMetricsThatExist(t *testing.T) {
	t.Parallel()
	known := knownMetrics(t)
	for _, g := range rules(t).Groups {
		for _, r := range g.Rules {
			checkMetrics(t, known, r.Alert+r.Record, r.Expr)
		}
	}
	for line := range bytes.Lines(read(t, "dashboards/prometheus/tollkeeper.test.yml")) {
		if bytes.Contains(line, []byte("{series:")) {
			if text := string(line); !strings.Contains(text, "'up{") {
				checkMetrics(t, known, "tollkeeper.test.yml", text)
			}
		}
	}
	entries, err := os.ReadDir(filepath.Join(root, "dashboards/runbooks"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		for _, name := range metricName.FindAllString(string(read(t, "dashboards/runbooks/"+e.Name())), -1) {
			checkMetrics(t, known, e.Name(), name)
		}
	}
}

// A runbook that sends somebody to a setting, a path or a view that is not there costs
// the time that it was written to save.
func TestRunbooksNameSettingsPathsAndViewsThatExist(t *testing.T) {
	t.Parallel()
	settings := map[string]bool{}
	err := filepath.WalkDir(filepath.Join(root, "services"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".go" {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, m := range regexp.MustCompile(`env:"(TOLLKEEPER_[A-Z_]+)`).FindAllSubmatch(text, -1) {
			settings[string(m[1])] = true
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(settings) < 20 {
		t.Fatalf("only %d settings were found", len(settings))
	}
	paths, views := string(read(t, "schemas/openapi.yaml")), migrations(t)
	entries, err := os.ReadDir(filepath.Join(root, "dashboards/runbooks"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		text := string(read(t, "dashboards/runbooks/"+e.Name()))
		for _, name := range regexp.MustCompile(`TOLLKEEPER_[A-Z_]+`).FindAllString(text, -1) {
			if !settings[name] {
				t.Errorf("%s: no program has the setting %s", e.Name(), name)
			}
		}
		for _, path := range regexp.MustCompile(`/v1/[a-z0-9/_-]+`).FindAllString(text, -1) {
			if !strings.Contains(paths, "  "+path+":") {
				t.Errorf("%s: openapi.yaml has no path %s", e.Name(), path)
			}
		}
		for _, view := range regexp.MustCompile(`\bv_[a-z_]+`).FindAllString(text, -1) {
			if !strings.Contains(views, "CREATE VIEW IF NOT EXISTS "+view+"\n") && !strings.Contains(views, "CREATE VIEW IF NOT EXISTS "+view+" ") {
				t.Errorf("%s: there is no view %s", e.Name(), view)
			}
		}
	}
}

type dashboard struct {
	UID, Title string
	Templating struct {
		List []struct {
			Name, Query string
			Datasource  source
		}
	}
	Links  []struct{ URL string }
	Panels []struct {
		ID         int
		Title      string
		Type       string
		Datasource source
		GridPos    struct{ X, Y, W, H int }
		Targets    []struct {
			RefID        string
			Datasource   source
			Expr, RawSQL string
		}
	}
}

type source struct{ Type, UID string }

func dashboards(t *testing.T) []dashboard {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root, "dashboards/grafana/*.json"))
	if err != nil || len(files) < 2 {
		t.Fatalf("%d dashboards (%v)", len(files), err)
	}
	var all []dashboard
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		var d dashboard
		if err := json.Unmarshal(data, &d); err != nil {
			t.Fatalf("%s: %v", filepath.Base(f), err)
		}
		all = append(all, d)
	}
	return all
}

func TestDashboardsAskOnlyForWhatExists(t *testing.T) {
	t.Parallel()
	known := knownMetrics(t)
	views := map[string]bool{}
	for _, m := range regexp.MustCompile(`CREATE VIEW IF NOT EXISTS (\w+)`).FindAllStringSubmatch(migrations(t), -1) {
		views[m[1]] = true
	}
	sources := provisioned(t)
	from := regexp.MustCompile(`(?i)\b(?:FROM|JOIN)\s+(\S+)`)
	checkSQL := func(where, sql string) {
		found := from.FindAllStringSubmatch(sql, -1)
		if len(found) == 0 {
			t.Errorf("%s reads nothing", where)
		}
		for _, m := range found {
			if !strings.HasPrefix(m[1], "v_") || !views[m[1]] {
				t.Errorf("%s reads %s, which is no view of schemas/clickhouse", where, m[1])
			}
		}
		if !strings.Contains(sql, "$__timeFilter(") {
			t.Errorf("%s reads all time there is", where)
		}
	}
	uids := map[string]bool{}
	for _, d := range dashboards(t) {
		uids[d.UID] = true
	}
	for _, d := range dashboards(t) {
		ids := map[int]bool{}
		for _, p := range d.Panels {
			where := d.Title + ", " + p.Title
			if ids[p.ID] || p.ID == 0 {
				t.Errorf("%s: panel id %d is taken", where, p.ID)
			}
			ids[p.ID] = true
			if p.GridPos.X+p.GridPos.W > 24 || p.GridPos.W == 0 || p.GridPos.H == 0 {
				t.Errorf("%s does not fit the grid", where)
			}
			if p.Type == "row" {
				continue
			}
			if len(p.Targets) == 0 {
				t.Errorf("%s asks nothing", where)
			}
			for _, q := range p.Targets {
				if sources[q.Datasource.UID] != q.Datasource.Type || q.Datasource != p.Datasource {
					t.Errorf("%s: data source %v is not provisioned", where, q.Datasource)
				}
				switch q.Datasource.Type {
				case "prometheus":
					checkMetrics(t, known, where, q.Expr)
				default:
					checkSQL(where, q.RawSQL)
				}
			}
		}
		for _, v := range d.Templating.List {
			checkSQL(d.Title+", variable "+v.Name, v.Query)
		}
		for _, l := range d.Links {
			if !uids[strings.TrimPrefix(l.URL, "/d/")] {
				t.Errorf("%s links %s", d.Title, l.URL)
			}
		}
	}
}

func migrations(t *testing.T) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root, "schemas/clickhouse/*.sql"))
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(data)
	}
	return all.String()
}

// provisioned returns the types of Grafana's data sources by uid, and checks that
// their secrets come from variables that the container has.
func provisioned(t *testing.T) map[string]string {
	t.Helper()
	data := read(t, "deploy/grafana/provisioning/datasources/tollkeeper.yaml")
	var c struct {
		Datasources []struct{ UID, Type string }
	}
	if err := yaml.Unmarshal(data, &c); err != nil {
		t.Fatal(err)
	}
	environment := project(t).Services["grafana"].Environment
	for _, m := range regexp.MustCompile(`\$\{(\w+)\}`).FindAllStringSubmatch(string(data), -1) {
		if _, ok := environment[m[1]]; !ok && m[1] != "…" {
			t.Errorf("Grafana's data sources use ${%s}, which its container does not have", m[1])
		}
	}
	all := map[string]string{}
	for _, d := range c.Datasources {
		all[d.UID] = d.Type
	}
	return all
}

func TestGrafanaProvisioningIsYAML(t *testing.T) {
	t.Parallel()
	var c struct {
		Providers []struct{ Options struct{ Path string } }
	}
	if err := yaml.Unmarshal(read(t, "deploy/grafana/provisioning/dashboards/tollkeeper.yaml"), &c); err != nil {
		t.Fatal(err)
	}
	for _, v := range project(t).Services["grafana"].Volumes {
		if len(c.Providers) == 1 && v.Target == c.Providers[0].Options.Path {
			return
		}
	}
	t.Errorf("no dashboards are mounted where Grafana looks for them: %+v", c.Providers)
}
