package schemas

import (
	"bytes"
	"io/fs"
	"testing"
)

// A merge that was not finished stood in the contract for some time: it is a comment to
// no reader, and a syntax error to all.
func TestNoFileHoldsAMergeThatWasNotFinished(t *testing.T) {
	t.Parallel()
	files := map[string][]byte{"streams.json": Streams, "plans.schema.json": Plans, "openapi.yaml": OpenAPI}
	err := fs.WalkDir(ClickHouse, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		files[path], err = fs.ReadFile(ClickHouse, path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range files {
		for n, line := range bytes.Split(data, []byte("\n")) {
			for _, mark := range []string{"<<<<<<< ", ">>>>>>> ", "======="} {
				if bytes.HasPrefix(line, []byte(mark)) {
					t.Errorf("%s:%d: %s", name, n+1, line)
				}
			}
		}
	}
}
