// Package folds keeps what a reader of the ledger has made of it, for its next start.
package folds

import (
	"context"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"
)

// Store keeps the last two in an object bucket, as NAME.0 and NAME.1, so that one that
// was cut off while being written leaves the other. Not safe for concurrent use.
type Store struct {
	JS           jetstream.JetStream
	Bucket, Name string
	next         int
}

func (s *Store) slot(i int) string { return fmt.Sprintf("%s.%d", s.Name, i) }

func (s *Store) store(ctx context.Context) (jetstream.ObjectStore, error) {
	store, err := s.JS.ObjectStore(ctx, s.Bucket)
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", s.Bucket, err)
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
	for i := range found {
		name := s.slot(i)
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
	if _, err := store.PutBytes(ctx, s.slot(s.next), data); err != nil {
		return fmt.Errorf("write snapshot %s: %w", s.slot(s.next), err)
	}
	s.next = 1 - s.next
	return nil
}
