// Package plans makes a plans file (package planfile) what the services enforce.
package plans

import "github.com/tollkeeper/tollkeeper/services/internal/plans/planfile"

// What the file says, under the names that its readers use.
type (
	Document = planfile.Document
	Plan     = planfile.Plan
	Limit    = planfile.Limit
	Filter   = planfile.Filter
	Lease    = planfile.Lease
	Account  = planfile.Account
	Key      = planfile.Key
	Problem  = planfile.Problem
	Error    = planfile.Error
	Diff     = planfile.Diff
	Index    = planfile.Index
)

// FormatVersion is the version of the file format.
const FormatVersion = planfile.FormatVersion

// HashKey returns what stands for an API key in the file: its SHA-256 in hex.
func HashKey(key string) string { return planfile.HashKey(key) }

// Parse reads a plans file (YAML or JSON); its errors are of type *Error.
func Parse(name string, data []byte) (*Document, error) { return planfile.Parse(name, data) }

// Check reports, as an *Error, what is wrong with a document.
func Check(doc *Document) error { return planfile.Check(doc) }

// Compare returns how next differs from before, which may be nil.
func Compare(before, next *Document) Diff { return planfile.Compare(before, next) }

// Merge returns a copy of doc in which every plan and account of extra stands,
// replacing the one with the same id.
func Merge(doc, extra *Document) *Document { return planfile.Merge(doc, extra) }

// Version identifies the content of a document.
func Version(d *Document) string { return planfile.Version(d) }

// PlansVersion identifies the plans of a document without its accounts.
func PlansVersion(d *Document) string { return planfile.PlansVersion(d) }

// NewIndex indexes a checked document.
func NewIndex(d *Document) Index { return planfile.NewIndex(d) }
