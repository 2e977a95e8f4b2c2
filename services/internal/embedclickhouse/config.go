package embedclickhouse

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"text/template"
)

const (
	// Database is the one database services own; it exists when Start returns.
	Database = "tollkeeper"
	// ServiceUser reads and writes Database and creates its tables.
	ServiceUser = "tollkeeper"
	// AnalystUser reads Database under limits of time and memory.
	AnalystUser = "analyst"

	credentialsName = "credentials.json"
	configName      = "config.xml"
	usersName       = "users.xml"
	engineLogName   = "engine.log"
	engineOutName   = "engine.out"
	storeName       = "store"
)

// Credentials are the passwords of the two users. In Options an empty one is generated at the first
// start and kept, readable by the owner only, in the data directory.
type Credentials struct {
	ServicePassword string `json:"service_password"`
	AnalystPassword string `json:"analyst_password"`
}

func (c Credentials) complete() bool { return c.ServicePassword != "" && c.AnalystPassword != "" }

// resolveCredentials prefers what was given, then what an earlier start generated.
func resolveCredentials(dataDir string, given Credentials) (Credentials, error) {
	if given.complete() {
		return given, nil
	}
	path := filepath.Join(dataDir, credentialsName)
	var kept Credentials
	raw, err := os.ReadFile(path)
	switch {
	case err == nil:
		if err := json.Unmarshal(raw, &kept); err != nil {
			return Credentials{}, fmt.Errorf("%s is damaged; remove it and start again, new passwords are then made: %w", path, err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return Credentials{}, fmt.Errorf("cannot read the engine's passwords: %w", err)
	}
	if !kept.complete() {
		kept = Credentials{ServicePassword: newPassword(), AnalystPassword: newPassword()}
		encoded, err := json.MarshalIndent(kept, "", "  ")
		if err != nil {
			return Credentials{}, err
		}
		if err := writePrivate(path, encoded); err != nil {
			return Credentials{}, fmt.Errorf("cannot keep the engine's passwords: %w", err)
		}
	}
	if given.ServicePassword != "" {
		kept.ServicePassword = given.ServicePassword
	}
	if given.AnalystPassword != "" {
		kept.AnalystPassword = given.AnalystPassword
	}
	return kept, nil
}

// ReadCredentials returns the passwords of the engine that keeps its data in
// dataDir, for other programs of the same user on this machine.
func ReadCredentials(dataDir string) (Credentials, error) {
	raw, err := os.ReadFile(filepath.Join(dataDir, credentialsName))
	if err != nil {
		return Credentials{}, fmt.Errorf("no engine has kept passwords in %s: %w", dataDir, err)
	}
	var kept Credentials
	if err := json.Unmarshal(raw, &kept); err != nil {
		return Credentials{}, fmt.Errorf("%s is damaged: %w", filepath.Join(dataDir, credentialsName), err)
	}
	return kept, nil
}

func newPassword() string {
	var secret [24]byte
	// crypto/rand.Read never fails: it ends the process when the kernel has no randomness.
	_, _ = rand.Read(secret[:])
	return base64.RawURLEncoding.EncodeToString(secret[:])
}

// writePrivate replaces path by a rename, so that a crash leaves the old file or the new one.
func writePrivate(path string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

type configValues struct {
	DataDir        string
	LogLevel       string
	Durable        bool
	MaxMemoryBytes uint64
	ServiceSHA256  string
	AnalystSHA256  string
	// Networks that the two users with a password may come from; the user without one is always
	// held to loopback.
	Networks []string
}

func digest(password string) string {
	sum := sha256.Sum256([]byte(password))
	return hex.EncodeToString(sum[:])
}

func loopbackNetworks() []string { return []string{"127.0.0.0/8", "::1"} }

func writeConfig(o Options, c Credentials, loopback bool) error {
	values := configValues{
		DataDir: o.DataDir, LogLevel: o.LogLevel, Durable: !o.NoSync, MaxMemoryBytes: o.MaxMemoryBytes,
		ServiceSHA256: digest(c.ServicePassword), AnalystSHA256: digest(c.AnalystPassword),
		Networks: loopbackNetworks(),
	}
	if !loopback {
		values.Networks = []string{"::/0"}
	}
	for name, source := range map[string]string{configName: configXML, usersName: usersXML} {
		rendered, err := render(name, source, values)
		if err != nil {
			return err
		}
		if err := writePrivate(filepath.Join(o.DataDir, name), rendered); err != nil {
			return fmt.Errorf("cannot write the engine's %s: %w", name, err)
		}
	}
	return nil
}

func render(name, source string, values configValues) ([]byte, error) {
	t, err := template.New(name).Funcs(template.FuncMap{"xml": escapeXML, "engines": tableEngines}).Parse(source)
	if err != nil {
		return nil, fmt.Errorf("the template of %s: %w", name, err)
	}
	var out bytes.Buffer
	if err := t.Execute(&out, values); err != nil {
		return nil, fmt.Errorf("filling in %s: %w", name, err)
	}
	return out.Bytes(), nil
}

func escapeXML(text string) (string, error) {
	var out bytes.Buffer
	if err := xml.EscapeText(&out, []byte(text)); err != nil {
		return "", err
	}
	return out.String(), nil
}

// tableEngines are those the schemas may use; none of them reaches files, URLs or other servers.
func tableEngines() []string {
	return []string{"MergeTree", "ReplacingMergeTree", "SummingMergeTree", "AggregatingMergeTree",
		"CollapsingMergeTree", "VersionedCollapsingMergeTree", "Memory", "Null", "Dictionary", "View", "MaterializedView"}
}

// The background pools warn about each pause of an idle task, about once a second for ever: their
// level is raised so that the log holds what matters.
//
// fsync_after_insert and fsync_part_directory make an acknowledged block survive a power loss, not
// only a killed process.
const configXML = `<clickhouse>
  <log-level>{{.LogLevel}}</log-level>
  <logger>
    <level>{{.LogLevel}}</level>
    <console>0</console>
    <log>{{xml .DataDir}}/engine.log</log>
    <size>10M</size>
    <count>3</count>
    <levels>
      <logger><name>BackgroundSchedulePool/BgSchPool</name><level>error</level></logger>
      <logger><name>BackgroundSchedulePool/BgStrmSchPool</name><level>error</level></logger>
    </levels>
  </logger>
  <timezone>UTC</timezone>
  <users_config>{{xml .DataDir}}/users.xml</users_config>
  <mark_cache_size>268435456</mark_cache_size>
{{- if .MaxMemoryBytes}}
  <max_server_memory_usage>{{.MaxMemoryBytes}}</max_server_memory_usage>
{{- else}}
  <max_server_memory_usage_to_ram_ratio>0.5</max_server_memory_usage_to_ram_ratio>
{{- end}}
{{- if .Durable}}
  <merge_tree>
    <fsync_after_insert>1</fsync_after_insert>
    <fsync_part_directory>1</fsync_part_directory>
  </merge_tree>
{{- end}}
</clickhouse>
`

// The engine's own start runs as "default", in the process and without a password, and needs
// SYSTEM LISTEN without a read-only profile to open the ports. It can't be another user, and a
// network tells it from a client of this machine as little. So it is granted nothing else, and the
// two queries of the start use up its quota, whose interval is ten years and begins with the
// process. No quota counts a SELECT without a table, and the function file() reads every file: a
// query of more than one element, which any SELECT is, is refused as well.
// The profile "default" stays empty, because merges and mutations in the background run under it.
const usersXML = `<clickhouse>
  <profiles>
    <default/>
    <guest>
      <allow_introspection_functions>0</allow_introspection_functions>
      <max_execution_time>60</max_execution_time>
      <max_memory_usage>4294967296</max_memory_usage>
      <max_ast_elements>1</max_ast_elements>
      <constraints>
        <allow_introspection_functions><readonly/></allow_introspection_functions>
        <max_execution_time><min>1</min><max>60</max></max_execution_time>
        <max_memory_usage><min>1</min><max>4294967296</max></max_memory_usage>
        <max_ast_elements><readonly/></max_ast_elements>
      </constraints>
    </guest>
    <analyst>
      <readonly>2</readonly>
      <allow_introspection_functions>0</allow_introspection_functions>
      <max_execution_time>60</max_execution_time>
      <max_memory_usage>4294967296</max_memory_usage>
      <constraints>
        <allow_introspection_functions><readonly/></allow_introspection_functions>
        <max_execution_time><min>1</min><max>60</max></max_execution_time>
        <max_memory_usage><min>1</min><max>4294967296</max></max_memory_usage>
      </constraints>
    </analyst>
    <service>
      <allow_introspection_functions>0</allow_introspection_functions>
      <max_execution_time>0</max_execution_time>
      <max_memory_usage>0</max_memory_usage>
    </service>
  </profiles>
  <quotas>
    <default/>
    <start>
      <interval><duration>315360000</duration><queries>2</queries></interval>
    </start>
  </quotas>
  <users>
    <default>
      <password></password>
      <networks><ip>127.0.0.0/8</ip><ip>::1</ip></networks>
      <profile>guest</profile>
      <quota>start</quota>
      <grants>
        <query>GRANT SYSTEM LISTEN ON *.*</query>
      </grants>
    </default>
    <analyst>
      <password_sha256_hex>{{.AnalystSHA256}}</password_sha256_hex>
      <networks>{{range .Networks}}<ip>{{.}}</ip>{{end}}</networks>
      <profile>analyst</profile>
      <quota>default</quota>
      <grants>
        <query>GRANT SHOW, SELECT, dictGet ON tollkeeper.*</query>
        <query>GRANT SELECT ON system.parts</query>
        <query>GRANT SELECT ON system.metrics</query>
        <query>GRANT SELECT ON system.events</query>
      </grants>
    </analyst>
    <tollkeeper>
      <password_sha256_hex>{{.ServiceSHA256}}</password_sha256_hex>
      <networks>{{range .Networks}}<ip>{{.}}</ip>{{end}}</networks>
      <profile>service</profile>
      <quota>default</quota>
      <grants>
        <query>GRANT SHOW, SELECT, INSERT, ALTER, CREATE DATABASE, CREATE TABLE, CREATE VIEW, CREATE DICTIONARY, DROP, TRUNCATE, OPTIMIZE, dictGet ON tollkeeper.*</query>
        <query>GRANT CREATE TEMPORARY TABLE ON *.*</query>
        <query>GRANT KILL QUERY ON *.*</query>
        <query>GRANT SELECT ON system.*</query>
{{- range engines}}
        <query>GRANT TABLE ENGINE ON {{.}}</query>
{{- end}}
      </grants>
    </tollkeeper>
  </users>
</clickhouse>
`
