package history

import (
	"context"
	"errors"
	"fmt"

	"github.com/ClickHouse/ch-go/proto"
	"github.com/ClickHouse/clickhouse-go/v2"
	"github.com/ClickHouse/clickhouse-go/v2/lib/driver"

	"github.com/tollkeeper/tollkeeper/schemas"
	"github.com/tollkeeper/tollkeeper/services/internal/history/migration"
)

// MigrationError says that the tables and this program do not belong together.
type MigrationError struct {
	Version uint32
	Name    string
	Reason  string
}

// Error is a sentence that tells what to do next.
func (e *MigrationError) Error() string {
	return fmt.Sprintf("ClickHouse migration %04d (%s): %s", e.Version, e.Name, e.Reason)
}

// Migrate makes the database and brings its tables and views to the form that
// this program knows. It may be called by several services at once and again
// and again: ClickHouse has no lock for it, so every statement of a migration
// can be repeated, and running one twice writes the same line twice. While
// ClickHouse is away it waits. A migration that was changed after it was applied,
// or a database of a newer program, is refused with a *MigrationError and nothing
// is changed.
func (h *History) Migrate(ctx context.Context) error {
	all, err := migration.Read(schemas.ClickHouse)
	if err != nil {
		return err
	}
	for try := 0; ; try++ {
		err := h.migrate(ctx, all)
		var refused *MigrationError
		if err == nil {
			return nil
		}
		if errors.As(err, &refused) || Permanent(err) || ctx.Err() != nil || !transient(err) && try >= 5 {
			return err
		}
		h.o.Logger.Warn().Str("error", firstLine(err)).Msg("ClickHouse can't be migrated yet: trying again")
		if err := pause(ctx, try); err != nil {
			return fmt.Errorf("migrate ClickHouse: %w", err)
		}
	}
}

// transient says that the server did not answer with an error of its own.
func transient(err error) bool { return errorCode(err) == 0 }

func (h *History) migrate(ctx context.Context, all []migration.Migration) error {
	// The database may not exist, and a connection to a database that does not
	// exist is refused.
	base, err := clickhouse.Open(h.options(""))
	if err != nil {
		return fmt.Errorf("connect to ClickHouse: %w", err)
	}
	err = base.Exec(ctx, "CREATE DATABASE IF NOT EXISTS "+h.o.Database)
	if cerr := base.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("create database %s: %w", h.o.Database, err)
	}
	if err := h.conn.Exec(ctx, createMigrations); err != nil {
		return fmt.Errorf("create the table of migrations: %w", err)
	}
	applied, err := h.applied(ctx)
	if err != nil {
		return err
	}
	newest := all[len(all)-1].Version
	for v, m := range applied {
		if v > newest {
			return &MigrationError{v, m.Name, "it was applied by a newer program: run that one, or one as new"}
		}
	}
	for _, m := range all {
		if a, ok := applied[m.Version]; ok {
			if a.Checksum != m.Checksum {
				return &MigrationError{m.Version, m.Name, "it was applied with other content: a migration is never changed, add a new one instead"}
			}
			continue
		}
		for i, s := range m.Statements {
			if err := h.conn.Exec(ctx, s); err != nil {
				return fmt.Errorf("ClickHouse migration %04d (%s), statement %d: %w", m.Version, m.Name, i+1, err)
			}
		}
		if err := h.conn.Exec(ctx, "INSERT INTO schema_migrations (version, name, checksum) VALUES (?, ?, ?)", m.Version, m.Name, m.Checksum); err != nil {
			return fmt.Errorf("note ClickHouse migration %04d (%s): %w", m.Version, m.Name, err)
		}
		h.o.Logger.Info().Uint32("version", m.Version).Str("name", m.Name).Msg("ClickHouse migration applied")
	}
	return nil
}

// ErrNotMigrated says that the tables are not yet in the form that this program
// knows: somebody has still to call Migrate.
var ErrNotMigrated = errors.New("ClickHouse's tables are not made yet")

// Migrated reports whether the tables are in the form that this program knows or a
// newer one, for who only reads and leaves Migrate to the historian: nil then, an
// ErrNotMigrated that says how far they are while that may yet come, and a
// *MigrationError when they have come to another form.
func (h *History) Migrated(ctx context.Context) error {
	all, err := migration.Read(schemas.ClickHouse)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, QueryTimeout)
	defer cancel()
	applied, err := h.applied(ctx)
	switch errorCode(err) {
	case proto.ErrUnknownTable, proto.ErrUnknownDatabase:
		applied, err = nil, nil
	}
	if err != nil {
		return err
	}
	return compareMigrations(all, applied)
}

func compareMigrations(all []migration.Migration, applied map[uint32]migration.Migration) error {
	for n, m := range all {
		a, ok := applied[m.Version]
		if !ok {
			return fmt.Errorf("%w: they are at version %d of %d", ErrNotMigrated, n, len(all))
		}
		if a.Checksum != m.Checksum {
			return &MigrationError{m.Version, m.Name, "it was applied with other content: a migration is never changed, add a new one instead"}
		}
	}
	return nil
}

const createMigrations = `CREATE TABLE IF NOT EXISTS schema_migrations
(
    version UInt32, name String, checksum String, applied_at DateTime64(3, 'UTC') DEFAULT now64(3, 'UTC')
)
ENGINE = MergeTree ORDER BY (version, applied_at)`

func (h *History) applied(ctx context.Context) (out map[uint32]migration.Migration, err error) {
	rows, err := h.conn.Query(ctx, "SELECT version, name, checksum FROM schema_migrations ORDER BY version, applied_at")
	if err != nil {
		return nil, fmt.Errorf("read the table of migrations: %w", err)
	}
	defer func() { err = closeRows(rows, err) }()
	out = map[uint32]migration.Migration{}
	for rows.Next() {
		var m migration.Migration
		if err := rows.Scan(&m.Version, &m.Name, &m.Checksum); err != nil {
			return nil, fmt.Errorf("read the table of migrations: %w", err)
		}
		if first, ok := out[m.Version]; ok && first.Checksum != m.Checksum {
			return nil, &MigrationError{m.Version, m.Name, "two programs applied it with different content: they must be of one version"}
		}
		out[m.Version] = m
	}
	return out, nil
}

// closeRows ends reading; what went wrong on the way comes first.
func closeRows(rows driver.Rows, err error) error {
	cerr := rows.Close()
	if err != nil {
		return err
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("read from ClickHouse: %w", err)
	}
	return cerr
}
