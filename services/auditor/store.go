package auditor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/auditor/internal/findings"
	"github.com/tollkeeper/tollkeeper/services/internal/folds"
	"github.com/tollkeeper/tollkeeper/services/internal/leftovers"
)

// store keeps books and findings in buckets of their own: who compares the others may
// change nothing of theirs.
type store struct {
	js    jetstream.JetStream
	books folds.Store
	tidy  time.Time // when what uploads that died have left behind was removed
}

func newStore(js jetstream.JetStream) store {
	return store{js: js, books: folds.Store{JS: js, Bucket: ledger.BooksBucket, Name: "books"}}
}

// tidyEvery is how often what is left behind in the books' bucket is removed.
const tidyEvery = 5 * time.Minute

// sweep removes what is left behind in the books' bucket, if it is time.
func (s *store) sweep(ctx context.Context) error {
	if time.Since(s.tidy) < tidyEvery {
		return nil
	}
	s.tidy = time.Now()
	_, err := leftovers.Sweep(ctx, s.js, ledger.BooksBucket, leftovers.Age)
	return err
}

func (s *store) bucket(ctx context.Context) (jetstream.KeyValue, error) {
	kv, err := s.js.KeyValue(ctx, ledger.AuditBucket)
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", ledger.AuditBucket, err)
	}
	return kv, nil
}

// findings returns what was found before.
func (s *store) findings(ctx context.Context) (*findings.Book, error) {
	kv, err := s.bucket(ctx)
	if err != nil {
		return nil, err
	}
	book := findings.New()
	keys, err := kv.Keys(ctx)
	if err != nil && !errors.Is(err, jetstream.ErrNoKeysFound) {
		return nil, fmt.Errorf("read findings: %w", err)
	}
	for _, key := range keys {
		if !strings.HasPrefix(key, ledger.AuditFindingPrefix) {
			continue
		}
		e, err := kv.Get(ctx, key)
		if errors.Is(err, jetstream.ErrKeyNotFound) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", key, err)
		}
		var f findings.Finding
		if err := json.Unmarshal(e.Value(), &f); err != nil {
			return nil, fmt.Errorf("%s in bucket %s is no finding (delete it): %w", key, ledger.AuditBucket, err)
		}
		book.Restore(&f)
	}
	return book, nil
}

// publish stores what changed, and the status.
func (s *store) publish(ctx context.Context, status *Status, book *findings.Book) error {
	kv, err := s.bucket(ctx)
	if err != nil {
		return err
	}
	changed, removed := book.Changes()
	for _, f := range changed {
		data, err := json.Marshal(f)
		if err != nil {
			return fmt.Errorf("write a finding: %w", err)
		}
		if _, err := kv.Put(ctx, ledger.AuditFindingPrefix+f.ID, data); err != nil {
			return fmt.Errorf("write a finding: %w", err)
		}
		book.Saved(f.ID)
	}
	for _, id := range removed {
		if err := kv.Purge(ctx, ledger.AuditFindingPrefix+id); err != nil {
			return fmt.Errorf("forget a finding: %w", err)
		}
		book.Saved(id)
	}
	data, err := json.Marshal(status)
	if err != nil {
		return fmt.Errorf("write the audit's status: %w", err)
	}
	if _, err := kv.Put(ctx, ledger.AuditStatusKey, data); err != nil {
		return fmt.Errorf("write the audit's status: %w", err)
	}
	return nil
}
