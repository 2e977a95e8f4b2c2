// Package folds keeps what the historian has seen of the ledger.
package folds

import (
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

// Store keeps the last two in the bucket snapshots, so that one that was cut off
// while being written leaves the other. Not safe for concurrent use.
type Store struct {
	JS   jetstream.JetStream
	next int
}

var snapshotNames = [2]string{"historian/calls.0", "historian/calls.1"}

func (s *Store) store(ctx context.Context) (jetstream.ObjectStore, error) {
	store, err := s.JS.ObjectStore(ctx, ledger.SnapshotsBucket)
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", ledger.SnapshotsBucket, err)
	}
	return store, nil
}

// Load returns what is stored, newest first, undamaged or not.
func (s *Store) Load(ctx context.Context) ([][]byte, error) {
	store, err := s.store(ctx)
	if err != nil {
		return nil, err
	}
	var found [2][]byte
	var at [2]int64
	for i, name := range snapshotNames {
		info, err := store.GetInfo(ctx, name)
		if err == nil {
			at[i] = info.ModTime.UnixNano()
			found[i], err = store.GetBytes(ctx, name)
		}
		switch {
		case errors.Is(err, jetstream.ErrObjectNotFound):
		case errors.Is(err, jetstream.ErrDigestMismatch):
			found[i] = nil
		case err != nil:
			return nil, fmt.Errorf("read snapshot %s: %w", name, err)
		}
	}
	newest := 0
	if at[1] > at[0] {
		newest = 1
	}
	s.next = 1 - newest
	var out [][]byte
	for _, data := range [][]byte{found[newest], found[1-newest]} {
		if data != nil {
			out = append(out, data)
		}
	}
	return out, nil
}

// Save stores one more in place of the older.
func (s *Store) Save(ctx context.Context, data []byte) error {
	store, err := s.store(ctx)
	if err != nil {
		return err
	}
	if _, err := store.PutBytes(ctx, snapshotNames[s.next], data); err != nil {
		return fmt.Errorf("write snapshot %s: %w", snapshotNames[s.next], err)
	}
	s.next = 1 - s.next
	return nil
}
