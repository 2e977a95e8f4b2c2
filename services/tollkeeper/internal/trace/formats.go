package trace

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Formats that Open knows.
const (
	CSV         = "csv"
	Azure       = "azure-llm"
	ServeGen    = "servegen"
	Mooncake    = "mooncake"
	CombinedLog = "combined-log"
)

// Format says how files are to be read.
type Format struct {
	Name string
	// Mapping of CSV; others have their own and take Where and Times from it.
	Mapping Mapping
	// Base is when traces begin whose times are relative.
	Base time.Time
	// Sample: one call stands for so many of a trace that has only their number.
	Sample int64
}

// Reports says whether a trace of the format can report a meter.
func (f *Format) Reports(m usage.Meter) bool {
	switch f.Name {
	case CSV:
		return m == usage.Calls || f.Mapping.Meter(m)
	case Azure, Mooncake:
		return m == usage.Calls || m == usage.InputTokens || m == usage.OutputTokens
	case CombinedLog:
		return m == usage.Calls || m == usage.Bytes
	}
	return m == usage.Calls
}

// Open opens a trace file, compressed or not; "-" is the standard input.
func (f *Format) Open(file string, stdin io.Reader) (Reader, io.Closer, error) {
	var in io.Reader = stdin
	var closer io.Closer = io.NopCloser(nil)
	if file != "-" {
		opened, err := os.Open(file)
		if err != nil {
			return nil, nil, err
		}
		in, closer = opened, opened
	} else {
		file = "stdin"
	}
	plain, err := unpack(in)
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("%s: %w", file, err), closer.Close())
	}
	r, err := f.reader(file, plain)
	if err != nil {
		return nil, nil, errors.Join(err, closer.Close())
	}
	return r, closer, nil
}

// unpack reads what gzip or zstd has packed, which its first bytes tell.
func unpack(r io.Reader) (io.Reader, error) {
	in := bufio.NewReaderSize(r, 1<<16)
	switch first, _ := in.Peek(4); { // a short file is not packed
	case bytes.HasPrefix(first, []byte{0x1f, 0x8b}):
		return gzip.NewReader(in)
	case bytes.Equal(first, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		d, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(1<<30))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	}
	return in, nil
}

func (f *Format) reader(file string, r io.Reader) (Reader, error) {
	switch f.Name {
	case CSV:
		return NewCSV(file, r, f.Mapping)
	case Azure:
		m := AzureMapping(file)
		m.Where, m.Times = f.Mapping.Where, f.Mapping.Times
		return NewCSV(file, r, m)
	case ServeGen:
		m := Mapping{Time: "window_start_s", Account: "client", Model: "model", Method: "=POST", Route: "=chat", Meters: map[usage.Meter]string{requestsMeter: "requests"}, Where: f.Mapping.Where, Times: Times{Layout: "unix", Zone: time.UTC}}
		windows, err := NewCSV(file, r, m)
		if err != nil {
			return nil, err
		}
		return &servegen{Reader: windows, base: f.Base, sample: max(f.Sample, 1), carry: map[string]int64{}}, nil
	case Mooncake:
		return &lines{file: file, in: bufio.NewReaderSize(r, 1<<16), parse: mooncake(f.Base)}, nil
	case CombinedLog:
		return &lines{file: file, in: bufio.NewReaderSize(r, 1<<16), parse: combined(f.Mapping.Times)}, nil
	}
	return nil, fmt.Errorf("--format %q is not known: choose %s", f.Name, strings.Join([]string{CSV, Azure, ServeGen, Mooncake, CombinedLog}, ", "))
}

const requestsMeter usage.Meter = "requests"

// servegen makes calls of the windows of ServeGen: how many requests a client made in
// ten minutes. Only one of every sample is made; they are spread evenly over the
// window, which real ones are not, and report no tokens, which the windows do not know.
type servegen struct {
	Reader
	base   time.Time
	sample int64
	carry  map[string]int64 // requests that have no call yet, by client
	row    Row
	left   int64 // calls of row to come
	of     int64
}

const servegenWindow = 10 * time.Minute

func (s *servegen) Next() (Row, error) {
	for s.left == 0 {
		row, err := s.Reader.Next()
		if err != nil {
			return row, err
		}
		n := int64(0)
		if len(row.Meters) == 1 {
			n = row.Meters[0].Value
		}
		row.Account = row.Model + "-client-" + row.Account
		row.Time, row.Meters = s.base.Add(time.Duration(row.Time.UnixNano())), nil
		total := s.carry[row.Account] + n
		s.row, s.of, s.left = row, total/s.sample, total/s.sample
		s.carry[row.Account] = total % s.sample
	}
	row := s.row
	row.Time = row.Time.Add(time.Duration(float64(servegenWindow) * float64(s.of-s.left) / float64(s.of)))
	s.left--
	return row, nil
}

// lines reads a row a line.
type lines struct {
	file  string
	in    *bufio.Reader
	line  int
	texts interner
	parse func(line []byte, row *Row, texts interner) (column string, err error)
}

// maxLine bounds a line, bytes.
const maxLine = 16 << 20

func (l *lines) Line() int { return l.line }

func (l *lines) Next() (Row, error) {
	if l.texts == nil {
		l.texts = interner{}
	}
	for {
		line, err := l.read()
		if len(line) == 0 && errors.Is(err, io.EOF) {
			return Row{}, io.EOF
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return Row{}, fmt.Errorf("%s: line %d: %w", l.file, l.line+1, err)
		}
		if l.line++; l.line == 1 {
			line = bytes.TrimPrefix(line, []byte("\ufeff"))
		}
		if line = bytes.TrimSpace(line); len(line) == 0 {
			continue
		}
		row := Row{File: l.file, Line: l.line}
		if column, err := l.parse(line, &row, l.texts); err != nil {
			return Row{}, &RowError{File: l.file, Line: l.line, Column: column, Reason: err.Error()}
		}
		return row, nil
	}
}

func (l *lines) read() ([]byte, error) {
	var all []byte
	for {
		part, err := l.in.ReadSlice('\n')
		if !errors.Is(err, bufio.ErrBufferFull) && all == nil {
			return part, err
		}
		if all = append(all, part...); !errors.Is(err, bufio.ErrBufferFull) {
			return all, err
		}
		if len(all) > maxLine {
			return nil, fmt.Errorf("a line of more than %d bytes", maxLine)
		}
	}
}

// mooncake reads a request of Mooncake's traces: milliseconds since the beginning,
// lengths in tokens, and blocks of its prompt, of which the second is the session's.
func mooncake(base time.Time) func([]byte, *Row, interner) (string, error) {
	return func(line []byte, row *Row, texts interner) (string, error) {
		var r struct {
			Timestamp    *json.Number `json:"timestamp"`
			InputLength  *json.Number `json:"input_length"`
			OutputLength *json.Number `json:"output_length"`
			HashIDs      []int64      `json:"hash_ids"`
		}
		if err := json.Unmarshal(line, &r); err != nil {
			return "", fmt.Errorf("the line is not a request in JSON: %v", err)
		}
		if r.Timestamp == nil {
			return "timestamp", errors.New("the time is missing")
		}
		at, err := epoch(r.Timestamp.String(), 1e6, "unix_ms")
		if err != nil {
			return "timestamp", err
		}
		row.Time = base.Add(time.Duration(at.UnixNano()))
		row.Method, row.Route, row.Model = "POST", "chat", "mooncake"
		switch {
		case len(r.HashIDs) > 1:
			row.Account = texts.keep("session-" + strconv.FormatInt(r.HashIDs[1], 10))
		case len(r.HashIDs) == 1:
			row.Account = texts.keep("block-" + strconv.FormatInt(r.HashIDs[0], 10))
		default:
			row.Account = "no-session"
		}
		for _, m := range []struct {
			meter  usage.Meter
			column string
			n      *json.Number
		}{{usage.InputTokens, "input_length", r.InputLength}, {usage.OutputTokens, "output_length", r.OutputLength}} {
			if m.n == nil {
				continue
			}
			v, ok := whole(m.n.String())
			if !ok {
				return m.column, fmt.Errorf("%s is not a count of %s", m.n, m.meter)
			}
			row.Meters = append(row.Meters, usage.Quantity{Meter: m.meter, Value: v})
		}
		return "", nil
	}
}

// combined reads the access log of Apache and nginx, common or combined: the client's
// address is the account, the first part of the path the route, the size of the answer
// the meter bytes.
func combined(times Times) func([]byte, *Row, interner) (string, error) {
	if times.Layout == "" {
		times.Layout = "02/Jan/2006:15:04:05 -0700"
	}
	return func(line []byte, row *Row, texts interner) (string, error) {
		host, rest, ok := strings.Cut(string(line), " ")
		if !ok || host == "" || len(host) > MaxName {
			return "host", errors.New("the line does not begin with a client's address")
		}
		row.Account = texts.keep(host)
		_, rest, ok = strings.Cut(rest, "[")
		at, rest, closed := strings.Cut(rest, "]")
		if !ok || !closed {
			return "time", errors.New("there is no [time]")
		}
		var err error
		if row.Time, err = times.parse(at); err != nil {
			return "time", err
		}
		request, rest, ok := quoted(rest)
		if !ok {
			return "request", errors.New(`there is no "request"`)
		}
		method, path, ok := strings.Cut(request, " ")
		if method = strings.ToUpper(method); !ok || method == "" || !token(method) {
			return "request", fmt.Errorf("%.60q is not a request line", request)
		}
		row.Method = texts.keep(method)
		path, _, _ = strings.Cut(path, " ")
		path, _, _ = strings.Cut(path, "?")
		if first, below, deeper := strings.Cut(strings.TrimPrefix(path, "/"), "/"); deeper && first != "" && below != "" {
			row.Route = texts.keep("/" + first)
		} else {
			row.Route = "/"
		}
		fields := strings.Fields(rest)
		if len(fields) < 2 {
			return "status", errors.New("there is no status and no size")
		}
		status, ok := whole(fields[0])
		if !ok || status < 200 || status > 599 {
			return "status", fmt.Errorf("%.20q is not the status of an HTTP answer (200 to 599)", fields[0])
		}
		row.Status = int(status)
		if !missing(fields[1]) {
			v, ok := whole(fields[1])
			if !ok {
				return "size", fmt.Errorf("%.20q is not a count of bytes", fields[1])
			}
			row.Meters = []usage.Quantity{{Meter: usage.Bytes, Value: v}}
		}
		return "", nil
	}
}

// quoted returns the text between the next two quotes; a quote behind a backslash
// does not end it.
func quoted(s string) (text, rest string, ok bool) {
	_, s, ok = strings.Cut(s, `"`)
	for i := 0; ok && i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case '"':
			return s[:i], s[i+1:], true
		}
	}
	return "", "", false
}
