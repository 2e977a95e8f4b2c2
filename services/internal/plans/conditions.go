package plans

import (
	"context"
	"fmt"

	"github.com/tollkeeper/tollkeeper/services/internal/plans/planfile"
)

// Removals says what becomes of accounts, keys, plans and limits that hold and that a
// document leaves out.
type Removals string

// What may become of them.
const (
	// Refuse changes nothing: it may be that the document does not know of them.
	Refuse Removals = "refuse"
	// Keep keeps them.
	Keep Removals = "keep"
	// Remove removes them. A removed account keeps its counters.
	Remove Removals = "remove"
)

// Conditions under which a document is applied.
type Conditions struct {
	// Base is the Applied.Version that the document was made from, and that must still
	// hold; nil: any.
	Base *string
	// Removals is Refuse when empty.
	Removals Removals
}

// RemovalError says that a document leaves out what holds, and that nobody has said that
// it is to be removed. Nothing was changed.
type RemovalError struct{ Totals planfile.Totals }

func (e *RemovalError) Error() string {
	return "it leaves out " + e.Totals.Removed() + " that hold now, and nothing was changed: say whether to remove or to keep them"
}

// ChangedError says that other plans hold than those that a document was made from.
// Nothing was changed.
type ChangedError struct {
	// Version and Author of those that hold.
	Version, Author string
}

func (e *ChangedError) Error() string {
	return fmt.Sprintf("%s has applied other plans meanwhile, and nothing was changed: look at what holds now, and apply again", orSomebody(e.Author))
}

// Unwrap makes it an ErrConflict.
func (e *ChangedError) Unwrap() error { return ErrConflict }

func orSomebody(author string) string {
	if author == "" {
		return "somebody"
	}
	return author
}

// decide returns the document that is to hold in place of now.
func (c Conditions) decide(now Applied, given *Document) (*Document, error) {
	switch {
	case now.Version == Version(given):
		return given, nil // asked for again by one who has not heard the answer
	case c.Base != nil && *c.Base != now.Version:
		return nil, &ChangedError{now.Version, now.Author}
	}
	switch c.Removals {
	case Remove:
		return given, nil
	case Keep:
		doc := planfile.Keep(now.Document, given)
		return doc, Check(doc)
	}
	if t := compareApplied(now, given).Totals; t.Removed() != "" {
		return nil, &RemovalError{t}
	}
	return given, nil
}

// PlanIf is Plan under conditions: what ApplyIf would change. With a *RemovalError the
// difference is told nevertheless.
func (a *Applier) PlanIf(ctx context.Context, doc *Document, c Conditions) (Diff, error) {
	now, err := a.before(ctx, doc)
	if err != nil {
		return Diff{}, err
	}
	wanted, err := c.decide(now, doc)
	if err != nil {
		return compareApplied(now, doc), err
	}
	return compareApplied(now, wanted), planfile.CheckMove(now.Document, now.closed, wanted)
}

// ApplyIf is Apply under conditions. Beside its errors there are *RemovalError and
// *ChangedError, after which nothing is changed.
func (a *Applier) ApplyIf(ctx context.Context, doc *Document, author string, c Conditions) (Diff, error) {
	watched, ctx, end := a.watched(ctx)
	diff, err := watched.apply(ctx, doc, author, c)
	return diff, end(err)
}

// ApplyKeeping makes all of doc hold beside what it leaves out, which is kept and told in
// words ("2 accounts, 1 key"; empty for none). What others apply meanwhile is kept too.
func (a *Applier) ApplyKeeping(ctx context.Context, doc *Document, author string) (diff Diff, kept string, err error) {
	diff, err = a.Change(ctx, author, func(now *Document) *Document {
		all := planfile.Keep(now, doc)
		kept = Compare(all, doc).Totals.Removed()
		return all
	})
	return diff, kept, err
}
