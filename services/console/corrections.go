package console

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/console/internal/front"
	"github.com/tollkeeper/tollkeeper/services/console/internal/health"
	"github.com/tollkeeper/tollkeeper/services/internal/corrections"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
)

// correctionMaxBody is more than a correction's texts together.
const correctionMaxBody = 64 << 10

// correctionBody is what POST /v1/corrections takes.
type correctionBody struct {
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
func (b *correctionBody) act() (corrections.Act, error) {
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

func (c *console) postCorrection(w http.ResponseWriter, r *http.Request) {
	if front.MediaType(r) != "application/json" {
		front.Problem{Status: http.StatusUnsupportedMediaType, Code: front.CodeMediaType, Detail: "send the correction with Content-Type application/json"}.Write(w)
		return
	}
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, correctionMaxBody))
	if err != nil {
		var big *http.MaxBytesError
		if errors.As(err, &big) {
			front.Problem{Status: http.StatusRequestEntityTooLarge, Code: front.CodeTooLarge, Detail: fmt.Sprintf("the correction has more than %d bytes", correctionMaxBody)}.Write(w)
			return
		}
		front.BadRequest("the body could not be read").Write(w)
		return
	}
	var body correctionBody
	if err := strictJSON(data, &body); err != nil {
		front.BadRequest(err.Error()).Write(w)
		return
	}
	act, err := body.act()
	if err != nil {
		front.BadRequest(err.Error()).Write(w)
		return
	}
	result, err := c.corrector.Submit(r.Context(), act)
	if err != nil {
		correctionProblem(err).Write(w)
		return
	}
	c.log.Info().Str("author", act.Author).Str("id", result.ID).Str("account", result.Account).Bool("repeated", result.Repeated).Msg("usage corrected")
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
	return nil
}

func correctionProblem(err error) front.Problem {
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

func (c *console) getCorrections(w http.ResponseWriter, r *http.Request) {
	n, err := pageSize(r, defaultPage)
	if err != nil {
		front.BadRequest(err.Error()).Write(w)
		return
	}
	var before uint64
	if s := r.URL.Query().Get("cursor"); s != "" {
		if before, err = strconv.ParseUint(s, 10, 64); err != nil {
			front.BadRequest("cursor is the next_cursor of the page before").Write(w)
			return
		}
	}
	if c.o.History == nil {
		front.Unavailable("the console has no address of ClickHouse").Write(w)
		return
	}
	found, err := c.o.History.Corrections(r.Context(), history.CorrectionsQuery{Account: r.URL.Query().Get("account"), Before: before, Limit: n})
	if err != nil {
		front.Unavailable("ClickHouse does not answer: " + health.FirstSentence(err.Error())).Write(w)
		return
	}
	answer := struct {
		Corrections []history.PastCorrection `json:"corrections"`
		Next        string                   `json:"next_cursor"`
	}{Corrections: []history.PastCorrection{}}
	answer.Corrections = append(answer.Corrections, found...)
	if len(found) == n {
		answer.Next = strconv.FormatUint(found[n-1].Sequence, 10)
	}
	front.WriteJSON(w, answer)
}
