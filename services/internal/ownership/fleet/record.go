package fleet

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Entry is a key of the bucket with its revision.
type Entry struct {
	Key      string
	Revision uint64
	Value    []byte
}

// Prefixes of the keys.
const (
	SessionPrefix = "session."
	ShardPrefix   = "shard."
)

func sessionKey(id string) string   { return SessionPrefix + id }
func shardKey(shard uint32) string  { return ShardPrefix + strconv.FormatUint(uint64(shard), 10) }
func encode(record any) []byte      { b, _ := json.Marshal(record); return b } // strings, numbers: it cannot fail
func (s session) over() bool        { return s.State == stateEnded || s.State == stateFenced }
func (s session) is(st string) bool { return s.State == st }

// States of a session: alive, or leaving (it hands over and takes nothing), then
// for good ended (by itself, orderly) or fenced (by another, that waited its TTL).
const (
	stateAlive   = "alive"
	stateLeaving = "leaving"
	stateEnded   = "ended"
	stateFenced  = "fenced"
)

// session is one start of a member, under "session.<id>". It is the only thing
// that is renewed; the claims live as long as the session that they name.
type session struct {
	Member string `json:"member"`
	State  string `json:"state"`
	// Beat counts the renewals: a renewal whose answer was lost is known by it.
	Beat uint64 `json:"beat"`
	// Declines are shards that failed at this member and should go elsewhere.
	Declines []uint32 `json:"declines,omitempty"`
	// By is who fenced it.
	By string `json:"by,omitempty"`
}

// claim says who owns a shard, under "shard.<n>". Only its session may change
// it, or anybody once that session is over. Its revision is the fencing token.
type claim struct {
	Session string `json:"session"`
	Member  string `json:"member"`
	// Released: nobody owns it; To is the member that should take it.
	Released bool   `json:"released,omitempty"`
	To       string `json:"to,omitempty"`
}

var errNotOurs = errors.New("no key of this protocol")

// parse reads an entry: one of the two results is set.
func parse(e Entry, shards int) (id string, s *session, shard uint32, c *claim, err error) {
	if id, ok := strings.CutPrefix(e.Key, SessionPrefix); ok && id != "" {
		s := new(session)
		if len(e.Value) == 0 {
			return id, s, 0, nil, nil // deleted by hand: whoever is alive renews it
		}
		if err := json.Unmarshal(e.Value, s); err != nil {
			return "", nil, 0, nil, fmt.Errorf("%s: %w", e.Key, err)
		}
		return id, s, 0, nil, nil
	}
	n, err := strconv.ParseUint(strings.TrimPrefix(e.Key, ShardPrefix), 10, 32)
	if err != nil || !strings.HasPrefix(e.Key, ShardPrefix) || n >= uint64(shards) {
		return "", nil, 0, nil, fmt.Errorf("%q: %w", e.Key, errNotOurs)
	}
	if len(e.Value) == 0 {
		return "", nil, uint32(n), &claim{Released: true}, nil // deleted by hand
	}
	c = new(claim)
	if err := json.Unmarshal(e.Value, c); err != nil {
		return "", nil, 0, nil, fmt.Errorf("%s: %w", e.Key, err)
	}
	return "", nil, uint32(n), c, nil
}
