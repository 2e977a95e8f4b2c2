package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/segmentio/ksuid"
)

// MaxBatch is how many messages an atomic batch may have.
const MaxBatch = 1000

// Headers of atomic batches (ADR-50) and of expectations.
const (
	batchIDHeader       = "Nats-Batch-Id"
	batchSequenceHeader = "Nats-Batch-Sequence"
	batchCommitHeader   = "Nats-Batch-Commit"
	expectLastSubject   = "Nats-Expected-Last-Subject-Sequence"
	expectSubject       = "Nats-Expected-Last-Subject-Sequence-Subject"
)

// APIError is a refusal by JetStream.
type APIError struct {
	Code        int    `json:"code"`
	ErrCode     int    `json:"err_code"`
	Description string `json:"description"`
}

func (e *APIError) Error() string { return fmt.Sprintf("%s (%d)", e.Description, e.ErrCode) }

// ErrStale says that somebody else has written since: the writer is not the
// owner any more.
var ErrStale = errors.New("another owner has written since")

// JetStream's codes for a failed expectation: with the sequence it found, and,
// while another write to the subject is under way, without.
const (
	errCodeWrongLastSequence        = 10071
	errCodeWrongLastSequenceUnknown = 10164
)

// ExpectLast makes a message conditional: it is stored only when the newest
// message of its subject has this sequence (0: there is none).
func ExpectLast(m *nats.Msg, sequence uint64) {
	if m.Header == nil {
		m.Header = nats.Header{}
	}
	m.Header.Set(expectLastSubject, strconv.FormatUint(sequence, 10))
}

// ExpectLastOf makes a message conditional on another subject of its stream: it
// is stored only when the newest message there has this sequence (0: there is
// none).
func ExpectLastOf(m *nats.Msg, subject string, sequence uint64) {
	ExpectLast(m, sequence)
	m.Header.Set(expectSubject, subject)
}

// PublishBatch stores messages of one stream all or none and returns the
// sequence of the last of them; the others stand directly before it. The
// stream must allow atomic batches; a message of another stream fails the
// whole. It sets headers of the messages, which must not be in use elsewhere.
// It returns ErrStale when an expectation of a message does not hold. Without
// a deadline of ctx it waits for 5 s. When it returns any other error the batch may or
// may not be stored: look before trying again.
func PublishBatch(ctx context.Context, nc *nats.Conn, msgs []*nats.Msg) (uint64, error) {
	if len(msgs) == 0 || len(msgs) > MaxBatch {
		return 0, fmt.Errorf("an atomic batch has 1 to %d messages, not %d", MaxBatch, len(msgs))
	}
	id := ksuid.New().String()
	for i, m := range msgs {
		if m.Header == nil {
			m.Header = nats.Header{}
		}
		m.Header.Set(batchIDHeader, id)
		m.Header.Set(batchSequenceHeader, strconv.Itoa(i+1))
		if i < len(msgs)-1 {
			m.Header.Del(batchCommitHeader)
			if err := nc.PublishMsg(m); err != nil {
				return 0, fmt.Errorf("publish batch: %w", err)
			}
		}
	}
	last := msgs[len(msgs)-1]
	last.Header.Set(batchCommitHeader, "1")
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
	}
	reply, err := nc.RequestMsgWithContext(ctx, last)
	if err != nil {
		return 0, fmt.Errorf("commit batch: %w", err)
	}
	var ack struct {
		Error *APIError `json:"error"`
		Seq   uint64    `json:"seq"`
		Batch string    `json:"batch"`
		Count int       `json:"count"`
	}
	if err := json.Unmarshal(reply.Data, &ack); err != nil {
		return 0, fmt.Errorf("commit batch: the acknowledgement is not JSON: %w", err)
	}
	if ack.Error != nil {
		if c := ack.Error.ErrCode; c == errCodeWrongLastSequence || c == errCodeWrongLastSequenceUnknown {
			return 0, fmt.Errorf("commit batch: %w: %w", ErrStale, ack.Error)
		}
		return 0, fmt.Errorf("commit batch: %w", ack.Error)
	}
	if ack.Batch != id || ack.Count != len(msgs) || ack.Seq == 0 {
		// A server older than 2.12 stores each message by itself.
		return 0, fmt.Errorf("commit batch: %d messages were sent as batch %s, acknowledged are %d as %q up to %d: the server knows no atomic batches", len(msgs), id, ack.Count, ack.Batch, ack.Seq)
	}
	return ack.Seq, nil
}
