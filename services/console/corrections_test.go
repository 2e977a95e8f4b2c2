package console

import (
	"context"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/console/internal/front"
	"github.com/tollkeeper/tollkeeper/services/internal/corrections"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
)

func TestUsageIsCorrectedOverHTTP(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.apply(demoPlans())
	ctx, cancel := context.WithCancel(t.Context())
	owner := make(chan struct{})
	go func() { defer close(owner); w.own(ctx) }()
	defer func() { cancel(); <-owner }()
	w.publish(okCall("acme/search", 10, 20), okCall("acme/search", 10, 20))
	h := &fakeHistory{}
	for n := range uint64(3) {
		h.corrected = append(h.corrected, history.PastCorrection{Sequence: 40 - n, ID: ksuid.New().String(), Author: "ada", Account: "acme/search", Adjustments: map[string]int64{"calls": -1}, Reason: "twice", StreamTime: 9})
	}
	const token = "a-long-token"
	base := w.start(Options{History: h, Token: token})
	c := newContract(t, base)
	header := map[string]string{"Content-Type": "application/json", "Authorization": "Bearer " + token}
	post := func(status int, body string) []byte {
		t.Helper()
		return c.do(exchange{method: http.MethodPost, path: "/v1/corrections", header: header, body: body, status: status})
	}
	w.until("the owner answers", func() bool {
		_, err := w.nc.Request(ledger.UsageSubject(w.shard("acme")), []byte("{}"), time.Second)
		return err == nil
	})

	id := ksuid.New().String()
	body := fmt.Sprintf(`{"id": %q, "author": "ada", "account": "acme/search", "adjustments": {"calls": -1, "output_tokens": -20}, "reason": "sent twice", "reference": "batch/17"}`, id)
	var first, second corrections.Result
	decode(t, post(200, body), &first)
	if first.ID != id || first.Repeated || first.Root != "acme" || first.Shard != w.shard("acme") || !first.Counted || first.At == 0 {
		t.Errorf("got %+v", first)
	}
	m, found, err := ledger.LastMessage(t.Context(), w.js, ledger.Stream, ledger.ControlSubject(first.Shard))
	if err != nil || !found || m.Sequence != first.Sequence {
		t.Fatalf("the ledger has %v, %t, %v", m, found, err)
	}
	e, err := ledger.DecodeControl(m.Header, m.Data)
	if err != nil || e.GetAuthor() != "ada" || e.GetCorrection().GetAccount() != "acme/search" || e.GetCorrection().GetReference() != "batch/17" {
		t.Errorf("the ledger has %v, %v", e, err)
	}
	decode(t, post(200, body), &second)
	if !second.Repeated || second.Sequence != first.Sequence {
		t.Errorf("the same again: %+v", second)
	}

	for name, bad := range map[string]struct {
		status     int
		code, body string
	}{
		"no JSON":         {400, front.CodeBadRequest, `calls=-1`},
		"unknown field":   {400, front.CodeBadRequest, `{"acount": "acme"}`},
		"two objects":     {400, front.CodeBadRequest, `{"account": "acme"} {}`},
		"a meter twice":   {400, front.CodeBadRequest, `{"account": "acme", "adjustments": {"calls": 1, "calls": 2}, "reason": "r"}`},
		"a member twice":  {400, front.CodeBadRequest, `{"account": "acme/search", "adjustments": {"calls": -1}, "reason": "r", "Account": "acme"}`},
		"a list":          {400, front.CodeBadRequest, `{"account": "acme", "adjustments": [{"calls": 1}], "reason": "r"}`},
		"a text":          {400, front.CodeBadRequest, `{"account": "acme", "adjustments": {"calls": "1"}, "reason": "r"}`},
		"no ksuid":        {400, front.CodeBadRequest, `{"id": "1", "account": "acme", "adjustments": {"calls": 1}, "reason": "r"}`},
		"no reason":       {422, corrections.CodeInvalid, `{"account": "acme", "adjustments": {"calls": 1}}`},
		"unknown account": {404, corrections.CodeUnknownAccount, `{"account": "nobody", "adjustments": {"calls": 1}, "reason": "r"}`},
		"more than used":  {422, corrections.CodeTooLarge, `{"account": "acme/search", "adjustments": {"calls": -3}, "reason": "r"}`},
		"another act":     {409, corrections.CodeConflict, fmt.Sprintf(`{"id": %q, "account": "acme/search", "adjustments": {"calls": 1}, "reason": "r"}`, id)},
	} {
		var p front.Problem
		decode(t, post(bad.status, bad.body), &p)
		if p.Code != bad.code || p.Detail == "" {
			t.Errorf("%s: %+v", name, p)
		}
	}
	c.do(exchange{method: http.MethodPost, path: "/v1/corrections", header: map[string]string{"Content-Type": "application/json"}, body: body, status: 401})
	c.do(exchange{method: http.MethodPost, path: "/v1/corrections", header: map[string]string{"Content-Type": "text/plain", "Authorization": "Bearer " + token}, body: body, status: 415})

	var list struct {
		Corrections []history.PastCorrection
		Next        string `json:"next_cursor"`
	}
	decode(t, c.do(exchange{path: "/v1/corrections?limit=2&account=acme/search", header: header}), &list)
	if len(list.Corrections) != 2 || list.Next != "39" || list.Corrections[0].Adjustments["calls"] != -1 {
		t.Errorf("got %+v", list)
	}
	decode(t, c.do(exchange{path: "/v1/corrections?limit=2&cursor=39", header: header}), &list)
	if len(list.Corrections) != 1 || list.Next != "" {
		t.Errorf("the last page: %+v", list)
	}
	c.do(exchange{path: "/v1/corrections?cursor=x", header: header, status: 400})
	c.do(exchange{path: "/v1/corrections?cursor=0", header: header, status: 400})
}
