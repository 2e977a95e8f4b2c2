package front

import (
	"errors"
	"net/http"
	"strconv"
)

// NoCursor says what ?cursor is to one that is none.
const NoCursor = "cursor is the next_cursor of the page before"

var errNoCursor = errors.New(NoCursor)

// Before reads ?cursor of a list that is paged by sequence, newest first; 0: there is
// none, the first page is asked for.
func Before(r *http.Request) (uint64, error) {
	s := r.URL.Query().Get("cursor")
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n == 0 {
		return 0, errNoCursor
	}
	return n, nil
}
