// Package trace reads recorded traffic, row by row, in the formats that replay
// knows.
package trace

import (
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
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
}

// Reader gives the rows of a trace in file order.
type Reader interface {
	// Next returns the next row; io.EOF after the last. An error that is not
	// io.EOF names file and line.
	Next() (Row, error)
	// Line is the line of the row that was read last.
	Line() int
}

// Mapping says which column of a CSV file holds what. A value that begins with
// "=" is a literal for every row.
type Mapping struct {
	Time, Account, Key, Method, Route, Model, Status string
	// Meters by name.
	Meters map[usage.Meter]string
	// TimeLayout is a layout of package time, or "unix", "unix_ms"; empty
	// tries RFC 3339 and "2006-01-02 15:04:05.999999999" (UTC).
	TimeLayout string
	// Where keeps only rows whose column has this value.
	Where map[string]string
}

// ParseMapping reads "time=TIMESTAMP,account==conv,meter.input_tokens=Context".
func ParseMapping(fields []string) (Mapping, error) {
	m := Mapping{Meters: map[usage.Meter]string{}, Where: map[string]string{}}
	for _, f := range fields {
		name, column, ok := strings.Cut(f, "=")
		if !ok || name == "" || column == "" {
			return m, fmt.Errorf("--map %q: write FIELD=COLUMN, or FIELD==VALUE for the same value in every row", f)
		}
		switch name {
		case "time":
			m.Time = column
		case "account":
			m.Account = column
		case "key":
			m.Key = column
		case "method":
			m.Method = column
		case "route":
			m.Route = column
		case "model":
			m.Model = column
		case "status":
			m.Status = column
		default:
			meter, ok := strings.CutPrefix(name, "meter.")
			if !ok {
				return m, fmt.Errorf("--map %q: FIELD is time, account, key, method, route, model, status or meter.NAME", f)
			}
			if !usage.Meter(meter).Valid() {
				return m, fmt.Errorf("--map %q: %q cannot name a meter: use letters, digits, '_', '.', '-'", f, meter)
			}
			m.Meters[usage.Meter(meter)] = column
		}
	}
	if m.Time == "" {
		return m, errors.New("--map lacks time=COLUMN: a replay needs to know when each call was")
	}
	if m.Account == "" {
		return m, errors.New("--map lacks account=COLUMN (or account==NAME for one account)")
	}
	return m, nil
}

// ParseWhere adds "COLUMN=VALUE" filters to the mapping.
func (m *Mapping) ParseWhere(filters []string) error {
	for _, f := range filters {
		column, value, ok := strings.Cut(f, "=")
		if !ok || column == "" {
			return fmt.Errorf("--where %q: write COLUMN=VALUE", f)
		}
		m.Where[column] = value
	}
	return nil
}

// AzureMapping is the layout of the Azure LLM inference traces of 2023: time
// and two token counts. They hold no accounts: each file is one.
func AzureMapping(file string) Mapping {
	name := strings.TrimSuffix(filepath.Base(file), filepath.Ext(file))
	name = strings.TrimPrefix(name, "AzureLLMInferenceTrace_")
	return Mapping{
		Time: "TIMESTAMP", Account: "=azure-" + name, Model: "=azure-" + name, Method: "=POST", Route: "=chat",
		Meters: map[usage.Meter]string{usage.InputTokens: "ContextTokens", usage.OutputTokens: "GeneratedTokens"},
	}
}

// csvReader reads CSV with a header line.
type csvReader struct {
	file  string
	csv   *csv.Reader
	m     Mapping
	index map[string]int
	line  int
	meter []meterColumn
}

type meterColumn struct {
	meter  usage.Meter
	column string
}

// NewCSV reads CSV with a header line; file is its name in errors. Columns that
// the mapping names and the header lacks are an error at once.
func NewCSV(file string, r io.Reader, m Mapping) (Reader, error) {
	c := &csvReader{file: file, csv: csv.NewReader(r), m: m, index: map[string]int{}}
	c.csv.ReuseRecord = true
	header, err := c.csv.Read()
	if err != nil {
		return nil, fmt.Errorf("%s: read the header line: %w", file, err)
	}
	for i, name := range header {
		c.index[strings.TrimPrefix(strings.TrimSpace(name), "\ufeff")] = i
	}
	c.line = 1
	wanted := []string{m.Time, m.Account, m.Key, m.Method, m.Route, m.Model, m.Status}
	for meter, column := range m.Meters {
		wanted = append(wanted, column)
		c.meter = append(c.meter, meterColumn{meter, column})
	}
	slices.SortFunc(c.meter, func(a, b meterColumn) int { return strings.Compare(string(a.meter), string(b.meter)) })
	for column := range m.Where {
		if _, ok := c.index[column]; !ok {
			return nil, fmt.Errorf("%s:1: --where names the column %q, the file has %s", file, column, strings.Join(header, ", "))
		}
	}
	for _, column := range wanted {
		if column == "" || column[0] == '=' {
			continue
		}
		if _, ok := c.index[column]; !ok {
			return nil, fmt.Errorf("%s:1: --map names the column %q, the file has %s", file, column, strings.Join(header, ", "))
		}
	}
	return c, nil
}

func (c *csvReader) Line() int { return c.line }

func (c *csvReader) Next() (Row, error) {
	for {
		record, err := c.csv.Read()
		if errors.Is(err, io.EOF) {
			return Row{}, io.EOF
		}
		if err != nil {
			return Row{}, fmt.Errorf("%s: %w", c.file, err)
		}
		c.line, _ = c.csv.FieldPos(0)
		if c.keep(record) {
			return c.row(record)
		}
	}
}

func (c *csvReader) keep(record []string) bool {
	for column, value := range c.m.Where {
		if record[c.index[column]] != value {
			return false
		}
	}
	return true
}

func (c *csvReader) get(record []string, column string) string {
	if column == "" {
		return ""
	}
	if column[0] == '=' {
		return column[1:]
	}
	return strings.Clone(record[c.index[column]])
}

func (c *csvReader) row(record []string) (Row, error) {
	row := Row{
		Account: c.get(record, c.m.Account), Key: c.get(record, c.m.Key), Method: c.get(record, c.m.Method),
		Route: c.get(record, c.m.Route), Model: c.get(record, c.m.Model),
	}
	var err error
	if row.Time, err = parseTime(c.get(record, c.m.Time), c.m.TimeLayout); err != nil {
		return Row{}, fmt.Errorf("%s:%d: %w", c.file, c.line, err)
	}
	if row.Account == "" {
		return Row{}, fmt.Errorf("%s:%d: the account is empty", c.file, c.line)
	}
	if s := c.get(record, c.m.Status); s != "" {
		if row.Status, err = strconv.Atoi(s); err != nil || row.Status < 100 || row.Status > 599 {
			return Row{}, fmt.Errorf("%s:%d: %q is not an HTTP status", c.file, c.line, s)
		}
	}
	for _, mc := range c.meter {
		s := c.get(record, mc.column)
		if s == "" {
			continue // not reported is unknown, not 0
		}
		v, err := strconv.ParseInt(s, 10, 64)
		if err != nil || v < 0 {
			return Row{}, fmt.Errorf("%s:%d: %s is %q, which is not a count", c.file, c.line, mc.column, s)
		}
		row.Meters = append(row.Meters, usage.Quantity{Meter: mc.meter, Value: v})
	}
	return row, nil
}

func parseTime(s, layout string) (time.Time, error) {
	switch layout {
	case "unix", "unix_ms":
		f, err := strconv.ParseFloat(s, 64)
		if err != nil {
			return time.Time{}, fmt.Errorf("%q is not a number of %s", s, layout)
		}
		if layout == "unix" {
			f *= 1e3
		}
		return time.UnixMicro(int64(f * 1e3)).UTC(), nil
	case "":
		for _, l := range [...]string{time.RFC3339Nano, "2006-01-02 15:04:05.999999999"} {
			if t, err := time.Parse(l, s); err == nil {
				return t.UTC(), nil
			}
		}
		return time.Time{}, fmt.Errorf("%q is not a time that is known; give --time-layout", s)
	}
	t, err := time.Parse(layout, s)
	if err != nil {
		return time.Time{}, fmt.Errorf("%q is not a time of the layout %q", s, layout)
	}
	return t.UTC(), nil
}

// Load reads a whole trace into memory; most bounds the rows.
func Load(r Reader, most int) ([]Row, error) {
	var rows []Row
	for {
		row, err := r.Next()
		if errors.Is(err, io.EOF) {
			return rows, nil
		}
		if err != nil {
			return nil, err
		}
		if len(rows) == most {
			return nil, fmt.Errorf("line %d: the trace has more than %d rows; raise --max-rows or filter it", r.Line(), most)
		}
		rows = append(rows, row)
	}
}

// Open opens a trace file of a format: azure-llm or csv.
func Open(format, file string, m Mapping) (Reader, io.Closer, error) {
	switch format {
	case "azure-llm":
		where := m.Where
		m = AzureMapping(file)
		m.Where = where
	case "csv":
	default:
		return nil, nil, fmt.Errorf("--format %q is not known; there are azure-llm and csv", format)
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, nil, err
	}
	r, err := NewCSV(file, f, m)
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return r, f, nil
}

// Sort puts rows in order of time; rows of the same time stay as they are.
func Sort(rows []Row) {
	slices.SortStableFunc(rows, func(a, b Row) int { return a.Time.Compare(b.Time) })
}
