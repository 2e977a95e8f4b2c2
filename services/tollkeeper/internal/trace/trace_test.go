package trace

import (
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func TestCSVRowsFollowTheMapping(t *testing.T) {
	t.Parallel()
	m, err := ParseMapping([]string{"time=when", "account=who", "key=key", "model==m1", "status=code", "meter.input_tokens=in", "meter.gpu_ms=gpu"})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.ParseWhere([]string{"kind=api"}); err != nil {
		t.Fatal(err)
	}
	in := "when,who,key,code,in,gpu,kind\n" +
		"2023-11-16 18:15:46.6805900,acme,k1,200,374,,api\n" +
		"2023-11-16 18:15:47,acme,k1,200,1,2,page\n" +
		"2023-11-16T18:15:48Z,globex,k2,500,0,7,api\n"
	r, err := NewCSV("x.csv", strings.NewReader(in), m)
	if err != nil {
		t.Fatal(err)
	}
	rows, err := Load(r, 10)
	if err != nil {
		t.Fatal(err)
	}
	want := []Row{
		{Time: time.Date(2023, 11, 16, 18, 15, 46, 680590000, time.UTC), Account: "acme", Key: "k1", Model: "m1", Status: 200, Meters: []usage.Quantity{{Meter: "input_tokens", Value: 374}}},
		{Time: time.Date(2023, 11, 16, 18, 15, 48, 0, time.UTC), Account: "globex", Key: "k2", Model: "m1", Status: 500, Meters: []usage.Quantity{{Meter: "gpu_ms", Value: 7}, {Meter: "input_tokens", Value: 0}}},
	}
	if d := cmp.Diff(want, rows); d != "" {
		t.Error(d)
	}
}

func TestBadTracesSayFileLineAndReason(t *testing.T) {
	t.Parallel()
	good := Mapping{Time: "t", Account: "a", Status: "s", Meters: map[usage.Meter]string{"bytes": "b"}}
	for name, c := range map[string]struct{ in, want string }{
		"empty":           {"", "x.csv: read the header line"},
		"column missing":  {"t,a,s\n", `x.csv:1: --map names the column "b", the file has t, a, s`},
		"time":            {"t,a,s,b\nyesterday,x,200,1\n", `x.csv:2: "yesterday" is not a time that is known`},
		"negative":        {"t,a,s,b\n2024-01-01T00:00:00Z,x,200,-1\n", `x.csv:2: b is "-1", which is not a count`},
		"status":          {"t,a,s,b\n2024-01-01T00:00:00Z,x,9,1\n", `x.csv:2: "9" is not an HTTP status`},
		"account":         {"t,a,s,b\n2024-01-01T00:00:00Z,,200,1\n", "x.csv:2: the account is empty"},
		"too few columns": {"t,a,s,b\n2024-01-01T00:00:00Z\n", "record on line 2: wrong number of fields"},
		"too many rows":   {"t,a,s,b\n2024-01-01T00:00:00Z,x,200,1\n2024-01-01T00:00:00Z,x,200,1\n", "more than 1 rows"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, err := NewCSV("x.csv", strings.NewReader(c.in), good)
			if err == nil {
				_, err = Load(r, 1)
			}
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want it to contain %q", err, c.want)
			}
		})
	}
}

func TestMappingErrorsSayWhatToWrite(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"time":             "write FIELD=COLUMN",
		"colour=x":         "FIELD is time, account",
		"meter.a b=x":      "cannot name a meter",
		"account=x":        "lacks time=COLUMN",
		"time=x":           "lacks account=COLUMN",
		"=x":               "write FIELD=COLUMN",
		"meter.=x,time=ab": "cannot name a meter",
	} {
		if _, err := ParseMapping(strings.Split(in, ",")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want it to contain %q", in, err, want)
		}
	}
}

func TestAzureTraceIsOneAccountAFile(t *testing.T) {
	t.Parallel()
	file := "AzureLLMInferenceTrace_conv.csv"
	r, err := NewCSV(file, strings.NewReader("TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.6805900,374,44\r\n"), AzureMapping(file))
	if err != nil {
		t.Fatal(err)
	}
	row, err := r.Next()
	if err != nil {
		t.Fatal(err)
	}
	if row.Account != "azure-conv" || len(row.Meters) != 2 {
		t.Errorf("got %+v", row)
	}
	if _, err := r.Next(); !errors.Is(err, io.EOF) {
		t.Errorf("after the last row: %v", err)
	}
}
