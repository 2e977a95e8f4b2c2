package migration

import (
	"testing"
	"testing/fstest"
)

func TestMigrationFilesAreChecked(t *testing.T) {
	t.Parallel()
	for name, files := range map[string]fstest.MapFS{
		"none":        {},
		"a gap":       {"clickhouse/0001_a.sql": {Data: []byte("SELECT 1;\n")}, "clickhouse/0003_b.sql": {Data: []byte("SELECT 1;\n")}},
		"no number":   {"clickhouse/a.sql": {Data: []byte("SELECT 1;\n")}},
		"no content":  {"clickhouse/0001_a.sql": {Data: []byte("-- nothing\n")}},
		"twice a one": {"clickhouse/0001_a.sql": {Data: []byte("SELECT 1;\n")}, "clickhouse/0001_b.sql": {Data: []byte("SELECT 1;\n")}},
	} {
		if _, err := Read(files); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}
