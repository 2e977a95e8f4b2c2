package historian

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// boundary is the durable word on a lane's newest block. It stands before the
// block is sent; that the next one stands means that this one is in the history,
// and so does Done.
type boundary struct {
	From uint64 `json:"from"`
	To   uint64 `json:"to"`
	Rows int    `json:"rows"`
	// At is the stream's time of entry To in Unix microseconds, 0 when the entry
	// was not seen: a stream that has lost its end and grown again has another
	// entry there.
	At    usage.Micros `json:"at_unix_micros,omitempty"`
	Token string       `json:"token,omitempty"`
	Done  bool         `json:"done"`
	// Stream is which stream the positions are of, and Table which table the
	// rows went to: both may have been made anew.
	Stream string `json:"stream"`
	Table  string `json:"table"`
}

// committed is the newest position whose rows are known to be in the history.
func (b boundary) committed() uint64 {
	if b.Done {
		return b.To
	}
	return b.From - 1
}

// journal keeps a lane's boundary.
type journal interface {
	// load returns the newest boundary; false: there is none yet.
	load(ctx context.Context) (boundary, bool, error)
	// save replaces it by its writer only: errStale when somebody else has
	// written since load or the last save. When it returns any other error the
	// boundary may or may not be saved; saving it again is right.
	save(ctx context.Context, b boundary) error
}

var errStale = errors.New("another historian is at work on the same ledger: only one may be; this one stops")

// kvJournal is one key of the bucket historian.
type kvJournal struct {
	js       jetstream.JetStream
	key      string
	revision uint64
}

func (j *kvJournal) bucket(ctx context.Context) (jetstream.KeyValue, error) {
	kv, err := j.js.KeyValue(ctx, ledger.HistorianBucket)
	if err != nil {
		return nil, fmt.Errorf("bucket %s: %w", ledger.HistorianBucket, err)
	}
	return kv, nil
}

func (j *kvJournal) load(ctx context.Context) (boundary, bool, error) {
	kv, err := j.bucket(ctx)
	if err != nil {
		return boundary{}, false, err
	}
	e, err := kv.Get(ctx, j.key)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		j.revision = 0
		return boundary{}, false, nil
	}
	if err != nil {
		return boundary{}, false, fmt.Errorf("read boundary %s: %w", j.key, err)
	}
	var b boundary
	if err := json.Unmarshal(e.Value(), &b); err != nil || b.From == 0 || b.To+1 < b.From {
		return boundary{}, false, &fatalError{fmt.Errorf("boundary %s in bucket %s is %q, which is not one (%v): restore it, or purge the key and empty the tables to write the history anew", j.key, ledger.HistorianBucket, e.Value(), err)}
	}
	j.revision = e.Revision()
	return b, true, nil
}

func (j *kvJournal) save(ctx context.Context, b boundary) error {
	kv, err := j.bucket(ctx)
	if err != nil {
		return err
	}
	value, err := json.Marshal(b)
	if err != nil {
		return fmt.Errorf("write boundary %s: %w", j.key, err)
	}
	revision, err := kv.Update(ctx, j.key, value, j.revision)
	if err == nil {
		j.revision = revision
		return nil
	}
	var api *jetstream.APIError
	if !errors.Is(err, jetstream.ErrKeyExists) && (!errors.As(err, &api) || api.ErrorCode != jetstream.JSErrCodeStreamWrongLastSequence) {
		return fmt.Errorf("write boundary %s: %w", j.key, err)
	}
	// Somebody has written: it may have been ourselves, a moment ago, when the
	// answer was lost.
	e, gerr := kv.Get(ctx, j.key)
	if gerr != nil {
		return fmt.Errorf("write boundary %s: %w", j.key, errors.Join(err, gerr))
	}
	if string(e.Value()) != string(value) {
		return &fatalError{errStale}
	}
	j.revision = e.Revision()
	return nil
}

// fatalError is what trying again won't mend.
type fatalError struct{ err error }

func (e *fatalError) Error() string { return e.err.Error() }
func (e *fatalError) Unwrap() error { return e.err }

// snapshots keeps the fold of the ledger.
type snapshots interface {
	// Load returns what was stored, newest first, undamaged or not.
	Load(ctx context.Context) ([][]byte, error)
	// Save stores one more and may forget the oldest.
	Save(ctx context.Context, data []byte) error
}
