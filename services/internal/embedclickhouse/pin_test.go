package embedclickhouse

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const deployedPin = "../../../deploy/engine"

func TestBinaryCarriesThePinOfDeploy(t *testing.T) {
	t.Parallel()
	manifestJSON, lockJSON, err := pinFiles()
	if err != nil {
		t.Fatal(err)
	}
	for name, carried := range map[string][]byte{"package.json": manifestJSON, "package-lock.json": lockJSON} {
		raw, err := os.ReadFile(filepath.Join(deployedPin, name))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(decoded(t, raw), decoded(t, carried)); diff != "" {
			t.Errorf("deploy/engine/%s and the binary's pin differ (-file +binary):\n%s", name, diff)
		}
		if strings.Contains(string(raw), "://") {
			t.Errorf("deploy/engine/%s names a registry host; the user's own registry must be asked", name)
		}
	}
}

func decoded(t *testing.T, raw []byte) (value any) {
	t.Helper()
	if err := json.Unmarshal(raw, &value); err != nil {
		t.Fatal(err)
	}
	return value
}
