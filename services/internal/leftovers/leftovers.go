// Package leftovers removes from an object bucket what nobody can find any more.
//
// An object is chunks under a number of its own, and a name that points to them,
// written last. Who is killed while storing one leaves chunks without a name; who is
// killed while replacing or deleting one leaves those of the old; and a deleted
// object's name stays for ever, as a mark that it was deleted. Nobody else removes
// any of it, and the bucket is bounded: full, it would take no more snapshots.
package leftovers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

// Age is how long nothing may have been added to chunks without a name before they
// are taken for left behind. Every upload in this program is given up far sooner, so
// those of one that is under way stay, whoever makes it: the time of a newer chunk
// is that of the whole. It is measured by the server's clock, and bounds also how far
// apart the clocks of its nodes may be.
const Age = 15 * time.Minute

// Most is how many uploads and how many names are removed at once.
const Most = 1000

// Swept is what was removed.
type Swept struct {
	Uploads int // with all their chunks
	Names   int // of deleted objects
}

// Sweep removes from a bucket the chunks without a name, and the names of deleted
// objects, to which nothing was added for the given time (Age). It asks the stream's
// leader for all it decides on, and can be run by several at the same time. What was
// removed before an error is returned with it.
func Sweep(ctx context.Context, js jetstream.JetStream, bucket string, age time.Duration) (Swept, error) {
	return sweep(ctx, js, bucket, func(now time.Time) time.Time { return now.Add(-age) })
}

// sweep removes what is older than a time that follows from the server's.
func sweep(ctx context.Context, js jetstream.JetStream, bucket string, before func(time.Time) time.Time) (Swept, error) {
	var out Swept
	name := "OBJ_" + bucket
	stream, err := js.Stream(ctx, name)
	if err != nil {
		return out, fmt.Errorf("stream %s: %w", name, err)
	}
	// Chunks first: what gets its name meanwhile has one below.
	chunks, now, err := subjects(ctx, stream, "$O."+bucket+".C.")
	if err != nil {
		return out, err
	}
	names, _, err := subjects(ctx, stream, "$O."+bucket+".M.")
	if err != nil {
		return out, err
	}
	old := before(now)
	named := make(map[string]bool, len(names))
	for _, subject := range names {
		m, found, err := ledger.LastMessage(ctx, js, name, subject)
		if err != nil {
			return out, err
		}
		if !found {
			continue // somebody else has swept
		}
		var info struct {
			NUID    string `json:"nuid"`
			Deleted bool   `json:"deleted"`
		}
		if err := json.Unmarshal(m.Data, &info); err != nil {
			// What it points to is not known, so nothing may be taken for unnamed.
			return out, fmt.Errorf("%s in stream %s names no object: %w", subject, name, err)
		}
		if !info.Deleted {
			named[info.NUID] = true
			continue
		}
		if m.Time.Before(old) && out.Names < Most {
			// Not one that has just been given to a new object.
			if err := stream.Purge(ctx, jetstream.WithPurgeSubject(subject), jetstream.WithPurgeSequence(m.Sequence+1)); err != nil {
				return out, fmt.Errorf("forget a deleted object in stream %s: %w", name, err)
			}
			out.Names++
		}
	}
	for _, subject := range chunks {
		if named[subject[strings.LastIndexByte(subject, '.')+1:]] || out.Uploads == Most {
			continue
		}
		m, found, err := ledger.LastMessage(ctx, js, name, subject)
		if err != nil {
			return out, err
		}
		if !found || !m.Time.Before(old) {
			continue
		}
		if err := stream.Purge(ctx, jetstream.WithPurgeSubject(subject)); err != nil {
			return out, fmt.Errorf("remove chunks in stream %s: %w", name, err)
		}
		out.Uploads++
	}
	return out, nil
}

// subjects returns the subjects of a stream with a prefix, in order, and the server's
// time.
func subjects(ctx context.Context, stream jetstream.Stream, prefix string) ([]string, time.Time, error) {
	info, err := stream.Info(ctx, jetstream.WithSubjectFilter(prefix+">"))
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("what stream %s holds: %w", stream.CachedInfo().Config.Name, err)
	}
	if info.TimeStamp.IsZero() {
		return nil, time.Time{}, errors.New("the server does not say what time it is: it is older than NATS 2.10")
	}
	return slices.Sorted(maps.Keys(info.State.Subjects)), info.TimeStamp, nil
}
