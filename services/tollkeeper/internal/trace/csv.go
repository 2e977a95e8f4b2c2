package trace

import (
	"bufio"
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// csvReader reads CSV with a header line.
type csvReader struct {
	file   string
	csv    *csv.Reader
	m      Mapping
	header []string
	line   int
	fields struct{ time, account, key, method, route, model, status field }
	meters []meterField
	where  []whereField
	texts  interner
}

// field is a column, or a text that every row has.
type field struct {
	name    string
	at      int // -1: literal
	literal string
}

type meterField struct {
	meter usage.Meter
	field
}

type whereField struct {
	field
	values []string
}

// interner keeps one copy of texts that recur.
type interner map[string]string

// mostTexts bounds how many texts are looked for; others are kept as they are.
const mostTexts = 1 << 17

func (t interner) keep(s string) string {
	if kept, ok := t[s]; ok {
		return kept
	}
	s = strings.Clone(s)
	if len(t) < mostTexts {
		t[s] = s
	}
	return s
}

// separators that a header line may have.
const separators = ",;\t|"

// NewCSV reads CSV with a header line; file is its name in errors. Columns that
// the mapping names and the header lacks are an error at once. The separator is
// the one that the header has most of.
func NewCSV(file string, r io.Reader, m Mapping) (Reader, error) {
	in := bufio.NewReaderSize(r, 1<<16)
	first, err := in.Peek(1 << 12)
	if len(first) == 0 {
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("%s: read the header line: %w", file, err)
		}
		return nil, fmt.Errorf("%s: the file is empty: it has no header line", file)
	}
	if first[0] == 0xff || first[0] == 0xfe || len(first) > 1 && first[1] == 0 {
		return nil, fmt.Errorf("%s: the file is not UTF-8 (it looks like UTF-16): convert it first", file)
	}
	if mark := []byte("\ufeff"); bytes.HasPrefix(first, mark) {
		first = first[len(mark):]
		if _, err := in.Discard(len(mark)); err != nil {
			return nil, fmt.Errorf("%s: read the header line: %w", file, err)
		}
	}
	c := &csvReader{file: file, csv: csv.NewReader(in), m: m, line: 1, texts: interner{}}
	c.csv.ReuseRecord = true
	head, _, _ := strings.Cut(strings.TrimLeft(string(first), "\r\n"), "\n")
	c.csv.Comma = rune(separators[0])
	for _, s := range separators[1:] {
		if strings.Count(head, string(s)) > strings.Count(head, string(c.csv.Comma)) {
			c.csv.Comma = s
		}
	}
	header, err := c.csv.Read()
	if err != nil {
		return nil, fmt.Errorf("%s: read the header line: %w", file, err)
	}
	for _, name := range header {
		c.header = append(c.header, strings.TrimSpace(name))
	}
	return c, c.find()
}

// find looks up the columns that the mapping names.
func (c *csvReader) find() (err error) {
	f, m := &c.fields, &c.m
	for _, x := range []struct {
		to   *field
		name string
	}{{&f.time, m.Time}, {&f.account, m.Account}, {&f.key, m.Key}, {&f.method, m.Method}, {&f.route, m.Route}, {&f.model, m.Model}, {&f.status, m.Status}} {
		if *x.to, err = c.column("--map", x.name); err != nil {
			return err
		}
	}
	for meter, column := range m.Meters {
		f, err := c.column("--map", column)
		if err != nil {
			return err
		}
		c.meters = append(c.meters, meterField{meter, f})
	}
	slices.SortFunc(c.meters, func(a, b meterField) int { return strings.Compare(string(a.meter), string(b.meter)) })
	for column, values := range m.Where {
		f, err := c.column("--where", column)
		if err != nil {
			return err
		}
		c.where = append(c.where, whereField{f, values})
	}
	return nil
}

// column finds a column by its name, or by its name in other case.
func (c *csvReader) column(flag, name string) (field, error) {
	if name == "" || name[0] == '=' && flag == "--map" {
		return field{at: -1, literal: strings.TrimPrefix(name, "=")}, nil
	}
	for _, same := range []func(a, b string) bool{func(a, b string) bool { return a == b }, strings.EqualFold} {
		found := field{name: name, at: -1}
		for i, h := range c.header {
			if !same(h, name) {
				continue
			}
			if found.at >= 0 {
				return field{}, fmt.Errorf("%s:1: %s names the column %q, which the file has twice", c.file, flag, name)
			}
			found.at = i
		}
		if found.at >= 0 {
			return found, nil
		}
	}
	return field{}, fmt.Errorf("%s:1: %s names the column %q, the file has %s", c.file, flag, name, strings.Join(c.header, ", "))
}

func (c *csvReader) Line() int { return c.line }

func (c *csvReader) Next() (Row, error) {
	for {
		record, err := c.csv.Read()
		if errors.Is(err, io.EOF) {
			return Row{}, io.EOF
		}
		var parse *csv.ParseError
		switch {
		case errors.As(err, &parse):
			c.line = parse.StartLine
			reason := parse.Err.Error()
			if errors.Is(err, csv.ErrFieldCount) {
				reason = fmt.Sprintf("the row has %d columns, the header has %d", len(record), len(c.header))
			}
			return Row{}, &RowError{File: c.file, Line: c.line, Reason: reason}
		case err != nil:
			return Row{}, fmt.Errorf("%s: after line %d: %w", c.file, c.line, err)
		}
		c.line, _ = c.csv.FieldPos(0)
		if c.keep(record) {
			return c.row(record)
		}
	}
}

func (c *csvReader) keep(record []string) bool {
	for _, w := range c.where {
		if !slices.Contains(w.values, record[w.at]) {
			return false
		}
	}
	return true
}

func (f *field) of(record []string) string {
	if f.at < 0 {
		return f.literal
	}
	return record[f.at]
}

func (c *csvReader) wrong(f *field, format string, args ...any) error {
	return &RowError{File: c.file, Line: c.line, Column: f.name, Reason: fmt.Sprintf(format, args...)}
}

func (c *csvReader) row(record []string) (Row, error) {
	f := &c.fields
	text := func(f *field) string {
		if f.at < 0 {
			return f.literal
		}
		return c.texts.keep(strings.TrimSpace(record[f.at]))
	}
	row := Row{Account: text(&f.account), Key: text(&f.key), Method: strings.ToUpper(text(&f.method)), Route: text(&f.route), Model: text(&f.model), File: c.file, Line: c.line}
	var err error
	if row.Time, err = c.m.Times.parse(f.time.of(record)); err != nil {
		return Row{}, c.wrong(&f.time, "%v", err)
	}
	switch {
	case row.Account == "":
		return Row{}, c.wrong(&f.account, "the account is empty")
	case len(row.Account) > MaxName || strings.ContainsFunc(row.Account, func(r rune) bool { return r < ' ' }):
		return Row{}, c.wrong(&f.account, "%.40q cannot name an account: at most %d bytes without control characters can", row.Account, MaxName)
	case !token(row.Method):
		return Row{}, c.wrong(&f.method, "%.40q is not an HTTP method", row.Method)
	}
	if s := strings.TrimSpace(f.status.of(record)); !missing(s) {
		n, ok := whole(s)
		if !ok || n < 200 || n > 599 {
			return Row{}, c.wrong(&f.status, "%q is not the status of an HTTP answer (200 to 599)", s)
		}
		row.Status = int(n)
	}
	for i := range c.meters {
		mf := &c.meters[i]
		s := strings.TrimSpace(mf.of(record))
		if missing(s) {
			continue // not reported is unknown, not 0
		}
		v, ok := whole(s)
		if !ok {
			return Row{}, c.wrong(&mf.field, "%q is not a count of %s: counts are whole numbers from 0 to %d", s, mf.meter, usage.MaxQuantity)
		}
		row.Meters = append(row.Meters, usage.Quantity{Meter: mf.meter, Value: v})
	}
	return row, nil
}

// MaxName bounds names of accounts in a trace: what a replay adds to them must fit too.
const MaxName = 160

// missing reports whether a text stands for a value that was not recorded.
func missing(s string) bool {
	switch strings.ToLower(s) {
	case "", "-", "null", "none", "nan", "na", "n/a", `\n`:
		return true
	}
	return false
}

// whole reads a count. A fraction of zeros is taken ("374.0"): programs that know
// missing values only among floats write whole numbers so.
func whole(s string) (int64, bool) {
	if i := strings.IndexByte(s, '.'); i > 0 && strings.Trim(s[i+1:], "0") == "" {
		s = s[:i]
	}
	v, err := strconv.ParseInt(s, 10, 64)
	return v, err == nil && v >= 0 && v <= usage.MaxQuantity && s[0] != '+'
}

// token reports whether a text can be an HTTP method; empty is the default.
func token(s string) bool {
	return len(s) <= 20 && strings.Trim(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZ-_") == ""
}
