package console

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/console/internal/front"
	"github.com/tollkeeper/tollkeeper/services/internal/explain"
)

// explainTimeout bounds one explanation: a ledger that takes longer to replay is
// for the command.
const explainTimeout = time.Minute

func (c *console) getExplanation(w http.ResponseWriter, r *http.Request) {
	n, err := pageSize(r, explain.DefaultPage)
	if err != nil {
		front.BadRequest(err.Error()).Write(w)
		return
	}
	id := r.PathValue("id")
	ctx, cancel := context.WithTimeout(r.Context(), explainTimeout)
	defer cancel()
	e, err := c.explainer.Explain(ctx, explain.Query{ID: id, Limit: n, Cursor: r.URL.Query().Get("cursor")})
	if err != nil {
		explainProblem(id, err).Write(w)
		return
	}
	if !e.Replay.Same {
		c.log.Error().Str("decision", id).Interface("differences", e.Replay.Differences).Msg("the replay does not give what was decided")
	}
	front.WriteJSON(w, e)
}

func explainProblem(id string, err error) front.Problem {
	switch {
	case errors.Is(err, explain.ErrID), errors.Is(err, explain.ErrCursor):
		return front.BadRequest(err.Error())
	case errors.Is(err, explain.ErrUnknown):
		return front.Problem{Status: http.StatusNotFound, Code: front.CodeNotFound, Detail: err.Error()}
	case errors.Is(err, ledger.ErrPurged):
		return front.Problem{Status: http.StatusGone, Code: front.CodeGone, Detail: err.Error()}
	case errors.Is(err, context.DeadlineExceeded):
		return front.Unavailable("it was not explained within " + explainTimeout.String() + ": ask again later, or run tollkeeper explain " + id)
	}
	return front.Unavailable("the ledger can't be replayed: " + err.Error())
}
