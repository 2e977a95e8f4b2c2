package trace

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Mapping says which column of a CSV file holds what. A value that begins with
// "=" is a literal for every row.
type Mapping struct {
	Time, Account, Key, Method, Route, Model, Status string
	// Meters by name.
	Meters map[usage.Meter]string
	// Times say how times are written.
	Times Times
	// Where keeps only rows whose columns have one of these values each.
	Where map[string][]string
}

// Meter reports whether a trace with this mapping can report a meter.
func (m *Mapping) Meter(name usage.Meter) bool {
	_, ok := m.Meters[name]
	return ok
}

// ParseMapping reads "time=TIMESTAMP,account==conv,meter.input_tokens=Context".
func ParseMapping(fields []string) (Mapping, error) {
	m := Mapping{Meters: map[usage.Meter]string{}, Where: map[string][]string{}, Times: Times{Zone: time.UTC}}
	named := map[string]bool{}
	for _, f := range fields {
		name, column, ok := strings.Cut(f, "=")
		if !ok || name == "" || column == "" {
			return m, fmt.Errorf("--map %q: write FIELD=COLUMN, or FIELD==VALUE for the same value in every row", f)
		}
		if named[name] {
			return m, fmt.Errorf("--map %q: %s is mapped twice", f, name)
		}
		named[name] = true
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
			if usage.Meter(meter) == usage.Calls {
				return m, fmt.Errorf("--map %q: every row is one call", f)
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

// ParseWhere adds "COLUMN=VALUE" filters to the mapping: a row passes when each
// column that is named has one of the values that are named for it.
func (m *Mapping) ParseWhere(filters []string) error {
	for _, f := range filters {
		column, value, ok := strings.Cut(f, "=")
		if !ok || column == "" {
			return fmt.Errorf("--where %q: write COLUMN=VALUE", f)
		}
		m.Where[column] = append(m.Where[column], value)
	}
	return nil
}

// AzureMapping is the layout of the Azure LLM inference traces: time and two token
// counts. They hold no accounts: each file is one.
func AzureMapping(file string) Mapping {
	name := filepath.Base(file)
	for _, ext := range []string{".gz", ".zst", ".csv"} {
		name = strings.TrimSuffix(name, ext)
	}
	name = strings.TrimPrefix(name, "AzureLLMInferenceTrace_")
	return Mapping{
		Time: "TIMESTAMP", Account: "=azure-" + name, Model: "=azure-" + name, Method: "=POST", Route: "=chat",
		Meters: map[usage.Meter]string{usage.InputTokens: "ContextTokens", usage.OutputTokens: "GeneratedTokens"},
		Where:  map[string][]string{}, Times: Times{Zone: time.UTC},
	}
}
