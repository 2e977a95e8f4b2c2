// Package series turns a question about calls over time into one for history, and
// its points into lines of a chart. It is pure.
package series

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/history"
)

const (
	// MaxSteps of a line.
	MaxSteps = 2000
	// Top is how many lines are told apart.
	Top = 10
)

// Calls is one line of the history chart; its lists have a value a step.
type Calls struct {
	Name     string  `json:"name"`
	Other    bool    `json:"other"`
	Admitted []int64 `json:"admitted"`
	Refused  []int64 `json:"refused"`
	Input    []int64 `json:"input_tokens"`
	Output   []int64 `json:"output_tokens"`
}

// Query reads the range: from and to as RFC 3339, step in seconds.
func Query(values url.Values, now time.Time) (history.CallsQuery, error) {
	q := history.CallsQuery{To: now, Group: history.ByCode, Account: values.Get("account"), Top: Top}
	var err error
	if s := values.Get("to"); s != "" {
		if q.To, err = time.Parse(time.RFC3339, s); err != nil {
			return q, errors.New("to is a time like 2026-01-02T15:04:05Z")
		}
	}
	q.From = q.To.Add(-15 * time.Minute)
	if s := values.Get("from"); s != "" {
		if q.From, err = time.Parse(time.RFC3339, s); err != nil {
			return q, errors.New("from is a time like 2026-01-02T15:04:05Z")
		}
	}
	if q.From.Unix() < 0 || !q.From.Before(q.To) || q.To.Sub(q.From) > 400*24*time.Hour {
		return q, errors.New("from must be before to, by at most 400 days, and after 1970")
	}
	switch g := history.Group(values.Get("group")); g {
	case "":
	case history.ByCode, history.ByAccount, history.ByModel:
		q.Group = g
	default:
		return q, errors.New("group is code, account or model")
	}
	span := q.To.Sub(q.From)
	q.Step = stepFor(span)
	if s := values.Get("step"); s != "" {
		n, err := strconv.ParseInt(s, 10, 32)
		if err != nil || n < 1 {
			return q, errors.New("step is a number of seconds from 1 on")
		}
		q.Step = time.Duration(n) * time.Second
	}
	if span/q.Step > MaxSteps {
		return q, fmt.Errorf("that makes more than %d steps: choose a larger step or a shorter range", MaxSteps)
	}
	// Steps begin at multiples of the step, so that the same moment stands in
	// the same step of every answer.
	q.From = q.From.Truncate(q.Step)
	if t := q.To.Truncate(q.Step); t.Before(q.To) {
		q.To = t.Add(q.Step)
	}
	return q, nil
}

// stepFor gives about 150 to 200 steps.
func stepFor(span time.Duration) time.Duration {
	for _, s := range []time.Duration{
		time.Second, 5 * time.Second, 10 * time.Second, 30 * time.Second, time.Minute, 2 * time.Minute, 5 * time.Minute, 10 * time.Minute,
		30 * time.Minute, time.Hour, 3 * time.Hour, 6 * time.Hour,
	} {
		if span/s <= 200 {
			return s
		}
	}
	return 24 * time.Hour
}

// Dense makes a list with a value for every step of every group: admitted
// first, then by name, the others last.
func Dense(points []history.CallsPoint, steps int) []Calls {
	type key struct {
		name  string
		other bool
	}
	at := map[key]int{}
	out := []Calls{}
	for _, p := range points {
		if p.Step < 0 || p.Step >= steps {
			continue
		}
		k := key{p.Name, p.Other}
		i, ok := at[k]
		if !ok {
			i = len(out)
			at[k] = i
			out = append(out, Calls{Name: p.Name, Other: p.Other, Admitted: make([]int64, steps), Refused: make([]int64, steps), Input: make([]int64, steps), Output: make([]int64, steps)})
		}
		s := &out[i]
		s.Admitted[p.Step] += p.Admitted
		s.Refused[p.Step] += p.Refused
		s.Input[p.Step] += p.InputTokens
		s.Output[p.Step] += p.OutputTokens
	}
	slices.SortFunc(out, func(a, b Calls) int {
		if a.Other != b.Other {
			if a.Other {
				return 1
			}
			return -1
		}
		return cmp.Compare(a.Name, b.Name)
	})
	return out
}
