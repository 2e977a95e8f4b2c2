package drive

import (
	"bytes"
	"encoding/json"
	"strconv"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/trace"
)

// unknownOutput is the max_tokens of a row whose output was not recorded, where a limit
// wants a bound. What such a call used stays unknown; a limit of the tiers exact and
// leased takes its bound for used.
const unknownOutput = 16

// request writes a row's request and returns the buffer of its body.
func (d *driver) request(req *fasthttp.Request, body []byte, i int) []byte {
	row := &d.o.Rows[i]
	method := row.Method
	if method == "" {
		method = fasthttp.MethodPost
	}
	req.Header.SetMethod(method)
	req.SetRequestURI(d.o.Path(i))
	req.Header.SetHost(d.o.Host)
	req.Header.Set("Authorization", "Bearer "+d.o.Key(i))
	if d.o.KeepTime {
		req.Header.Set(EventTimeHeader, row.Time.UTC().Format(time.RFC3339Nano))
	}
	req.Header.SetBytesV(answerHeader, appendAnswer(nil, row))
	if row.Model == "" && !d.o.Reserve && (method == fasthttp.MethodGet || method == fasthttp.MethodHead) {
		return body
	}
	req.Header.SetContentType("application/json")
	body = append(body, `{"model":`...)
	body = appendJSON(body, row.Model)
	if d.o.Reserve {
		// A token is a byte at least, so the body must have as many as there are.
		input, output := int64(0), int64(unknownOutput)
		for _, q := range row.Meters {
			switch q.Meter {
			case usage.InputTokens, usage.CachedInputTokens:
				input = max(input, q.Value)
			case usage.OutputTokens, usage.ReasoningTokens:
				output = max(q.Value, 1)
			}
		}
		body = append(body, `,"max_tokens":`...)
		body = strconv.AppendInt(body, output, 10)
		body = append(body, `,"messages":[{"role":"user","content":"Recorded question.`...)
		if short := int(min(input, mostPadding)) - len(body); short > 0 {
			body = append(body, bytes.Repeat([]byte{'x'}, short)...)
		}
		body = append(body, `"}]}`...)
	} else {
		body = append(body, `,"messages":[{"role":"user","content":"Recorded question."}]}`...)
	}
	req.SetBodyRaw(body)
	return body
}

// mostPadding bounds a request's body, bytes.
const mostPadding = 4 << 20

func appendJSON(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c == '"' || c == '\\' || c >= 0x7f {
			quoted, _ := json.Marshal(s) // a string always has a form
			return append(b, quoted...)
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"')
}

// answerHeader asks the upstream to answer as the trace recorded:
// "status=200,input_tokens=374".
const answerHeader = "X-Replay-Answer"

func appendAnswer(b []byte, row *trace.Row) []byte {
	b = append(b, "status="...)
	b = strconv.AppendInt(b, int64(max(row.Status, 200*boolInt(row.Status == 0))), 10)
	for _, q := range row.Meters {
		b = append(b, ',')
		b = append(b, q.Meter...)
		b = append(b, '=')
		b = strconv.AppendInt(b, q.Value, 10)
	}
	return b
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}
