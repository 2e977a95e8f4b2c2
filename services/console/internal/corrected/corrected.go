// Package corrected answers what was corrected, and corrects.
package corrected

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/console/internal/freshness"
	"github.com/tollkeeper/tollkeeper/services/console/internal/front"
	"github.com/tollkeeper/tollkeeper/services/console/internal/health"
	"github.com/tollkeeper/tollkeeper/services/internal/corrections"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
)

const (
	// maxBody is more than a correction's texts together.
	maxBody     = 64 << 10
	defaultPage = 100
	maxPage     = 1000
)

// History is where past corrections are; *history.History answers.
type History interface {
	Corrections(ctx context.Context, q history.CorrectionsQuery) ([]history.PastCorrection, error)
}

// request is what POST /v1/corrections takes.
type request struct {
	ID          string           `json:"id"`
	Author      string           `json:"author"`
	Account     string           `json:"account"`
	Time        time.Time        `json:"time"`
	Model       string           `json:"model"`
	Route       string           `json:"route"`
	Method      string           `json:"method"`
	Adjustments map[string]int64 `json:"adjustments"`
	Reason      string           `json:"reason"`
	Reference   string           `json:"reference"`
}

// act translates it. Its errors tell a person what to write.
func (b *request) act() (corrections.Act, error) {
	a := corrections.Act{
		Author: b.Author, Account: b.Account, Time: b.Time, Model: b.Model, Route: b.Route, Method: b.Method,
		Adjustments: make(map[usage.Meter]int64, len(b.Adjustments)), Reason: b.Reason, Reference: b.Reference,
	}
	if a.Author == "" {
		a.Author = "console"
	}
	for m, n := range b.Adjustments {
		a.Adjustments[usage.Meter(m)] = n
	}
	if b.ID != "" {
		var err error
		if a.ID, err = ksuid.Parse(b.ID); err != nil {
			return a, errors.New("id is not a ksuid, which has 27 letters and digits: leave it out for a new one")
		}
	}
	return a, nil
}

// Post answers POST /v1/corrections.
func Post(s *corrections.Submitter, log zerolog.Logger) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) { post(w, r, s, log) }
}

func post(w http.ResponseWriter, r *http.Request, s *corrections.Submitter, log zerolog.Logger) {
	if front.MediaType(r) != "application/json" {
		front.Problem{Status: http.StatusUnsupportedMediaType, Code: front.CodeMediaType, Detail: "send the correction with Content-Type application/json"}.Write(w)
		return
	}
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		var big *http.MaxBytesError
		if errors.As(err, &big) {
			front.Problem{Status: http.StatusRequestEntityTooLarge, Code: front.CodeTooLarge, Detail: fmt.Sprintf("the correction has more than %d bytes", maxBody)}.Write(w)
			return
		}
		front.BadRequest("the body could not be read").Write(w)
		return
	}
	var body request
	if err := strictJSON(data, &body); err != nil {
		front.BadRequest(err.Error()).Write(w)
		return
	}
	act, err := body.act()
	if err != nil {
		front.BadRequest(err.Error()).Write(w)
		return
	}
	result, err := s.Submit(r.Context(), act)
	if err != nil {
		problem(err).Write(w)
		return
	}
	log.Info().Str("author", act.Author).Str("id", result.ID).Str("account", result.Account).Bool("repeated", result.Repeated).Msg("usage corrected")
	front.WriteJSON(w, result)
}

// strictJSON reads one object whose fields are all known.
func strictJSON(data []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("the correction is not the JSON that is expected, schemas/openapi.yaml describes it: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows the correction: send one JSON object")
	}
	if name := repeated(data); name != "" {
		return fmt.Errorf("%q is given twice: which of the two is meant can't be said", name)
	}
	return nil
}

// repeated returns a member of the object, in whatever case, as encoding/json takes it,
// or of one in it, that is there twice; empty: there is none. data is valid.
func repeated(data []byte) string {
	d := json.NewDecoder(bytes.NewReader(data))
	var within []map[string]bool // of each object that is open
	for name := false; ; {
		token, err := d.Token()
		if err != nil {
			return ""
		}
		switch {
		case token == json.Delim('{'):
			within, name = append(within, map[string]bool{}), true
			continue
		case token == json.Delim('}'):
			within, name = within[:len(within)-1], false // it was a value
		case name:
			key, here := fmt.Sprint(token), within[len(within)-1]
			if len(within) == 1 {
				key = strings.ToLower(key) // meters are told apart by case
			}
			if here[key] {
				return key
			}
			here[key] = true
		}
		name = len(within) > 0 && !name
	}
}

func problem(err error) front.Problem {
	var refused *corrections.Error
	switch {
	case errors.As(err, &refused):
		status := http.StatusUnprocessableEntity
		switch refused.Code {
		case corrections.CodeUnknownAccount:
			status = http.StatusNotFound
		case corrections.CodeConflict:
			status = http.StatusConflict
		}
		return front.Problem{Status: status, Code: refused.Code, Title: "The correction was not made", Detail: refused.Message}
	case errors.Is(err, corrections.ErrCounting):
		return front.Unavailable("nothing was changed: " + err.Error())
	}
	return front.Unavailable(err.Error())
}

// Get answers GET /v1/corrections; without a history it says so. How current the history
// is says fresh.
func Get(h History, fresh func(time.Time) freshness.Freshness) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) { get(w, r, h, fresh) }
}

func get(w http.ResponseWriter, r *http.Request, h History, fresh func(time.Time) freshness.Freshness) {
	var err error
	n := defaultPage
	if s := r.URL.Query().Get("limit"); s != "" {
		if n, err = strconv.Atoi(s); err != nil || n < 1 || n > maxPage {
			front.BadRequest(fmt.Sprintf("limit must be a whole number from 1 to %d", maxPage)).Write(w)
			return
		}
	}
	before, err := front.Before(r)
	if err != nil {
		front.BadRequest(err.Error()).Write(w)
		return
	}
	if h == nil {
		front.Unavailable("the console has no address of ClickHouse").Write(w)
		return
	}
	found, err := h.Corrections(r.Context(), history.CorrectionsQuery{Account: r.URL.Query().Get("account"), Before: before, Limit: n})
	if err != nil {
		front.Unavailable("ClickHouse does not answer: " + health.FirstSentence(err.Error())).Write(w)
		return
	}
	answer := struct {
		Corrections []history.PastCorrection `json:"corrections"`
		Next        string                   `json:"next_cursor"`
		Freshness   freshness.Freshness      `json:"freshness"`
	}{Corrections: []history.PastCorrection{}, Freshness: fresh(time.Now())}
	answer.Corrections = append(answer.Corrections, found...)
	if len(found) == n {
		answer.Next = strconv.FormatUint(found[n-1].Sequence, 10)
	}
	front.WriteJSON(w, answer)
}
