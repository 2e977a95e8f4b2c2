// Package records writes a plans document into the directory's bucket, so that what
// gateways see meanwhile always fits together, and so that one who was paused and
// overtaken can't write over those who came after.
package records

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/ledger/directory"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/internal/plans/planfile"
)

const (
	// singleReads is up to how many records' revisions are read one by one.
	singleReads = 64
	// inFlight bounds the records that are written and not yet acknowledged.
	inFlight = 64
	// tries bounds how often a record is written that somebody else wrote meanwhile:
	// one whom we have overtaken does so until it notices.
	tries = 20
)

// Writer writes the records of an act.
type Writer struct {
	JS jetstream.JetStream
	// Renew fails when the act is not ours to perform any more.
	Renew func(ctx context.Context) error
	// Advance counts acknowledged records, and renews when it is time to.
	Advance func(ctx context.Context, stored int) error
	// Step is called between the steps.
	Step func(name string) error
	// Conflict is the error when others go on writing the same records.
	Conflict error
}

// Change is a record that gets another value, if its key still has the revision.
type Change struct {
	stage    stage
	key      string
	value    []byte
	revision uint64
}

// stage is when a record is written: a stage begins when the one before is through.
// What is added comes first and what is removed goes last, so that a key never leads
// to an account without a record, nor an account to a plan without one.
type stage uint8

const (
	addPlans stage = iota
	addAccounts
	setKeys
	removeAccounts
	removePlans
)

// Of returns all records of a checked document, by KV key.
func Of(doc *planfile.Document) (map[string][]byte, error) {
	plans := make([]usage.Plan, len(doc.Plans))
	for i := range doc.Plans {
		plans[i] = doc.Plans[i].Usage()
	}
	accounts := make([]directory.Account, len(doc.Accounts))
	var keys []directory.Key
	for i := range doc.Accounts {
		a := &doc.Accounts[i]
		accounts[i] = directory.Account{ID: a.ID, Parent: a.Parent, Plan: a.Plan}
		for _, k := range a.Keys {
			key := directory.Key{ID: k.ID, Account: a.ID}
			if n, err := hex.Decode(key.Hash[:], []byte(k.SHA256)); err != nil || n != len(key.Hash) {
				return nil, fmt.Errorf("key %q of account %q has no SHA-256 in hex", k.ID, a.ID)
			}
			keys = append(keys, key)
		}
	}
	records, err := directory.Records(plans, accounts, keys)
	if err != nil {
		return nil, err
	}
	for key, value := range records {
		if len(value) > directory.MaxRecordBytes {
			return nil, fmt.Errorf("record %s of the directory would have %d bytes, and %d fit: use shorter ids", key, len(value), directory.MaxRecordBytes)
		}
	}
	return records, nil
}

// stages returns what must be written to get from one document to another, in order.
func stages(before, next *planfile.Document) ([]Change, error) {
	old, err := Of(before)
	if err != nil {
		return nil, err
	}
	want, err := Of(next)
	if err != nil {
		return nil, err
	}
	// Both has all of next, and of before what next has not.
	both := want
	if len(before.Plans)+len(before.Accounts) > 0 {
		if both, err = Of(planfile.Merge(before, next)); err != nil {
			return nil, err
		}
	}
	var out []Change
	add := func(kind directory.Kind, s stage, from, to map[string][]byte) {
		first := len(out)
		for _, all := range []map[string][]byte{from, to} {
			for key := range all {
				if k, _ := directory.ParseKey(key); k != kind || bytes.Equal(from[key], to[key]) {
					continue
				}
				out = append(out, Change{stage: s, key: key, value: to[key]})
			}
		}
		slices.SortFunc(out[first:], func(a, b Change) int { return bytes.Compare([]byte(a.key), []byte(b.key)) })
		out = slices.CompactFunc(out, func(a, b Change) bool { return a.stage == b.stage && a.key == b.key })
	}
	add(directory.Plans, addPlans, old, both)
	add(directory.AccountsPart, addAccounts, old, both)
	add(directory.KeysPart, setKeys, old, want)
	add(directory.AccountsPart, removeAccounts, both, want)
	add(directory.Plans, removePlans, both, want)
	return out, nil
}

// Changes returns what has to be written to get from one document to another, with the
// revisions that the records have now. Also what has its value already is written: it
// must not fit the revision of one whom we have overtaken.
func (w *Writer) Changes(ctx context.Context, before, next *planfile.Document) ([]Change, error) {
	changes, err := stages(before, next)
	if err != nil {
		return nil, err
	}
	return changes, w.readRevisions(ctx, changes)
}

// readRevisions sets the revisions that the records have now.
func (w *Writer) readRevisions(ctx context.Context, changes []Change) error {
	now := make(map[string]uint64)
	for i := range changes {
		now[changes[i].key] = 0
	}
	if err := w.revisions(ctx, now); err != nil {
		return err
	}
	for i := range changes {
		changes[i].revision = now[changes[i].key]
	}
	return nil
}

func (w *Writer) revisions(ctx context.Context, of map[string]uint64) error {
	if len(of) <= singleReads {
		stream, err := w.JS.Stream(ctx, "KV_"+ledger.DirectoryBucket)
		if err != nil {
			return fmt.Errorf("bucket %s: %w", ledger.DirectoryBucket, err)
		}
		// Not kv.Get: it does not tell the revision of a deleted key.
		for key := range of {
			m, err := stream.GetLastMsgForSubject(ctx, "$KV."+ledger.DirectoryBucket+"."+key)
			if errors.Is(err, jetstream.ErrMsgNotFound) {
				continue
			}
			if err != nil {
				return fmt.Errorf("read the directory: %w", err)
			}
			of[key] = m.Sequence
		}
		return nil
	}
	kv, err := w.JS.KeyValue(ctx, ledger.DirectoryBucket)
	if err != nil {
		return fmt.Errorf("bucket %s: %w", ledger.DirectoryBucket, err)
	}
	all, err := kv.WatchAll(ctx, jetstream.MetaOnly())
	if err != nil {
		return fmt.Errorf("read the directory: %w", err)
	}
	defer func() { _ = all.Stop() }() // all was read, or the error is told
	for {
		select {
		case e, ok := <-all.Updates():
			if !ok {
				return errors.New("read the directory: the connection was lost meanwhile")
			}
			if e == nil {
				return nil
			}
			if _, wanted := of[e.Key()]; wanted {
				of[e.Key()] = e.Revision()
			}
			if err := w.Advance(ctx, 0); err != nil {
				return err
			}
		case <-ctx.Done():
			return fmt.Errorf("read the directory: %w", ctx.Err())
		}
	}
}

// Write writes changes, stage by stage, and waits for every acknowledgement of a stage
// before the next begins.
func (w *Writer) Write(ctx context.Context, all []Change) error {
	if err := w.Step("records"); err != nil {
		return err
	}
	written := map[string]uint64{} // a record may be written in two stages
	for len(all) > 0 {
		n := 1
		for n < len(all) && all[n].stage == all[0].stage {
			n++
		}
		part := all[:n]
		all = all[n:]
		for i := range part {
			if at, ok := written[part[i].key]; ok {
				part[i].revision = at
			}
		}
		for try := 1; ; try++ {
			refused, err := w.writeStage(ctx, part, written)
			if err != nil {
				return err
			}
			if len(refused) == 0 {
				break
			}
			if try == tries {
				return w.Conflict
			}
			// They are ours to write, because the act still is ours after their
			// revisions were read.
			if err := w.readRevisions(ctx, refused); err != nil {
				return err
			}
			if err := w.Renew(ctx); err != nil {
				return err
			}
			part = refused
		}
	}
	return nil
}

// writeStage writes records in any order and returns those that somebody else has
// written meanwhile, when every other one is acknowledged.
func (w *Writer) writeStage(ctx context.Context, part []Change, written map[string]uint64) (refused []Change, err error) {
	type sent struct {
		Change
		ack jetstream.PubAckFuture
	}
	var flight []sent // oldest first
	next, answered := 0, 0
	for answered < len(part) {
		if next < len(part) && len(flight) < inFlight {
			ack, err := w.send(&part[next])
			if err != nil {
				return nil, err
			}
			flight = append(flight, sent{part[next], ack})
			next++
			continue
		}
		first, stored := flight[0], 0
		flight = flight[1:]
		select {
		case ack := <-first.ack.Ok():
			stored = 1
			written[first.key] = ack.Sequence
		case err := <-first.ack.Err():
			if !WrongSequence(err) {
				return nil, fmt.Errorf("write the directory: %w", err)
			}
			if len(refused) == 0 {
				// If we are the one who was overtaken, this is the end of it.
				if err := w.Renew(ctx); err != nil {
					return nil, err
				}
			}
			refused = append(refused, first.Change)
		case <-ctx.Done():
			return nil, fmt.Errorf("write the directory: %w", ctx.Err())
		}
		answered++
		if err := w.Advance(ctx, stored); err != nil {
			return nil, err
		}
		if answered%inFlight == 0 || answered == len(part) {
			if err := w.Step("record"); err != nil {
				return nil, err
			}
		}
	}
	return refused, nil
}

func (w *Writer) send(c *Change) (jetstream.PubAckFuture, error) {
	msg := &nats.Msg{Subject: "$KV." + ledger.DirectoryBucket + "." + c.key, Data: c.value, Header: nats.Header{}}
	ledger.ExpectLast(msg, c.revision)
	ack, err := w.JS.PublishMsgAsync(msg)
	if err != nil {
		return nil, fmt.Errorf("write the directory: %w", err)
	}
	return ack, nil
}

// WrongSequence reports whether JetStream refused because somebody else has written
// since.
func WrongSequence(err error) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && (api.ErrorCode == 10071 || api.ErrorCode == 10164)
}
