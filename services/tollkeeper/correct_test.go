package tollkeeper_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/services/internal/plans"
	"github.com/tollkeeper/tollkeeper/services/tollkeeper/internal/demo"
)

// send sends JSON to the API.
func (u *up) send(ctx context.Context, t *testing.T, method, path string, v any) (status int, body []byte) {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+u.api+path, bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("If-Match", "*") // nobody else applies plans here
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	var out bytes.Buffer
	if _, err := out.ReadFrom(resp.Body); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, out.Bytes()
}

// command runs a command of the program to its end.
func command(ctx context.Context, t *testing.T, args ...string) (string, error) {
	t.Helper()
	dir, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(ctx, filepath.Join(dir, "tollkeeper"), args...).CombinedOutput()
	return string(out), err
}

// exhaust calls until a 402 and returns how many calls passed, and the decision.
func (u *up) exhaust(ctx context.Context, t *testing.T, account string) (passed int64, decision string) {
	t.Helper()
	eventually(ctx, t, "402", func() (bool, string) {
		status, body := u.call(ctx, account)
		switch status {
		case http.StatusOK:
			passed++
			return false, ""
		case http.StatusPaymentRequired:
			var problem struct {
				DecisionID string `json:"decision_id"`
			}
			if err := json.Unmarshal(body, &problem); err != nil {
				t.Fatal(err)
			}
			decision = problem.DecisionID
			return true, ""
		}
		return false, fmt.Sprint(status, " ", string(body))
	})
	return passed, decision
}

// Usage that was reported twice is taken off: who was blocked for it can call
// again, and counters, ClickHouse and the trail of the next block agree. Saying it
// twice changes nothing. The state that came of it is the one that the log gives.
func TestACorrectionUnblocksAndEverybodyAgrees(t *testing.T) {
	t.Parallel()
	ctx := within(t, 3*time.Minute)
	dir := t.TempDir()
	u := startUp(t, dir)
	eventually(ctx, t, "start", func() (bool, string) {
		status, body := get(ctx, "http://"+u.api+"/readyz")
		return status == http.StatusOK, string(body)
	})
	const account, amount = "corrected", 5
	status, body := get(ctx, "http://"+u.api+"/v1/plans", "Accept", "application/yaml")
	if status != http.StatusOK {
		t.Fatalf("the plans: %d %s", status, body)
	}
	doc, err := plans.Parse("plans.yaml", body)
	if err != nil {
		t.Fatal(err)
	}
	doc = plans.Merge(doc, &plans.Document{
		Plans:    []plans.Plan{{ID: "five", Limits: []plans.Limit{{ID: "calls", Meter: "calls", Window: "lifetime", Amount: amount}}}},
		Accounts: []plans.Account{{ID: account, Plan: "five", Keys: []plans.Key{{ID: "corrected-1", SHA256: plans.HashKey(demo.Key(account))}}}},
	})
	if status, body := u.send(ctx, t, http.MethodPut, "/v1/plans", doc); status != http.StatusOK {
		t.Fatalf("apply: %d %s", status, body)
	}
	eventually(ctx, t, "the first call", func() (bool, string) {
		status, body := u.call(ctx, account)
		return status == http.StatusOK, fmt.Sprint(status, " ", string(body))
	})
	first, blocked := u.exhaust(ctx, t, account)
	first++

	// All but two of what is allowed is taken back.
	by := -(first - amount + 2)
	args := []string{"correct", "--data-dir", dir, "--account", account, "--meter", "calls=" + strconv.FormatInt(by, 10),
		"--reason", "the test sent them twice", "--reference", blocked, "--author", "ada", "--id", ksuid.New().String()}
	out, err := command(ctx, t, args...)
	if err != nil || !strings.Contains(out, fmt.Sprintf("corrected: calls %+d of %s", by, account)) || !strings.Contains(out, fmt.Sprintf("five/calls: %d of %d calls, allow", first+by, amount)) {
		t.Fatalf("%v\n%s", err, out)
	}
	if out, err = command(ctx, t, args...); err != nil || !strings.Contains(out, "made before: nothing was changed now") {
		t.Errorf("the same again: %v\n%s", err, out)
	}
	if out, err = command(ctx, t, "correct", "--data-dir", dir, "--account", account, "--meter", "calls=-1000", "--reason", "too much"); err == nil || !strings.Contains(out, "a correction can't take off more") {
		t.Errorf("more than was used: %v\n%s", err, out)
	}
	eventually(ctx, t, "unblocked", func() (bool, string) {
		status, body := u.call(ctx, account)
		return status == http.StatusOK, fmt.Sprint(status, " ", string(body))
	})
	second, decision := u.exhaust(ctx, t, account)
	calls := first + second + 1
	if second+1 < 2 || decision == blocked {
		t.Errorf("after the correction %d calls passed, and decision %s blocked (before it was %s)", second+1, decision, blocked)
	}

	// The counters.
	var counted struct {
		Accounts []struct {
			Own struct {
				Admitted int64            `json:"admitted_calls"`
				Adjusted map[string]int64 `json:"adjusted"`
			} `json:"own"`
			Limits []struct{ Used int64 }
		}
	}
	eventually(ctx, t, "counters", func() (bool, string) {
		_, body := get(ctx, "http://"+u.api+"/v1/usage?account="+account)
		if err := json.Unmarshal(body, &counted); err != nil {
			return false, err.Error()
		}
		return len(counted.Accounts) == 1 && counted.Accounts[0].Own.Admitted == calls, string(body)
	})
	if a := counted.Accounts[0]; a.Own.Adjusted["calls"] != by || len(a.Limits) != 1 || a.Limits[0].Used != calls+by {
		t.Errorf("%d calls, %+d by the correction, and the counters are %+v", calls, by, a)
	}

	// ClickHouse.
	query := "SELECT sum(calls), sum(adjusted_calls), (SELECT count() FROM tollkeeper.corrections WHERE account = '" + account + "') FROM tollkeeper.v_usage_hourly WHERE account = '" + account + "'"
	want := fmt.Sprintf("%d\t%d\t1", calls, by)
	eventually(ctx, t, "ClickHouse has "+want, func() (bool, string) {
		_, body := u.history(ctx, query)
		return strings.TrimSpace(string(body)) == want, string(body)
	})
	_, body = get(ctx, "http://"+u.api+"/v1/corrections?account="+account)
	if !strings.Contains(string(body), `"author":"ada"`) || !strings.Contains(string(body), `"reason":"the test sent them twice"`) || strings.Count(string(body), `"id":`) != 1 {
		t.Errorf("the audit trail: %s", body)
	}

	// The trail of the next block.
	var why struct {
		Replay struct{ Same bool }
		Fed    struct{ Calls, Used, Adjusted int64 }
		Calls  []struct {
			Index int
			Adds  int64
			Act   *struct{ Author, Reason, Reference string }
		}
	}
	status, body = get(ctx, "http://"+u.api+"/v1/decisions/"+decision+"/explain")
	if err := json.Unmarshal(body, &why); err != nil || status != http.StatusOK {
		t.Fatalf("explain: %d %s", status, body)
	}
	acts := 0
	for _, c := range why.Calls {
		if c.Index == -1 && c.Act != nil && c.Act.Author == "ada" && c.Act.Reference == blocked && c.Adds == by {
			acts++
		}
	}
	if !why.Replay.Same || why.Fed.Adjusted != by || why.Fed.Used+by < amount || acts != 1 {
		t.Errorf("explained as %+v", why)
	}

	// The log gives the state that was counted.
	if out, err = command(ctx, t, "audit", "--data-dir", dir); err != nil || !strings.Contains(out, "the ledger gives the state that was counted") {
		t.Errorf("audit: %v\n%s", err, out)
	}
	u.interrupt(t, syscall.SIGINT)
}
