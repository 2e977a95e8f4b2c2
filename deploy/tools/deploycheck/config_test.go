package deploycheck

import (
	"bytes"
	"encoding/xml"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"text/template"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v3"
)

func TestExamplePlansFollowTheSchema(t *testing.T) {
	t.Parallel()
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(read(t, "schemas/plans.schema.json")))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("plans.schema.json", doc); err != nil {
		t.Fatal(err)
	}
	schema, err := c.Compile("plans.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	var plans any
	if err := yaml.Unmarshal(read(t, "deploy/plans.example.yaml"), &plans); err != nil {
		t.Fatal(err)
	}
	if err := schema.Validate(plans); err != nil {
		t.Error(err)
	}
	// The check would not see a schema that takes anything.
	plans.(map[string]any)["version"] = 2
	if err := schema.Validate(plans); err == nil {
		t.Error("the schema takes any version")
	}
}

// The gateway itself reads the example: it fails on a configuration before it
// looks for anything else, and then on the address that is not there.
func TestExampleGatewayConfigurationIsTakenByTheGateway(t *testing.T) {
	t.Parallel()
	bin := binary(t, "gateway")
	run := func(config string) string {
		cmd := exec.Command(bin, "--config", config, "--gateway-listen", "256.0.0.1:1")
		out, err := cmd.CombinedOutput()
		if err == nil {
			t.Fatal("the gateway listens on an address that does not exist")
		}
		return string(out)
	}
	example, err := filepath.Abs(filepath.Join(root, "deploy/gateway.example.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if out := run(example); !strings.Contains(out, "256.0.0.1:1") || strings.Contains(out, "gateway.example.yaml") {
		t.Errorf("the example is refused: %s", out)
	}
	bad := filepath.Join(t.TempDir(), "bad.yaml")
	write(t, bad, strings.Replace(string(read(t, "deploy/gateway.example.yaml")), "profile: openai", "profile: opanai", 1))
	if out := run(bad); !strings.Contains(out, "bad.yaml:") {
		t.Errorf("a wrong profile is taken: %s", out)
	}
}

type clickhouseUsers struct {
	Profiles struct {
		Analyst settings `xml:"analyst"`
		Service settings `xml:"service"`
	} `xml:"profiles"`
	Users struct {
		Default    *clickhouseUser `xml:"default"`
		Analyst    clickhouseUser  `xml:"analyst"`
		Tollkeeper clickhouseUser  `xml:"tollkeeper"`
	} `xml:"users"`
}

type settings struct {
	Inner string `xml:",innerxml"`
}

type clickhouseUser struct {
	Password struct {
		FromEnv string `xml:"from_env,attr"`
	} `xml:"password"`
	Profile string   `xml:"profile"`
	Grants  []string `xml:"grants>query"`
}

// embedded returns the users of the embedded engine, out of the Go source.
func embedded(t *testing.T) (users clickhouseUsers, config string) {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(root, "services/internal/embedclickhouse/config.go"), nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	texts := map[string]string{}
	var engines []string
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.ValueSpec:
			for i, v := range n.Values {
				if lit, ok := v.(*ast.BasicLit); ok {
					texts[n.Names[i].Name], _ = strconv.Unquote(lit.Value) // not a string: not wanted
				}
			}
		case *ast.FuncDecl:
			if n.Name.Name == "tableEngines" {
				ast.Inspect(n, func(n ast.Node) bool {
					if lit, ok := n.(*ast.BasicLit); ok {
						s, _ := strconv.Unquote(lit.Value) // as above
						engines = append(engines, s)
					}
					return true
				})
			}
		}
		return true
	})
	tmpl, err := template.New("users").Funcs(template.FuncMap{"engines": func() []string { return engines }, "xml": func(s string) string { return s }}).Parse(texts["usersXML"])
	if err != nil || texts["usersXML"] == "" {
		t.Fatalf("the embedded engine's users are not where they were: %v", err)
	}
	var out bytes.Buffer
	if err := tmpl.Execute(&out, map[string]any{"AnalystSHA256": "", "ServiceSHA256": "", "Networks": []string{}}); err != nil {
		t.Fatal(err)
	}
	if err := xml.Unmarshal(out.Bytes(), &users); err != nil {
		t.Fatal(err)
	}
	return users, texts["configXML"]
}

func squeeze(s string) string { return regexp.MustCompile(`\s+`).ReplaceAllString(s, "") }

func TestClickHouseUsersAreThoseOfTheEmbeddedEngine(t *testing.T) {
	t.Parallel()
	want, config := embedded(t)
	var got clickhouseUsers
	if err := xml.Unmarshal(read(t, "deploy/clickhouse/users.xml"), &got); err != nil {
		t.Fatal(err)
	}
	if got.Users.Default != nil {
		t.Error("there is a user default")
	}
	environment := project(t).Services["clickhouse"].Environment
	for name, pair := range map[string][2]clickhouseUser{"analyst": {got.Users.Analyst, want.Users.Analyst}, "tollkeeper": {got.Users.Tollkeeper, want.Users.Tollkeeper}} {
		got, want := pair[0], pair[1]
		if !slices.Equal(got.Grants, want.Grants) {
			t.Errorf("%s may\n%s\nand in the embedded engine\n%s", name, strings.Join(got.Grants, "\n"), strings.Join(want.Grants, "\n"))
		}
		if got.Profile != want.Profile {
			t.Errorf("%s has profile %s, in the embedded engine %s", name, got.Profile, want.Profile)
		}
		if v := environment[got.Password.FromEnv]; v == nil || *v == "" {
			t.Errorf("the password of %s comes from %q, which the container does not have", name, got.Password.FromEnv)
		}
	}
	if squeeze(got.Profiles.Analyst.Inner) != squeeze(want.Profiles.Analyst.Inner) || squeeze(got.Profiles.Service.Inner) != squeeze(want.Profiles.Service.Inner) {
		t.Error("the profiles are not those of the embedded engine")
	}

	// What makes a block durable is the same.
	durable := regexp.MustCompile(`(?s)<merge_tree>.*</merge_tree>`)
	if a, b := durable.FindString(string(read(t, "deploy/clickhouse/config.xml"))), durable.FindString(config); a == "" || squeeze(a) != squeeze(b) {
		t.Errorf("deploy/clickhouse/config.xml has %q, the embedded engine %q", a, b)
	}
	var any struct{}
	if err := xml.Unmarshal(read(t, "deploy/clickhouse/config.xml"), &any); err != nil {
		t.Errorf("config.xml: %v", err)
	}
}

// As the image would be built: only Go's standard library, so that nothing of
// this module's tools is fetched for it.
func TestHealthCheckNeedsNothing(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", "../healthcheck")
	cmd.Env = append(os.Environ(), "GOWORK=off")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Fields(string(out)); len(got) != 1 {
		t.Errorf("it needs %v", got)
	}
}
