// Package trace reads recorded traffic, row by row, in the formats that replay
// knows.
package trace

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Row is one recorded call.
type Row struct {
	Time    time.Time
	Account string
	// Key is an opaque name of the API key; empty when the trace has none.
	Key                  string
	Method, Route, Model string
	// Status the upstream answered; 0 when the trace does not say.
	Status int
	// Meters that the trace reports; a meter it does not report is absent.
	Meters []usage.Quantity
	// File and Line are where the row begins.
	File string
	Line int
}

// Reader gives the rows of a trace in file order.
type Reader interface {
	// Next returns the next row; io.EOF after the last. An error of type *RowError is
	// of one row, and the rows after it can be read; any other ends the trace.
	Next() (Row, error)
	// Line is the line of the row that was read last.
	Line() int
}

// RowError says why a row can't be replayed.
type RowError struct {
	File   string
	Line   int
	Column string // empty: the whole row
	Reason string
}

// Error names file, line, column and reason.
func (e *RowError) Error() string {
	if e.Column == "" {
		return fmt.Sprintf("%s:%d: %s", e.File, e.Line, e.Reason)
	}
	return fmt.Sprintf("%s:%d: column %s: %s", e.File, e.Line, e.Column, e.Reason)
}

// Bad is what was left out of a trace.
type Bad struct {
	Rows int
	// First of them, at most MaxBadShown.
	First []*RowError
}

// MaxBadShown bounds how many bad rows are kept for a person to read.
const MaxBadShown = 5

// LoadOptions bound a trace in memory.
type LoadOptions struct {
	// Most rows that are read.
	Most int
	// SkipBad leaves bad rows out and counts them; else the first ends the loading.
	SkipBad bool
}

// Load reads the rest of a trace behind rows and adds what it leaves out to bad.
func Load(r Reader, rows []Row, bad *Bad, o LoadOptions) ([]Row, error) {
	for {
		row, err := r.Next()
		if errors.Is(err, io.EOF) {
			return rows, nil
		}
		var wrong *RowError
		if errors.As(err, &wrong) && o.SkipBad {
			if bad.Rows++; len(bad.First) < MaxBadShown {
				bad.First = append(bad.First, wrong)
			}
			continue
		}
		if wrong != nil {
			return nil, fmt.Errorf("%w; --bad-rows skip leaves such rows out", err)
		}
		if err != nil {
			return nil, err
		}
		if len(rows) >= o.Most {
			return nil, fmt.Errorf("line %d: the trace has more than %d rows: raise --max-rows, or choose rows with --where", r.Line(), o.Most)
		}
		rows = append(rows, row)
	}
}

// Sort puts rows in order of time; rows of the same time stay as they are. It
// returns how many rows came later than one with a greater time.
func Sort(rows []Row) (unsorted int) {
	for i := 1; i < len(rows); i++ {
		if rows[i].Time.Before(rows[i-1].Time) {
			unsorted++
		}
	}
	if unsorted > 0 {
		slices.SortStableFunc(rows, func(a, b Row) int { return a.Time.Compare(b.Time) })
	}
	return unsorted
}
