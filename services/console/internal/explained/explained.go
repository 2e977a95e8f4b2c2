// Package explained answers why a decision was made.
package explained

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/rs/zerolog"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/console/internal/front"
	"github.com/tollkeeper/tollkeeper/services/internal/explain"
)

// timeout bounds one explanation: a ledger that takes longer to replay is
// for the command.
const timeout = time.Minute

// Handler answers /v1/decisions/{id}/explain and /v1/requests/{id}/explain.
func Handler(x *explain.Explainer, log zerolog.Logger) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) { answer(w, r, x, log) }
}

func answer(w http.ResponseWriter, r *http.Request, x *explain.Explainer, log zerolog.Logger) {
	n := explain.DefaultPage
	if s := r.URL.Query().Get("limit"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil || n < 1 || n > explain.MaxPage {
			front.BadRequest(fmt.Sprintf("limit must be a whole number from 1 to %d", explain.MaxPage)).Write(w)
			return
		}
	}
	id := r.PathValue("id")
	ctx, cancel := context.WithTimeout(r.Context(), timeout)
	defer cancel()
	e, err := x.Explain(ctx, explain.Query{ID: id, Limit: n, Cursor: r.URL.Query().Get("cursor")})
	if err != nil {
		problem(id, err).Write(w)
		return
	}
	if !e.Replay.Same {
		log.Error().Str("decision", id).Interface("differences", e.Replay.Differences).Msg("the replay does not give what was decided")
	}
	front.WriteJSON(w, e)
}

func problem(id string, err error) front.Problem {
	switch {
	case errors.Is(err, explain.ErrID), errors.Is(err, explain.ErrCursor):
		return front.BadRequest(err.Error())
	case errors.Is(err, explain.ErrUnknown), errors.Is(err, explain.ErrNotRefused):
		return front.Problem{Status: http.StatusNotFound, Code: front.CodeNotFound, Detail: err.Error()}
	case errors.Is(err, ledger.ErrPurged):
		return front.Problem{Status: http.StatusGone, Code: front.CodeGone, Detail: err.Error()}
	case errors.Is(err, context.DeadlineExceeded):
		return front.Unavailable("it was not explained within " + timeout.String() + ": ask again later, or run tollkeeper explain " + id)
	}
	return front.Unavailable("the ledger can't be replayed: " + err.Error())
}
