package health

import (
	"errors"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/services/console/internal/live"
	"github.com/tollkeeper/tollkeeper/services/console/internal/views"
	"github.com/tollkeeper/tollkeeper/services/internal/telemetry"
)

func TestLagIsHowLongAnEntryWaitsToBeCounted(t *testing.T) {
	t.Parallel()
	var s Lag
	at := time.Unix(1000, 0)
	for _, c := range []struct {
		after         time.Duration
		last, counted uint64
		want          time.Duration
	}{
		{0, 10, 10, 0},
		{100, 12, 10, 0}, // seen now
		{200, 15, 11, 100 * time.Second},
		{210, 20, 12, 0}, // 12 is counted; 20 is seen now
		{215, 25, 19, 5 * time.Second},
		{216, 25, 25, 0},
		{300, 26, 25, 0},
	} {
		if got := s.Of(3, c.last, c.counted, at.Add(c.after*time.Second)); got != c.want {
			t.Errorf("after %d s, last %d, counted %d: %s, want %s", c.after, c.last, c.counted, got, c.want)
		}
	}
}

func TestAPartIsJudgedByWhatWasSeenOfIt(t *testing.T) {
	t.Parallel()
	now := time.Unix(10_000, 0)
	well := func() Seen {
		return Seen{
			Now: now, Shards: 2, Connected: true, HasHistory: true, PositionAt: now,
			Beacons:  []views.Beacon{{Shard: 0, Age: 100 * time.Millisecond}, {Shard: 1, Age: 200 * time.Millisecond}},
			Gateways: []live.Gateway{{Name: "gw", SeenAt: usage.At(now.Add(-time.Second))}},
			Peers:    map[string]Peer{"alerter": {OK: true, Detail: "ready"}},
		}
	}
	for name, c := range map[string]struct {
		change func(*Seen)
		part   string
		want   string
		all    string
	}{
		"all well":                            {func(*Seen) {}, "alerter", StateOK, StateOK},
		"nobody heard":                        {func(s *Seen) { s.Beacons = nil }, "aggregator", StateDown, StateDown},
		"one shard is silent":                 {func(s *Seen) { s.Beacons[1].Age = 5 * time.Second }, "aggregator", StateDown, StateDown},
		"one shard is late":                   {func(s *Seen) { s.Beacons[1].Age = 2 * time.Second }, "aggregator", StateWaiting, StateWaiting},
		"a gateway that fell silent":          {func(s *Seen) { s.Gateways[0].SeenAt = usage.At(now.Add(-time.Hour)) }, "gateway", StateUnknown, StateOK},
		"history on its way":                  {func(s *Seen) { s.LastCalls, s.Position = 9, 5 }, "historian", StateOK, StateOK},
		"history that is stuck":               {func(s *Seen) { s.LastCalls, s.Position, s.PositionAt = 9, 5, now.Add(-time.Minute) }, "historian", StateDown, StateDown},
		"ClickHouse away":                     {func(s *Seen) { s.HistoryErr = errors.New("refused") }, "clickhouse", StateDown, StateDown},
		"no ClickHouse":                       {func(s *Seen) { s.HasHistory = false }, "clickhouse", StateUnknown, StateOK},
		"NATS away":                           {func(s *Seen) { s.Connected = false }, "nats", StateDown, StateDown},
		"a peer that is not ready":            {func(s *Seen) { s.Peers["alerter"] = Peer{Detail: "it is not ready (503)"} }, "alerter", StateDown, StateDown},
		"no auditor":                          {func(*Seen) {}, "auditor", StateUnknown, StateOK},
		"an auditor at work":                  {func(s *Seen) { s.Audit.At = usage.At(now.Add(-time.Second)) }, "auditor", StateOK, StateOK},
		"an auditor that has found something": {func(s *Seen) { s.Audit = Audit{At: usage.At(now), Open: 2} }, "auditor", StateOK, StateOK},
		"an auditor that fell silent":         {func(s *Seen) { s.Audit.At = usage.At(now.Add(-time.Minute)) }, "auditor", StateDown, StateDown},
		"a component that is not ready": {func(s *Seen) {
			s.Components = []telemetry.ComponentStatus{{Name: "historian_calls", Reason: "waiting for ClickHouse"}}
		}, "historian", StateDown, StateDown},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			seen := well()
			c.change(&seen)
			var lag Lag
			h := Judge(seen, &lag)
			for _, p := range h.Parts {
				if p.Name == c.part && p.State != c.want {
					t.Errorf("%s is %s (%s), want %s", p.Name, p.State, p.Detail, c.want)
				}
			}
			if h.State != c.all || len(h.Parts) != 7 || len(h.Shards) != 2 {
				t.Errorf("all is %s with %d parts and %d shards, want %s", h.State, len(h.Parts), len(h.Shards), c.all)
			}
		})
	}
}
