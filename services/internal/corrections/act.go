// Package corrections brings compensating entries into the ledger: usage that a
// producer reported wrongly, twice or not at all. An act has an identity, and the
// same one twice is one.
package corrections

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

// Bounds of an act.
const (
	// MaxAdjustments are the meters that one act may correct.
	MaxAdjustments = 16 // as in pkg/quota
	// MaxAmount is the most that one act may add to or take off a meter.
	MaxAmount = usage.MaxQuantity
	// MaxReasonBytes and MaxReferenceBytes bound the texts.
	MaxReasonBytes    = 1024
	MaxReferenceBytes = 512
	// MaxAhead is how far ahead of this machine's clock the corrected usage may be.
	MaxAhead = time.Minute
)

// earliest is before any usage there can be.
var earliest = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// Act is a correction as somebody asks for it.
type Act struct {
	// ID is the identity of the act: a ksuid made when it is first asked for.
	ID ksuid.KSUID
	// Author is who asks.
	Author string
	// Account whose own usage is corrected; those above it are with it.
	Account string
	// Time of the usage; it says which windows it belongs to.
	Time time.Time
	// Model, Route and Method that the usage had: limits with a filter look at them.
	Model, Route, Method string
	// Adjustments by meter, signed.
	Adjustments map[usage.Meter]int64
	// Reason is why, for people; Reference what is corrected, where that is known.
	Reason, Reference string
}

// Machine codes of an Error.
const (
	CodeInvalid        = "INVALID_CORRECTION" // the act itself can't be meant
	CodeUnknownAccount = "UNKNOWN_ACCOUNT"
	CodeUnknownMeter   = "UNKNOWN_METER"
	CodeTooLarge       = "CORRECTION_TOO_LARGE" // more is taken off than was used
	CodeConflict       = "CORRECTION_CONFLICT"  // its id stands for another act
)

// Error is an act that was refused. Nothing was changed.
type Error struct {
	Code string
	// Field of the act that is wrong.
	Field string
	// Message says what is wrong and what to do.
	Message string
}

func (e *Error) Error() string { return e.Message }

func refused(code, field, format string, args ...any) *Error {
	return &Error{Code: code, Field: field, Message: fmt.Sprintf(format, args...)}
}

// Check reports, as an *Error, what is wrong with an act by itself. now is this
// machine's clock, horizon how long the ledger remembers acts.
func (a *Act) Check(now time.Time, horizon time.Duration) error {
	if err := a.checkTexts(); err != nil {
		return err
	}
	if a.Account == quota.OverflowAccount {
		return refused(CodeUnknownAccount, "account", "%q is where calls of too many unknown accounts are counted: whose they were nobody can tell", a.Account)
	}
	if len(a.Adjustments) == 0 {
		return refused(CodeInvalid, "adjustments", "the correction changes no meter: say what is to be added or taken off, such as calls=-3")
	}
	if len(a.Adjustments) > MaxAdjustments {
		return refused(CodeInvalid, "adjustments", "%d meters: one correction changes at most %d, use several", len(a.Adjustments), MaxAdjustments)
	}
	for _, m := range slices.Sorted(maps.Keys(a.Adjustments)) {
		n := a.Adjustments[m]
		switch {
		case !m.Valid():
			return refused(CodeUnknownMeter, "adjustments", "%q cannot name a meter: use letters, digits, '_', '.', '-', at most 64", m)
		case n == 0:
			return refused(CodeInvalid, "adjustments", "%s is corrected by 0: leave it out", m)
		case n > MaxAmount || n < -MaxAmount:
			return refused(CodeTooLarge, "adjustments", "%s is corrected by %d: at most %d either way is possible", m, n, MaxAmount)
		}
	}
	switch {
	case a.Time.After(now.Add(MaxAhead)):
		return refused(CodeInvalid, "time", "the usage is of %s, which is in the future: nothing can have been used then", a.Time.UTC().Format(time.RFC3339))
	case a.Time.Before(earliest):
		return refused(CodeInvalid, "time", "the usage is of %s: say when it was used, not before %d", a.Time.UTC().Format(time.RFC3339), earliest.Year())
	case a.ID == ksuid.Nil:
		return refused(CodeInvalid, "id", "the correction has no id")
	case a.ID.Time().After(now.Add(MaxAhead)):
		return refused(CodeInvalid, "id", "the id is of %s, which is in the future: make a new ksuid", a.ID.Time().UTC().Format(time.RFC3339))
	case now.Sub(a.ID.Time()) >= horizon:
		return refused(CodeInvalid, "id", "the id is of %s, and an act is remembered for %s: whether it was done already can't be said. Look for it among the account's corrections, and use a new id if it was not", a.ID.Time().UTC().Format(time.RFC3339), horizon)
	}
	return nil
}

func (a *Act) checkTexts() *Error {
	for _, f := range [...]struct {
		name, text string
		most       int
		needed     bool
		missing    string
	}{
		{"account", a.Account, usage.MaxIDBytes, true, "say whose usage is corrected"},
		{"author", a.Author, usage.MaxIDBytes, true, "say who corrects"},
		{"reason", a.Reason, MaxReasonBytes, true, "say why, for those who will read it later"},
		{"reference", a.Reference, MaxReferenceBytes, false, ""},
		{"model", a.Model, usage.MaxNameBytes, false, ""},
		{"route", a.Route, usage.MaxNameBytes, false, ""},
		{"method", a.Method, usage.MaxNameBytes, false, ""},
	} {
		switch {
		case f.needed && strings.TrimSpace(f.text) == "":
			return refused(CodeInvalid, f.name, "the correction has no %s: %s", f.name, f.missing)
		case len(f.text) > f.most:
			return refused(CodeInvalid, f.name, "the %s has %d bytes: use at most %d", f.name, len(f.text), f.most)
		case !utf8.ValidString(f.text) || strings.ContainsFunc(f.text, unicode.IsControl):
			return refused(CodeInvalid, f.name, "the %s has characters that are no text: use one line of plain text", f.name)
		}
	}
	return nil
}

// entry is the act as it stands in the ledger: the same act gives the same entry.
func (a *Act) entry(now time.Time) *tollkeeperv1.ControlEntry {
	c := &tollkeeperv1.Correction{
		Account: a.Account, TimeUnixMicros: a.Time.UnixMicro(), Model: a.Model, Route: a.Route, Method: a.Method, Reason: a.Reason, Reference: a.Reference,
	}
	for _, m := range slices.Sorted(maps.Keys(a.Adjustments)) {
		c.Adjustments = append(c.Adjustments, &tollkeeperv1.Quantity{Meter: string(m), Value: a.Adjustments[m]})
	}
	return &tollkeeperv1.ControlEntry{
		Id: a.ID.String(), Author: a.Author, CreatedAtUnixMicros: now.UnixMicro(),
		Body: &tollkeeperv1.ControlEntry_Correction{Correction: c},
	}
}

// same reports whether an entry of the ledger is this act. Who asks, and the time
// when none was said, may differ between two tries.
func (a *Act) same(e *tollkeeperv1.ControlEntry, timed bool) bool {
	c := e.GetCorrection()
	if c == nil {
		return false
	}
	if c.GetAccount() != a.Account || c.GetModel() != a.Model || c.GetRoute() != a.Route || c.GetMethod() != a.Method ||
		c.GetReason() != a.Reason || c.GetReference() != a.Reference || timed && c.GetTimeUnixMicros() != a.Time.UnixMicro() ||
		len(c.GetAdjustments()) != len(a.Adjustments) {
		return false
	}
	for _, q := range c.GetAdjustments() {
		if n, ok := a.Adjustments[usage.Meter(q.GetMeter())]; !ok || n != q.GetValue() {
			return false
		}
	}
	return true
}

// ErrCounting is wrapped by errors that say that the counters could not be asked.
var ErrCounting = errors.New("counting does not answer")
