// Package plansapi answers what the plans are, and applies others.
package plansapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/console/internal/freshness"
	"github.com/tollkeeper/tollkeeper/services/console/internal/front"
	"github.com/tollkeeper/tollkeeper/services/internal/plans"
)

// MaxBody of a document, bytes.
const MaxBody = 16 << 20

// Codes of problems.
const (
	CodeRequired = "PRECONDITION_REQUIRED"
	CodeFailed   = "PRECONDITION_FAILED"
	CodeRemoves  = "WOULD_REMOVE"
)

// none stands for the version of plans that were never applied.
const none = "none"

// etag is the entity tag of the plans that hold, in whatever form they are told.
func etag(version string) string {
	if version == "" {
		version = none
	}
	return `"` + version + `"`
}

// version is the inverse of etag.
func version(tag string) (string, bool) {
	v, ok := strings.CutPrefix(strings.TrimSpace(tag), `"`)
	if ok {
		v, ok = strings.CutSuffix(v, `"`)
	}
	if !ok || v == "" || strings.ContainsAny(v, `",`) {
		return "", false
	}
	if v == none {
		v = ""
	}
	return v, true
}

// Door is /v1/plans. Its methods may be called concurrently.
type Door struct {
	Applier *plans.Applier
	// Now returns the plans that hold, and how current that is.
	Now func(ctx context.Context) (plans.Applied, freshness.Freshness, error)
	// Changed is called after others were applied.
	Changed func()
	Log     zerolog.Logger
}

// Get answers GET /v1/plans.
func (d *Door) Get(w http.ResponseWriter, r *http.Request) {
	applied, fresh, err := d.Now(r.Context())
	if err != nil {
		front.Unavailable("the plans can't be read: " + err.Error()).Write(w)
		return
	}
	w.Header().Set("Vary", "Accept")
	w.Header().Set("ETag", etag(applied.Version))
	if strings.Contains(r.Header.Get("Accept"), "yaml") {
		data, err := yaml.MarshalWithOptions(applied.Document, yaml.UseJSONMarshaler())
		if err != nil {
			front.Unavailable("the plans can't be written as YAML: " + err.Error()).Write(w)
			return
		}
		w.Header().Set("Content-Type", "application/yaml")
		w.Header().Set("Cache-Control", "no-store")
		// An error here is the client's going away.
		_, _ = w.Write(data)
		return
	}
	list := applied.Document.Plans
	if list == nil {
		list = []plans.Plan{}
	}
	front.WriteJSON(w, struct {
		Version      string       `json:"version"`
		PlansVersion string       `json:"plans_version"`
		Author       string       `json:"author"`
		AppliedAt    usage.Micros `json:"applied_at_unix_micros"`
		Unfinished   string       `json:"unfinished,omitempty"`
		Accounts     int          `json:"account_count"`
		Plans        []plans.Plan `json:"plans"`

		Freshness freshness.Freshness `json:"freshness"`
	}{applied.Version, applied.PlansVersion, applied.Author, applied.AppliedAt, applied.Unfinished, len(applied.Document.Accounts), list, fresh})
}

// applyTimeout bounds one applying of plans.
const applyTimeout = 5 * time.Minute

// Put answers PUT /v1/plans.
func (d *Door) Put(w http.ResponseWriter, r *http.Request) {
	name := "plans.yaml"
	switch front.MediaType(r) {
	case "application/yaml":
	case "application/json":
		name = "plans.json"
	default:
		front.Problem{Status: http.StatusUnsupportedMediaType, Code: front.CodeMediaType, Detail: "send the plans with Content-Type application/yaml or application/json"}.Write(w)
		return
	}
	dryRun := false
	switch r.URL.Query().Get("dry_run") {
	case "", "false":
	case "true":
		dryRun = true
	default:
		front.BadRequest("dry_run is true or false").Write(w)
		return
	}
	conditions := plans.Conditions{Removals: plans.Removals(r.URL.Query().Get("removals"))}
	switch conditions.Removals {
	case "", plans.Refuse, plans.Keep, plans.Remove:
	default:
		front.BadRequest("removals is refuse, keep or remove").Write(w)
		return
	}
	match := r.Header.Get("If-Match")
	switch {
	case match == "" && !dryRun:
		front.Problem{Status: http.StatusPreconditionRequired, Code: CodeRequired, Detail: "send the ETag of GET /v1/plans that the document was made from as If-Match: a document replaces what others have changed since. If-Match: * replaces whatever holds"}.Write(w)
		return
	case match != "" && match != "*":
		base, ok := version(match)
		if !ok {
			front.BadRequest("If-Match is one ETag of GET /v1/plans, or *").Write(w)
			return
		}
		conditions.Base = &base
	}
	author := r.URL.Query().Get("author")
	if author == "" {
		author = "console"
	}
	if len(author) > usage.MaxIDBytes {
		front.BadRequest(fmt.Sprintf("author has at most %d bytes", usage.MaxIDBytes)).Write(w)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxBody))
	if err != nil {
		var big *http.MaxBytesError
		if errors.As(err, &big) {
			front.Problem{Status: http.StatusRequestEntityTooLarge, Code: front.CodeTooLarge, Detail: fmt.Sprintf("the plans have more than %d bytes: apply them with tollkeeper apply", MaxBody)}.Write(w)
			return
		}
		front.BadRequest("the body could not be read").Write(w)
		return
	}
	doc, err := plans.Parse(name, body)
	if err != nil {
		problemOf(err).Write(w)
		return
	}
	// A client that goes away must not leave half of it undone until the next.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), applyTimeout)
	defer cancel()
	var diff plans.Diff
	if dryRun {
		diff, err = d.Applier.PlanIf(ctx, doc, conditions)
	} else {
		diff, err = d.Applier.ApplyIf(ctx, doc, author, conditions)
	}
	if err != nil {
		p := problemOf(err)
		var changed *plans.ChangedError
		if errors.As(err, &changed) {
			w.Header().Set("ETag", etag(changed.Version))
		} else if p.Status == http.StatusConflict && conditions.Base != nil && errors.Is(err, plans.ErrConflict) {
			p.Status, p.Code = http.StatusPreconditionFailed, CodeFailed
		}
		p.Write(w)
		return
	}
	if !dryRun {
		w.Header().Set("ETag", etag(diff.To))
		d.Log.Info().Str("author", author).Str("version", diff.To).Msg("plans applied")
		d.Changed()
	}
	front.WriteJSON(w, struct {
		DryRun bool `json:"dry_run"`
		plans.Diff
		Text string `json:"text"`
	}{dryRun, diff, diff.String()})
}

func problemOf(err error) front.Problem {
	var bad *plans.Error
	var busy *plans.BusyError
	var changed *plans.ChangedError
	var removal *plans.RemovalError
	switch {
	case errors.As(err, &removal):
		return front.Problem{Status: http.StatusConflict, Code: CodeRemoves, Title: "The plans would remove what holds", Detail: "the document leaves out " + removal.Totals.Removed() + " that hold now, and nothing was changed: send it with removals=remove to remove them, or with removals=keep to keep them"}
	case errors.As(err, &changed):
		return front.Problem{Status: http.StatusPreconditionFailed, Code: CodeFailed, Detail: changed.Error()}
	case errors.As(err, &bad):
		return front.Problem{Status: http.StatusUnprocessableEntity, Code: front.CodeBadPlans, Title: "The plans can't be used", Detail: "nothing was changed; " + bad.Problems[0].String(), Problems: bad.Problems, More: bad.More}
	case errors.As(err, &busy):
		return front.Problem{Status: http.StatusConflict, Code: front.CodeBusy, Detail: err.Error()}
	case errors.Is(err, plans.ErrConflict):
		return front.Problem{Status: http.StatusConflict, Code: front.CodeConflict, Detail: err.Error()}
	}
	return front.Unavailable("the plans may be applied in part, apply them again: " + err.Error())
}
