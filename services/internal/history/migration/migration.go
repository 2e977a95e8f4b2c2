// Package migration reads the migrations of ClickHouse's tables. It is pure.
package migration

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
)

// Migration is one file.
type Migration struct {
	Version uint32
	Name    string
	// Checksum is the SHA-256 of the whole file in hex.
	Checksum string
	// Statements in order, without their semicolons.
	Statements []string
}

// Read reads clickhouse/NNNN_name.sql in order. A statement ends with
// a line that ends with ';'; lines that begin with "--" are comments, and count
// for the checksum like everything else.
func Read(files fs.FS) ([]Migration, error) {
	names, err := fs.Glob(files, "clickhouse/*.sql")
	if err != nil {
		return nil, fmt.Errorf("ClickHouse migrations: %w", err)
	}
	var all []Migration
	for _, name := range names {
		number, rest, ok := strings.Cut(strings.TrimSuffix(path.Base(name), ".sql"), "_")
		version, err := strconv.ParseUint(number, 10, 32)
		if !ok || err != nil || version == 0 {
			return nil, fmt.Errorf("ClickHouse migration %s is not named NNNN_name.sql", name)
		}
		text, err := fs.ReadFile(files, name)
		if err != nil {
			return nil, fmt.Errorf("ClickHouse migrations: %w", err)
		}
		sum := sha256.Sum256(text)
		m := Migration{Version: uint32(version), Name: rest, Checksum: hex.EncodeToString(sum[:]), Statements: statements(string(text))}
		if len(m.Statements) == 0 {
			return nil, fmt.Errorf("ClickHouse migration %s holds no statement", name)
		}
		all = append(all, m)
	}
	slices.SortFunc(all, func(a, b Migration) int { return cmp.Compare(a.Version, b.Version) })
	for i, m := range all {
		if m.Version != uint32(i+1) {
			return nil, fmt.Errorf("ClickHouse migrations are numbered 1, 2, 3 …: the one after %d is %d", i, m.Version)
		}
	}
	if len(all) == 0 {
		return nil, errors.New("ClickHouse migrations: there are none")
	}
	return all, nil
}

func statements(text string) []string {
	var out []string
	var b strings.Builder
	for line := range strings.Lines(text) {
		trimmed := strings.TrimSpace(line)
		if trimmed == "" || strings.HasPrefix(trimmed, "--") {
			continue
		}
		if end, ok := strings.CutSuffix(strings.TrimRight(line, " \t\r\n"), ";"); ok {
			b.WriteString(end)
			out = append(out, b.String())
			b.Reset()
			continue
		}
		b.WriteString(line)
	}
	if rest := strings.TrimSpace(b.String()); rest != "" {
		out = append(out, rest)
	}
	return out
}
