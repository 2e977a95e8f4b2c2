// Package letters keeps entries of the ledger that cannot be counted: whole, with the
// reason, in the dead letters.
package letters

import (
	"context"
	"errors"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
)

// Message keeps an entry among the letters of a shard. It is taken once for each
// entry: whoever folds the ledger again finds it there.
func Message(shard uint32, sequence uint64, subject, reason, detail string, header nats.Header, data []byte) *nats.Msg {
	d := &nats.Msg{Subject: ledger.DeadLetterSubject(shard, sequence), Data: data, Header: nats.Header{
		ledger.ReasonHeader: {reason}, ledger.DetailHeader: {Readable(detail)}, ledger.OriginHeader: {Readable(subject) + " " + strconv.FormatUint(sequence, 10)},
	}}
	if codec := header.Get(ledger.CodecHeader); codec != "" {
		d.Header.Set(ledger.CodecHeader, codec)
	}
	ledger.ExpectLast(d, 0)
	return d
}

// truncatedHeader says how many bytes a letter had that is kept in part.
const truncatedHeader = "Tollkeeper-Truncated"

// Keep stores a letter and reports whether it was not there before. One that is too
// large with its headers is cut until it fits: the whole stands in the ledger, where
// the origin says.
func Keep(ctx context.Context, js jetstream.JetStream, m *nats.Msg) (stored bool, err error) {
	for {
		_, err := js.PublishMsg(ctx, m)
		var api *jetstream.APIError
		switch {
		case err == nil:
			return true, nil
		case errors.As(err, &api) && api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence:
			return false, nil
		case (errors.Is(err, nats.ErrMaxPayload) || api != nil && api.ErrorCode == errCodeTooLarge) && len(m.Data) > 0:
			if m.Header.Get(truncatedHeader) == "" {
				m.Header.Set(truncatedHeader, strconv.Itoa(len(m.Data)))
			}
			m.Data = m.Data[:len(m.Data)/2]
		default:
			return false, err
		}
	}
}

// errCodeTooLarge is JetStream's code that the client has no name for.
const errCodeTooLarge jetstream.ErrorCode = 10054

// Readable is text that can stand in a header.
func Readable(text string) string {
	text = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, text)
	return strings.ToValidUTF8(text[:min(len(text), 512)], "")
}
