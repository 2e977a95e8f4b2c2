package ledger

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// LastMessage returns the newest message of a stream on a subject, which may
// have wildcards; false when there is none. It asks the stream's leader: a
// direct get may be answered by a replica that lags, and what is decided on an
// old checkpoint does harm. Without a deadline of ctx it waits for 5 s.
func LastMessage(ctx context.Context, js jetstream.JetStream, stream, subject string) (Message, bool, error) {
	ask, err := json.Marshal(map[string]string{"last_by_subj": subject})
	if err != nil {
		return Message{}, false, fmt.Errorf("stream %s: %w", stream, err)
	}
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
	}
	reply, err := js.Conn().RequestWithContext(ctx, apiSubject(js, "STREAM.MSG.GET."+stream), ask)
	if err != nil {
		return Message{}, false, fmt.Errorf("stream %s: last of %s: %w", stream, subject, err)
	}
	var answer struct {
		Error   *jetstream.APIError `json:"error"`
		Message struct {
			Subject  string    `json:"subject"`
			Sequence uint64    `json:"seq"`
			Header   []byte    `json:"hdrs"`
			Data     []byte    `json:"data"`
			Time     time.Time `json:"time"`
		} `json:"message"`
	}
	if err := json.Unmarshal(reply.Data, &answer); err != nil {
		return Message{}, false, fmt.Errorf("stream %s: last of %s: the answer is not JSON: %w", stream, subject, err)
	}
	if answer.Error != nil {
		if answer.Error.ErrorCode == jetstream.JSErrCodeMessageNotFound {
			return Message{}, false, nil
		}
		return Message{}, false, fmt.Errorf("stream %s: last of %s: %w", stream, subject, answer.Error)
	}
	m := Message{Subject: answer.Message.Subject, Data: answer.Message.Data, Sequence: answer.Message.Sequence, Time: answer.Message.Time}
	if len(answer.Message.Header) > 0 {
		if m.Header, err = nats.DecodeHeadersMsg(answer.Message.Header); err != nil {
			return Message{}, false, fmt.Errorf("stream %s: last of %s: %w", stream, subject, err)
		}
	}
	return m, true, nil
}

// apiSubject is where JetStream is asked for something.
func apiSubject(js jetstream.JetStream, what string) string {
	switch o := js.Options(); {
	case o.APIPrefix != "":
		return strings.TrimSuffix(o.APIPrefix, ".") + "." + what
	case o.Domain != "":
		return "$JS." + o.Domain + ".API." + what
	}
	return "$JS.API." + what
}
