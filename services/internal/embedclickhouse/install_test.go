package embedclickhouse

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

// fakeNpm is a program in the place of npm, for what the real one does only in bad times.
func fakeNpm(t *testing.T, script string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "npm")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestInstallSaysWhatToDoWhenItFails(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		npm  string
		want error
		hint string
	}{
		"npm is missing":        {npm: "/nonexistent/npm", want: ErrNpmMissing, hint: "npm"},
		"no network":            {npm: fakeNpm(t, "echo 'npm error code ENOTFOUND' >&2; exit 1"), want: ErrOffline, hint: "network"},
		"other bytes":           {npm: fakeNpm(t, "echo 'npm error code EINTEGRITY' >&2; exit 1"), want: ErrIntegrity, hint: "cache"},
		"the package is gone":   {npm: fakeNpm(t, "echo 'npm error code E404' >&2; exit 1"), hint: "registry"},
		"the disk is full":      {npm: fakeNpm(t, "echo 'npm error code ENOSPC' >&2; exit 1"), hint: "disk is full"},
		"npm fetched nothing":   {npm: fakeNpm(t, "exit 0"), want: ErrIntegrity, hint: "libchdb.so"},
		"npm fetched a changed": {npm: fakeNpm(t, "mkdir -p node_modules/"+enginePackage+"; echo x >node_modules/"+enginePackage+"/libchdb.so"), want: ErrIntegrity, hint: "SHA-256"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			_, err := Install(t.Context(), InstallOptions{Dir: dir, NpmPath: test.npm, Logger: zerolog.Nop()})
			if err == nil || (test.want != nil && !errors.Is(err, test.want)) || !strings.Contains(err.Error(), test.hint) {
				t.Errorf("error is %v, want %v with the hint %q", err, test.want, test.hint)
			}
			assertNothingInstalled(t, dir)
		})
	}
}

func TestInstallFromAnUnreachableRegistryIsOffline(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	_, err := Install(t.Context(), InstallOptions{Dir: dir, Logger: zerolog.Nop(), Env: []string{
		"npm_config_registry=http://127.0.0.1:1/", "npm_config_fetch_retries=0",
		"npm_config_cache=" + t.TempDir()}})
	if !errors.Is(err, ErrOffline) {
		t.Errorf("error is %v, want %v", err, ErrOffline)
	}
	assertNothingInstalled(t, dir)
}

func TestACancelledInstallationEndsNpmAndLeavesNothing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ctx, cancel := context.WithCancelCause(t.Context())
	stopped := errors.New("stopped by the user")
	var once sync.Once
	// The first progress proves that npm runs.
	_, err := Install(ctx, InstallOptions{Dir: dir, NpmPath: fakeNpm(t, "sleep 600"), Logger: zerolog.Nop(),
		Progress: func(_, _ int64) { once.Do(func() { cancel(stopped) }) }})
	if !errors.Is(err, stopped) {
		t.Errorf("error is %v, want %v", err, stopped)
	}
	assertNothingInstalled(t, dir)
}

func TestInstallWaitsForAnotherInstallation(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	other, err := lockFile(t.Context(), filepath.Join(dir, "."+EngineVersion+".lock"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err = Install(ctx, InstallOptions{Dir: dir, NpmPath: fakeNpm(t, "exit 1"), Logger: zerolog.Nop()})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error is %v, want the wait to end with its context", err)
	}
}

func TestInstallationsAtOnceFetchOnce(t *testing.T) {
	t.Parallel()
	dir, runs := t.TempDir(), filepath.Join(t.TempDir(), "runs")
	// The genuine library without its download.
	npm := fakeNpm(t, "echo run >>'"+runs+"'; test -s package-lock.json || exit 1; mkdir -p node_modules/"+enginePackage+
		"; ln '"+engine(t)+"' node_modules/"+enginePackage+"/ || cp '"+engine(t)+"' node_modules/"+enginePackage+"/")
	results := make(chan error, 3)
	for range cap(results) {
		go func() {
			path, err := Install(t.Context(), InstallOptions{Dir: dir, NpmPath: npm, Logger: zerolog.Nop()})
			if want := filepath.Join(dir, EngineVersion, libraryName); err == nil && path != want {
				err = errors.New("installed at " + path)
			}
			results <- err
		}()
	}
	for range cap(results) {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	if raw, err := os.ReadFile(runs); err != nil || string(raw) != "run\n" {
		t.Errorf("npm ran %q (%v), want once", raw, err)
	}
}

func TestAnIncompleteEngineCountsAsMissing(t *testing.T) {
	t.Parallel()
	genuine, err := json.Marshal(pinnedRecord())
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		record []byte
		size   int64
		want   bool
	}{
		"complete":        {record: genuine, size: librarySize, want: true},
		"no record":       {size: librarySize},
		"cut short":       {record: genuine, size: librarySize - 1},
		"of another pin":  {record: []byte(`{"version":"1","integrity":"x"}`), size: librarySize},
		"damaged record":  {record: []byte(`{`), size: librarySize},
		"library missing": {record: genuine, size: -1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			home := filepath.Join(dir, EngineVersion)
			if err := os.Mkdir(home, 0o755); err != nil {
				t.Fatal(err)
			}
			if test.size >= 0 {
				writeSparse(t, filepath.Join(home, libraryName), test.size)
			}
			if test.record != nil {
				if err := os.WriteFile(filepath.Join(home, installRecordName), test.record, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			path, ok := Installed(dir)
			if ok != test.want || (ok && path != filepath.Join(home, libraryName)) {
				t.Errorf("Installed is %q, %v; want %v", path, ok, test.want)
			}
		})
	}
}

func writeSparse(t *testing.T, path string, size int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func assertNothingInstalled(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		// The lock file stays: removing it would let two installations hold different files.
		if !strings.HasSuffix(entry.Name(), ".lock") {
			t.Errorf("a failed installation left %s", entry.Name())
		}
	}
	if path, ok := Installed(dir); ok {
		t.Errorf("a failed installation counts as installed: %s", path)
	}
}
