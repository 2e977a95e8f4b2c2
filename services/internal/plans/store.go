package plans

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/plans/internal/records"
	"github.com/tollkeeper/tollkeeper/services/internal/plans/planfile"
)

// Keys of the config bucket. A manifest names a document, whose gzipped JSON
// stands in chunks beside it, so that it may be larger than a message.
const (
	appliedKey     = "plans.applied"
	pendingKey     = "plans.pending"
	documentPrefix = "plans.document."

	chunkBytes = 512 << 10
	// orphanAge is after which a document that nobody names is removed: its
	// writer died before it could name it.
	orphanAge = 24 * time.Hour
	// readTries of a manifest whose document is replaced while it is read.
	readTries = 5
	readPause = 20 * time.Millisecond
)

// manifest is the value of appliedKey and pendingKey.
type manifest struct {
	Version      string `json:"version"`
	PlansVersion string `json:"plans_version"`
	Act          act    `json:"act"`
	// Base is the revision of appliedKey that the act was begun on.
	Base      uint64       `json:"base_revision"`
	AppliedAt usage.Micros `json:"applied_at_unix_micros,omitempty"`
	// DocumentID, Chunks name the document.
	DocumentID string `json:"document_id"`
	Chunks     int    `json:"chunks"`
}

// stored is a document with what must be remembered beside it.
type stored struct {
	Document *Document `json:"document"`
	// Closed accounts and their roots: one that is opened again must have
	// the same root.
	Closed map[string]string `json:"closed,omitempty"`
}

type store struct {
	js jetstream.JetStream
	kv jetstream.KeyValue
	// saved is the document that was written last, under that name: who has written it
	// need not read it back.
	saved   stored
	savedID string
}

func openStore(ctx context.Context, js jetstream.JetStream) (*store, error) {
	kv, err := js.KeyValue(ctx, ledger.ConfigBucket)
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", ledger.ConfigBucket, err)
	}
	return &store{js: js, kv: kv}, nil
}

// manifest returns the manifest under key, its revision and when the server
// stored it. The manifest is nil when there is none; the revision is 0 when there
// never was. The stream's leader is asked: a replica may lag, and what is decided
// on an old manifest does harm.
func (s *store) manifest(ctx context.Context, key string) (*manifest, uint64, time.Time, error) {
	ask, err := json.Marshal(map[string]string{"last_by_subj": "$KV." + ledger.ConfigBucket + "." + key})
	if err != nil {
		return nil, 0, time.Time{}, fmt.Errorf("read %s: %w", key, err)
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.js.Options().DefaultTimeout)
		defer cancel()
	}
	prefix := "$JS.API"
	switch o := s.js.Options(); {
	case o.APIPrefix != "":
		prefix = strings.TrimSuffix(o.APIPrefix, ".")
	case o.Domain != "":
		prefix = "$JS." + o.Domain + ".API"
	}
	reply, err := s.js.Conn().RequestWithContext(ctx, prefix+".STREAM.MSG.GET.KV_"+ledger.ConfigBucket, ask)
	if err != nil {
		return nil, 0, time.Time{}, fmt.Errorf("read %s: %w", key, err)
	}
	var answer struct {
		Error   *jetstream.APIError `json:"error"`
		Message struct {
			Sequence uint64    `json:"seq"`
			Header   []byte    `json:"hdrs"`
			Data     []byte    `json:"data"`
			Time     time.Time `json:"time"`
		} `json:"message"`
	}
	if err := json.Unmarshal(reply.Data, &answer); err != nil {
		return nil, 0, time.Time{}, fmt.Errorf("read %s: %w", key, err)
	}
	if answer.Error != nil {
		if answer.Error.ErrorCode == jetstream.JSErrCodeMessageNotFound {
			return nil, 0, time.Time{}, nil
		}
		return nil, 0, time.Time{}, fmt.Errorf("read %s: %w", key, answer.Error)
	}
	if bytes.Contains(answer.Message.Header, []byte("KV-Operation")) {
		return nil, answer.Message.Sequence, time.Time{}, nil // deleted
	}
	var m manifest
	if err := json.Unmarshal(answer.Message.Data, &m); err != nil {
		return nil, 0, time.Time{}, fmt.Errorf("read %s: %w", key, err)
	}
	return &m, answer.Message.Sequence, answer.Message.Time, nil
}

// put writes a manifest if the key still has the revision; ErrConflict if not.
func (s *store) put(ctx context.Context, key string, m *manifest, revision uint64) (uint64, error) {
	data, err := json.Marshal(m)
	if err != nil {
		return 0, fmt.Errorf("write %s: %w", key, err)
	}
	var rev uint64
	if revision == 0 {
		rev, err = s.kv.Create(ctx, key, data)
	} else {
		rev, err = s.kv.Update(ctx, key, data, revision)
	}
	if records.WrongSequence(err) || errors.Is(err, jetstream.ErrKeyExists) {
		return 0, ErrConflict
	}
	if err != nil {
		return 0, fmt.Errorf("write %s: %w", key, err)
	}
	return rev, nil
}

// begunMeanwhile returns the id of the act that another has begun, and perhaps
// completed, when we were about to begin m: ErrConflict if it is not the same.
func (s *store) begunMeanwhile(ctx context.Context, m *manifest) (string, error) {
	// In this order, because an act is first pending and then applied.
	for _, key := range []string{pendingKey, appliedKey} {
		other, _, _, err := s.manifest(ctx, key)
		if err != nil {
			return "", err
		}
		if other != nil && other.Version == m.Version && other.Base == m.Base {
			return other.Act.ID, nil
		}
	}
	return "", ErrConflict
}

func chunkKey(id string, n int) string { return documentPrefix + id + "." + strconv.Itoa(n) }

// save writes a document under a name of its own.
func (s *store) save(ctx context.Context, doc stored) (id string, chunks int, err error) {
	var buf bytes.Buffer
	z, err := gzip.NewWriterLevel(&buf, gzip.BestSpeed) // most of it are hashes
	if err != nil {
		return "", 0, fmt.Errorf("write plans: %w", err)
	}
	if err := json.NewEncoder(z).Encode(doc); err != nil {
		return "", 0, fmt.Errorf("write plans: %w", err)
	}
	if err := z.Close(); err != nil {
		return "", 0, fmt.Errorf("write plans: %w", err)
	}
	id = ksuid.New().String()
	for buf.Len() > 0 {
		if _, err := s.kv.Put(ctx, chunkKey(id, chunks), buf.Next(chunkBytes)); err != nil {
			return "", 0, fmt.Errorf("write plans: %w", err)
		}
		chunks++
	}
	s.saved, s.savedID = doc, id
	return id, chunks, nil
}

func (s *store) load(ctx context.Context, m *manifest) (stored, error) {
	if s.savedID != "" && m.DocumentID == s.savedID {
		return s.saved, nil
	}
	var buf bytes.Buffer
	for n := range m.Chunks {
		e, err := s.kv.Get(ctx, chunkKey(m.DocumentID, n))
		if err != nil {
			return stored{}, fmt.Errorf("read plans %s: %w", m.Version, err)
		}
		buf.Write(e.Value())
	}
	z, err := gzip.NewReader(&buf)
	if err != nil {
		return stored{}, fmt.Errorf("read plans %s: %w", m.Version, err)
	}
	// The bound is for a bucket that somebody else wrote to.
	data, err := io.ReadAll(io.LimitReader(z, 2*planfile.MaxFileBytes))
	if err != nil {
		return stored{}, fmt.Errorf("read plans %s: %w", m.Version, err)
	}
	var doc stored
	if err := json.Unmarshal(data, &doc); err != nil {
		return stored{}, fmt.Errorf("read plans %s: %w", m.Version, err)
	}
	if doc.Document == nil {
		return stored{}, fmt.Errorf("read plans %s: it is empty", m.Version)
	}
	return doc, nil
}

// read returns the manifest under key with its document.
func (s *store) read(ctx context.Context, key string) (*manifest, uint64, time.Time, stored, error) {
	for try := 1; ; try++ {
		m, rev, at, err := s.manifest(ctx, key)
		if err != nil || m == nil {
			return nil, rev, time.Time{}, stored{Document: &Document{Version: FormatVersion}}, err
		}
		doc, err := s.load(ctx, m)
		if err == nil {
			return m, rev, at, doc, nil
		}
		if try == readTries || !errors.Is(err, jetstream.ErrKeyNotFound) {
			return nil, 0, time.Time{}, stored{}, err
		}
		select {
		case <-time.After(readPause):
		case <-ctx.Done():
			return nil, 0, time.Time{}, stored{}, ctx.Err()
		}
	}
}

// abandon removes a pending act of which nothing was done.
func (s *store) abandon(ctx context.Context, m *manifest, rev uint64) error {
	if err := s.kv.Delete(ctx, pendingKey, jetstream.LastRevision(rev)); err != nil && !records.WrongSequence(err) {
		return fmt.Errorf("remove %s: %w", pendingKey, err)
	}
	return s.discard(ctx, m.DocumentID)
}

// discard removes a document.
func (s *store) discard(ctx context.Context, id string) error {
	stream, err := s.js.Stream(ctx, "KV_"+ledger.ConfigBucket)
	if err != nil {
		return fmt.Errorf("bucket %s: %w", ledger.ConfigBucket, err)
	}
	if err := stream.Purge(ctx, jetstream.WithPurgeSubject("$KV."+ledger.ConfigBucket+"."+documentPrefix+id+".*")); err != nil {
		return fmt.Errorf("remove old plans: %w", err)
	}
	return nil
}

// discardOrphans removes documents that nobody names and that are older than
// any act could be.
func (s *store) discardOrphans(ctx context.Context, now time.Time, named ...string) error {
	keys, err := s.kv.ListKeysFiltered(ctx, documentPrefix+">")
	if err != nil {
		return fmt.Errorf("list old plans: %w", err)
	}
	old := map[string]bool{}
	for key := range keys.Keys() {
		id, _, _ := strings.Cut(strings.TrimPrefix(key, documentPrefix), ".")
		if k, err := ksuid.Parse(id); err == nil && now.Sub(k.Time()) > orphanAge {
			old[id] = true
		}
	}
	for _, id := range named {
		delete(old, id)
	}
	for id := range old {
		if err := s.discard(ctx, id); err != nil {
			return err
		}
	}
	return nil
}
