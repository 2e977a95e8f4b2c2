package trace

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func load(r Reader, err error) ([]Row, error) {
	if err != nil {
		return nil, err
	}
	return Load(r, nil, &Bad{}, LoadOptions{Most: 100})
}

func mapping(t *testing.T, fields ...string) Mapping {
	t.Helper()
	m, err := ParseMapping(fields)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestCSVRowsFollowTheMapping(t *testing.T) {
	t.Parallel()
	m := mapping(t, "time=when", "account=who", "key=key", "model==m1", "status=code", "meter.input_tokens=in", "meter.gpu_ms=gpu")
	if err := m.ParseWhere([]string{"kind=api"}); err != nil {
		t.Fatal(err)
	}
	rows, err := load(NewCSV("x.csv", strings.NewReader("when,who,key,code,in,gpu,kind\n"+
		"2023-11-16 18:15:46.6805900,acme,k1,200,374,,api\n"+
		"2023-11-16 18:15:47,acme,k1,200,1,2,page\n"+
		"2023-11-16T18:15:48Z,globex,k2,500,0,7,api\n"), m))
	if err != nil {
		t.Fatal(err)
	}
	want := []Row{
		{Time: time.Date(2023, 11, 16, 18, 15, 46, 680590000, time.UTC), Account: "acme", Key: "k1", Model: "m1", Status: 200, Meters: []usage.Quantity{{Meter: "input_tokens", Value: 374}}, File: "x.csv", Line: 2},
		{Time: time.Date(2023, 11, 16, 18, 15, 48, 0, time.UTC), Account: "globex", Key: "k2", Model: "m1", Status: 500, Meters: []usage.Quantity{{Meter: "gpu_ms", Value: 7}, {Meter: "input_tokens", Value: 0}}, File: "x.csv", Line: 4},
	}
	if d := cmp.Diff(want, rows); d != "" {
		t.Error(d)
	}
}

// Several values of one column are alternatives; none is dropped silently.
func TestSeveralFiltersAllCount(t *testing.T) {
	t.Parallel()
	const in = "t,a,kind,region\n2024-01-01,1,api,eu\n2024-01-01,2,page,eu\n2024-01-01,3,batch,eu\n2024-01-01,4,api,us\n"
	for where, want := range map[string]string{
		"kind=api":                      "1 4",
		"kind=api kind=page":            "1 2 4",
		"kind=page kind=api":            "1 2 4",
		"kind=api region=eu":            "1",
		"kind=api kind=batch region=eu": "1 3",
		"region=us kind=page":           "",
	} {
		m := mapping(t, "time=t", "account=a")
		if err := m.ParseWhere(strings.Fields(where)); err != nil {
			t.Fatal(err)
		}
		rows, err := load(NewCSV("x.csv", strings.NewReader(in), m))
		var got []string
		for _, r := range rows {
			got = append(got, r.Account)
		}
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%s: got %v, %v; want %s", where, got, err, want)
		}
	}
}

func TestHowAFileIsWrittenDoesNotMatter(t *testing.T) {
	t.Parallel()
	const plain = "when,who,in\n2024-01-01T00:00:00Z,a,1\n2024-01-01T00:00:01Z,\"b, c\",2\n"
	m := mapping(t, "time=when", "account=who", "meter.input_tokens=in")
	want, err := load(NewCSV("x.csv", strings.NewReader(plain), m))
	if err != nil || len(want) != 2 || want[1].Account != "b, c" {
		t.Fatal(want, err)
	}
	for name, in := range map[string]string{
		"CRLF":              strings.ReplaceAll(plain, "\n", "\r\n"),
		"byte order mark":   "\ufeff" + plain,
		"mark and quotes":   "\ufeff\"when\",\"who\",\"in\"\n" + strings.SplitN(plain, "\n", 2)[1],
		"no last newline":   strings.TrimSuffix(plain, "\n"),
		"semicolons":        "when;who;in\n2024-01-01T00:00:00Z;a;1\n2024-01-01T00:00:01Z;b, c;2\n",
		"tabs":              "when\twho\tin\n2024-01-01T00:00:00Z\ta\t1\n2024-01-01T00:00:01Z\tb, c\t2\n",
		"other case":        strings.Replace(plain, "when,who,in", "When,WHO,In", 1),
		"spaces in headers": strings.Replace(plain, "when,who,in", " when , who , in ", 1),
		"more columns":      "x,when,y,who,in\n1,2024-01-01T00:00:00Z,2,a,1\n,2024-01-01T00:00:01Z,,\"b, c\",2\n",
		"spaces":            strings.Replace(plain, ",a,1", ", a , 1 ", 1),
	} {
		got, err := load(NewCSV("x.csv", strings.NewReader(in), m))
		if d := cmp.Diff(want, got); err != nil || d != "" {
			t.Errorf("%s: %v\n%s", name, err, d)
		}
	}
}

func TestBadTracesSayFileLineColumnAndReason(t *testing.T) {
	t.Parallel()
	good := mapping(t, "time=t", "account=a", "status=s", "meter.bytes=b", "method=m")
	const head, at = "t,a,s,b,m\n", "2024-01-01T00:00:00Z"
	for name, c := range map[string]struct{ in, want string }{
		"empty":           {"", "x.csv: the file is empty"},
		"UTF-16":          {"\xff\xfet\x00,\x00a\x00", "x.csv: the file is not UTF-8"},
		"column missing":  {"t,a,s,m\n", `x.csv:1: --map names the column "b", the file has t, a, s, m`},
		"column twice":    {"t,a,s,b,b,m\n", `x.csv:1: --map names the column "b", which the file has twice`},
		"time":            {head + "yesterday,x,200,1,\n", `x.csv:2: column t: "yesterday" is not a time that is known`},
		"no time":         {head + ",x,200,1,\n", `x.csv:2: column t: the time is empty`},
		"negative":        {head + at + ",x,200,-1,\n", `x.csv:2: column b: "-1" is not a count of bytes`},
		"fraction":        {head + at + ",x,200,1.5,\n", `x.csv:2: column b: "1.5" is not a count of bytes: counts are whole numbers`},
		"exponent":        {head + at + ",x,200,1e3,\n", `x.csv:2: column b: "1e3" is not a count`},
		"too large":       {head + at + ",x,200,9007199254740993,\n", `is not a count`},
		"thousands":       {head + at + ",x,200,\"1,000\",\n", `x.csv:2: column b: "1,000" is not a count`},
		"status":          {head + at + ",x,9,1,\n", `x.csv:2: column s: "9" is not the status`},
		"informational":   {head + at + ",x,101,1,\n", `x.csv:2: column s: "101" is not the status`},
		"account":         {head + at + ",,200,1,\n", "x.csv:2: column a: the account is empty"},
		"long account":    {head + at + "," + strings.Repeat("x", 300) + ",200,1,\n", "cannot name an account"},
		"method":          {head + at + ",x,200,1,GET /\n", `x.csv:2: column m: "GET /" is not an HTTP method`},
		"too few columns": {head + at + ",x,200,1,\n" + at + "\n", "x.csv:3: the row has 1 columns, the header has 5"},
		"quote":           {head + at + ",x\"y,200,1,\n", `x.csv:2: bare "`},
		"too many rows":   {head + strings.Repeat(at+",x,200,1,\n", 101), "more than 100 rows"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := load(NewCSV("x.csv", strings.NewReader(c.in), good))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want it to contain %q", err, c.want)
			}
		})
	}
}

func TestBadRowsCanBeLeftOutAndAreCounted(t *testing.T) {
	t.Parallel()
	var in strings.Builder
	in.WriteString("t,a,n\n")
	for i := range 20 {
		_, _ = fmt.Fprintf(&in, "2024-01-01T00:00:%02dZ,x,%s\n", i, []string{"1", "one", "2"}[i%3])
	}
	in.WriteString("2024-01-01T00:00:59Z,y\n")
	r, err := NewCSV("x.csv", strings.NewReader(in.String()), mapping(t, "time=t", "account=a", "meter.n=n"))
	if err != nil {
		t.Fatal(err)
	}
	var bad Bad
	rows, err := Load(r, nil, &bad, LoadOptions{Most: 100, SkipBad: true})
	if err != nil || len(rows) != 13 || bad.Rows != 8 || len(bad.First) != MaxBadShown {
		t.Fatalf("%d rows, %d bad, %d shown, %v", len(rows), bad.Rows, len(bad.First), err)
	}
	if e := bad.First[0]; e.Line != 3 || e.Column != "n" {
		t.Errorf("the first bad row: %v", e)
	}
}

// A count that is missing is unknown, not 0; a whole number may have a fraction of zeros.
func TestCountsAreWholeNumbersOrUnknown(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"": "unknown", " ": "unknown", "-": "unknown", "NaN": "unknown", "null": "unknown", "NULL": "unknown", "None": "unknown", `\N`: "unknown", "n/a": "unknown",
		"0": "0", "0.0": "0", "7": "7", "374.0": "374", "1.000": "1", "9007199254740992": "9007199254740992", "007": "7",
		"1.": "1", ".0": "bad", "+1": "bad", "1.01": "bad", "-0.0": "0", "0x10": "bad", "1_000": "bad", "Infinity": "bad", "true": "bad",
	} {
		rows, err := load(NewCSV("x.csv", strings.NewReader("t,a,n\n2024-01-01,x,\""+in+"\"\n"), mapping(t, "time=t", "account=a", "meter.n=n")))
		got := "bad"
		switch {
		case err != nil:
		case len(rows[0].Meters) == 0:
			got = "unknown"
		default:
			got = fmt.Sprint(rows[0].Meters[0].Value)
		}
		if got != want {
			t.Errorf("%q is %s, want %s", in, got, want)
		}
	}
}

func TestTimesAreReadAsTheyAreWritten(t *testing.T) {
	t.Parallel()
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Fatal(err)
	}
	const want = "2024-07-01T12:30:45.123456Z"
	for _, c := range []struct {
		layout, in, want string
		zone             *time.Location
	}{
		{"", "2024-07-01T12:30:45.123456Z", want, time.UTC},
		{"", "2024-07-01T14:30:45.123456+02:00", want, time.UTC},
		{"", "2024-07-01 14:30:45.123456+02:00", want, time.UTC},
		{"", "2024-07-01 14:30:45.123456+0200", want, time.UTC},
		{"", "2024-07-01 14:30:45.123456 +0200", want, time.UTC},
		{"", "2024-07-01 14:30:45.123456+02", want, time.UTC},
		{"", "2024-07-01 12:30:45.123456", want, time.UTC},
		{"", "2024-07-01 12:30:45,123456", want, time.UTC},
		{"", "2024-07-01 12:30:45.123456 UTC", want, time.UTC},
		{"", "2024-07-01T12:30:45.123456", want, time.UTC},
		{"", " 2024-07-01 12:30:45.1234560 ", want, time.UTC},
		{"", "2024-07-01 14:30:45.123456", want, berlin},
		{"", "2024-07-01T12:30:45.123456Z", want, berlin}, // it names its zone
		{"", "01/Jul/2024:14:30:45 +0200", "2024-07-01T12:30:45Z", time.UTC},
		{"", "2024-07-01", "2024-07-01T00:00:00Z", time.UTC},
		{"", "1719837045.123456", want, time.UTC},
		{"", "1719837045123.456", want, time.UTC},
		{"", "1719837045123456", want, time.UTC},
		{"", "1719837045123456000", want, time.UTC},
		{"", "1719837045", "2024-07-01T12:30:45Z", berlin},
		{"unix", "1719837045.123456", want, time.UTC},
		{"unix_ms", "1719837045123.456", want, time.UTC},
		{"unix_us", "1719837045123456", want, time.UTC},
		{"unix_ns", "1719837045123456000", want, time.UTC},
		{"unix", "0", "1970-01-01T00:00:00Z", time.UTC},
		{"unix_ms", "1000", "1970-01-01T00:00:01Z", time.UTC}, // a guess would say seconds
		{"02.01.2006 15:04:05", "01.07.2024 14:30:45.123456", want, berlin},
		{"2006-01-02 15:04:05 MST", "2024-07-01 12:30:45.123456 UTC", want, time.UTC},
		{"", "1719837045.12.3", "", time.UTC},
		{"", "1e9", "", time.UTC},
		{"unix", "1e9", "", time.UTC},
		{"unix", "99999999999999999999", "", time.UTC},
		{"", "2024-13-01 00:00:00", "", time.UTC},
		{"", "2023-02-29 00:00:00", "", time.UTC},
		{"02.01.2006", "2024-07-01", "", time.UTC},
		// Clocks are put forward over 02:30 and back over 02:30.
		{"", "2024-03-31 01:59:59", "2024-03-31T00:59:59Z", berlin},
		{"", "2024-03-31 02:30:00", "", berlin},
		{"", "2024-03-31 03:00:00", "2024-03-31T01:00:00Z", berlin},
		{"", "2024-10-27 02:30:00", "2024-10-27T00:30:00Z", berlin},
		{"", "2024-10-27 03:00:00", "2024-10-27T02:00:00Z", berlin},
	} {
		times := Times{Layout: c.layout, Zone: c.zone}
		at, err := times.parse(c.in)
		got := ""
		if err == nil {
			got = at.Format(time.RFC3339Nano)
		}
		if got != c.want {
			t.Errorf("%q (layout %q, %s): got %q, %v; want %q", c.in, c.layout, c.zone, got, err, c.want)
		}
	}
	for layout, ok := range map[string]bool{"": true, "unix": true, "unix_ns": true, "2006-01-02 15:04:05": true, "YYYY-MM-DD": false, "unix_s": false, "foo": false} {
		if err := CheckLayout(layout); (err == nil) != ok {
			t.Errorf("layout %q: %v", layout, err)
		}
	}
}

func TestMappingErrorsSayWhatToWrite(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"time":                                 "write FIELD=COLUMN",
		"colour=x":                             "FIELD is time, account",
		"meter.a b=x":                          "cannot name a meter",
		"account=x":                            "lacks time=COLUMN",
		"time=x":                               "lacks account=COLUMN",
		"=x":                                   "write FIELD=COLUMN",
		"meter.=x,time=ab":                     "cannot name a meter",
		"time=a,time=b,account=x":              "time is mapped twice",
		"time=a,account=x,meter.calls=n":       "every row is one call",
		"time=a,account=x,meter.n=n,meter.n=m": "meter.n is mapped twice",
	} {
		if _, err := ParseMapping(strings.Split(in, ",")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want it to contain %q", in, err, want)
		}
	}
}

// open writes a file and reads it in a format.
func open(t *testing.T, f Format, name string, content []byte) ([]Row, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if f.Mapping.Times.Zone == nil {
		f.Mapping.Times.Zone = time.UTC
	}
	r, closer, err := f.Open(file, nil)
	if err != nil {
		return nil, err
	}
	rows, err := Load(r, nil, &Bad{}, LoadOptions{Most: 1000})
	for i := range rows {
		rows[i].File = ""
	}
	return rows, errors.Join(err, closer.Close())
}

const azureFile = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n2024-05-10 00:00:00.009930+00:00,2162,5\r\n"

func TestPackedFilesAndTheStandardInputAreReadAlike(t *testing.T) {
	t.Parallel()
	const name = "AzureLLMInferenceTrace_conv.csv"
	want, err := open(t, Format{Name: Azure}, name, []byte(azureFile))
	if err != nil || len(want) != 2 || want[0].Account != "azure-conv" || len(want[0].Meters) != 2 || want[1].Time != time.Date(2024, 5, 10, 0, 0, 0, 9930000, time.UTC) {
		t.Fatalf("got %+v, %v", want, err)
	}
	var gz, zst bytes.Buffer
	g := gzip.NewWriter(&gz)
	z, err := zstd.NewWriter(&zst)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range []io.WriteCloser{g, z} {
		if _, err := io.WriteString(w, azureFile); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for as, content := range map[string][]byte{name + ".gz": gz.Bytes(), name + ".zst": zst.Bytes(), name: gz.Bytes()} {
		got, err := open(t, Format{Name: Azure}, as, content)
		if d := cmp.Diff(want, got); err != nil || d != "" {
			t.Errorf("%s: %v\n%s", as, err, d)
		}
	}
	if _, err := open(t, Format{Name: Azure}, name+".gz", gz.Bytes()[:gz.Len()-9]); err == nil {
		t.Error("a cut file is taken for a whole one")
	}
	f := Format{Name: CSV, Mapping: mapping(t, "time=TIMESTAMP", "account==azure-conv")}
	r, _, err := f.Open("-", bytes.NewReader(zst.Bytes()))
	rows, err := load(r, err)
	if err != nil || len(rows) != 2 || rows[0].File != "stdin" {
		t.Errorf("stdin: %+v, %v", rows, err)
	}
}

func TestMooncakeRequestsAreOfSessions(t *testing.T) {
	t.Parallel()
	base := time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)
	rows, err := open(t, Format{Name: Mooncake, Base: base}, "m.jsonl", []byte(
		`{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 14, 2]}`+"\n\n"+
			`{"timestamp": 3536999, "input_length": 12, "output_length": null, "hash_ids": [0]}`))
	want := []Row{
		{Time: base, Account: "session-14", Method: "POST", Route: "chat", Model: "mooncake", Line: 1, Meters: []usage.Quantity{{Meter: usage.InputTokens, Value: 6758}, {Meter: usage.OutputTokens, Value: 500}}},
		{Time: base.Add(3536999 * time.Millisecond), Account: "block-0", Method: "POST", Route: "chat", Model: "mooncake", Line: 3, Meters: []usage.Quantity{{Meter: usage.InputTokens, Value: 12}}},
	}
	if d := cmp.Diff(want, rows); err != nil || d != "" {
		t.Errorf("%v\n%s", err, d)
	}
	for in, want := range map[string]string{`{"input_length": 1}`: "column timestamp", `{"timestamp": 1, "input_length": -1}`: "column input_length", `[1]`: "not a request"} {
		if _, err := open(t, Format{Name: Mooncake}, "m.jsonl", []byte(in)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", in, err)
		}
	}
}

func TestAccessLogsAreRead(t *testing.T) {
	t.Parallel()
	rows, err := open(t, Format{Name: CombinedLog}, "access.log", []byte(
		`83.149.9.216 - - [17/May/2015:10:05:03 +0200] "GET /presentations/a.png?x=1 HTTP/1.1" 200 203023 "http://x/\"y\"" "Mozilla/5.0 \"q\""`+"\n"+
			`::1 - bob [17/May/2015:10:05:04 +0000] "HEAD / HTTP/1.0" 304 -`+"\r\n"+
			`h - - [17/May/2015:10:05:05 +0000] "GET /a\"b/c" 404 7 "-" "-"`+"\n"))
	want := []Row{
		{Time: time.Date(2015, 5, 17, 8, 5, 3, 0, time.UTC), Account: "83.149.9.216", Method: "GET", Route: "/presentations", Status: 200, Line: 1, Meters: []usage.Quantity{{Meter: usage.Bytes, Value: 203023}}},
		{Time: time.Date(2015, 5, 17, 10, 5, 4, 0, time.UTC), Account: "::1", Method: "HEAD", Route: "/", Status: 304, Line: 2},
		{Time: time.Date(2015, 5, 17, 10, 5, 5, 0, time.UTC), Account: "h", Method: "GET", Route: `/a\"b`, Status: 404, Line: 3, Meters: []usage.Quantity{{Meter: usage.Bytes, Value: 7}}},
	}
	if d := cmp.Diff(want, rows); err != nil || d != "" {
		t.Errorf("%v\n%s", err, d)
	}
	for in, want := range map[string]string{
		`x - - "GET / HTTP/1.1" 200 1`:                              "column time",
		`x - - [17/May/2015:10:05:03 +0000] "-" 408 -`:              "column request",
		`x - - [17/May/2015:10:05:03 +0000] "GET / HTTP/1.1" abc 1`: "column status",
		`x - - [17/May/2015:10:05:03 +0000] "GET / HTTP/1.1" 200 x`: "column size",
		`x - - [17/May/2015:10:05:03 +0000] "GET / HTTP/1.1`:        "column request",
		`x - - [yesterday] "GET / HTTP/1.1" 200 1`:                  "column time",
	} {
		if _, err := open(t, Format{Name: CombinedLog}, "access.log", []byte(in)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", in, err)
		}
	}
}

// One call of so many, none of them lost between windows.
func TestServeGensWindowsBecomeSamples(t *testing.T) {
	t.Parallel()
	base := time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)
	const in = "category,model,client,window_start_s,requests,cv\nlanguage,m,0,0,5,1\nlanguage,m,1,0,4,1\nlanguage,m,0,600,5,1\nlanguage,m,1,600,0,1\n"
	for sample, want := range map[int64]int{1: 14, 5: 2, 4: 3, 10: 1, 100: 0} {
		rows, err := open(t, Format{Name: ServeGen, Base: base, Sample: sample}, "w.csv", []byte(in))
		if err != nil || len(rows) != want {
			t.Errorf("1 of %d: %d rows, want %d (%v)", sample, len(rows), want, err)
		}
		for _, r := range rows {
			if len(r.Meters) != 0 || r.Time.Before(base) || !r.Time.Before(base.Add(20*time.Minute)) || !slices.Contains([]string{"m-client-0", "m-client-1"}, r.Account) {
				t.Errorf("1 of %d: %+v", sample, r)
			}
		}
	}
}

func TestRowsAreSortedAndEqualTimesStayInOrder(t *testing.T) {
	t.Parallel()
	at := time.Unix(1_700_000_000, 0)
	rows := []Row{{Time: at.Add(2), Line: 1}, {Time: at, Line: 2}, {Time: at.Add(2), Line: 3}, {Time: at, Line: 4}}
	if n := Sort(rows); n != 2 {
		t.Errorf("%d rows were out of order, want 2", n)
	}
	for i, line := range []int{2, 4, 1, 3} {
		if rows[i].Line != line {
			t.Errorf("row %d is line %d, want %d", i, rows[i].Line, line)
		}
	}
}
