package historian

import (
	"context"
	"encoding/json"
	"errors"
	"strings"

	"github.com/rs/zerolog"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/historian/internal/acts"
	"github.com/tollkeeper/tollkeeper/services/internal/blocks"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
	"github.com/tollkeeper/tollkeeper/services/internal/seen"
)

// pump gathers a stream whose entries are rows as they are. read returns false
// for an entry that is none.
type pump[T any] struct {
	lane    string
	read    func(m ledger.Message) (T, bool, error)
	parts   func(rows []T, s blocks.Span) []part
	metrics *metrics
	log     zerolog.Logger

	rows []T
	row  T
	ok   bool
	err  error
}

func (p *pump[T]) weigh(m ledger.Message) blocks.Item {
	it := blocks.Item{Sequence: m.Sequence, Near: m.Pending <= nearEntries}
	if p.row, p.ok, p.err = p.read(m); p.ok && p.err == nil {
		it.Rows, it.Bytes = 1, len(m.Data)
	}
	return it
}

func (p *pump[T]) take(m ledger.Message, keep bool) {
	if !keep {
		return
	}
	if p.err != nil {
		p.metrics.undecodable.WithLabelValues(p.lane, reason(p.err)).Inc()
		p.log.Debug().Err(p.err).Str("lane", p.lane).Uint64("sequence", m.Sequence).Msg("an entry can't be decoded and is left out")
		return
	}
	if p.ok {
		p.rows = append(p.rows, p.row)
	}
}

func (p *pump[T]) seal(_ context.Context, s blocks.Span) (int, []part, func(), error) {
	rows := p.rows
	p.rows = nil
	return len(rows), p.parts(rows, s), nil, nil
}

// beyond says so of what read refuses for that reason.
func (p *pump[T]) beyond() *quota.NewerError {
	var newer *quota.NewerError
	errors.As(p.err, &newer)
	return newer
}

func (*pump[T]) snapshot(uint64, string) []byte         { return nil }
func (*pump[T]) restore([]byte, string) (uint64, error) { return 0, nil }

func position(m ledger.Message) history.Position {
	return history.Position{Sequence: m.Sequence, Time: streamTime(m)}
}

const decisionsSubject = "$KV." + ledger.DecisionsBucket + "."

// readDecision reads an entry of KV_decisions: a revision of a decision, or a
// checkpoint, which is none.
func readDecision(m ledger.Message) (history.DecisionRow, bool, error) {
	key, ok := strings.CutPrefix(m.Subject, decisionsSubject)
	if !ok || strings.HasPrefix(key, "checkpoint.") || m.Header.Get("KV-Operation") != "" || len(m.Data) == 0 {
		return history.DecisionRow{}, false, nil
	}
	d, err := ledger.UnmarshalDecision(m.Data)
	return history.DecisionRow{Position: position(m), Decision: d}, true, err
}

// act is a control entry, and what it corrects, if it does.
type act struct {
	history.ControlRow
	correction *history.CorrectionRow
}

// actRows tells acts and corrections apart.
func actRows(all []act) (rows []history.ControlRow, corrections []history.CorrectionRow) {
	for i := range all {
		rows = append(rows, all[i].ControlRow)
		if all[i].correction != nil {
			corrections = append(corrections, *all[i].correction)
		}
	}
	return rows, corrections
}

// readControl reads a control or closing entry of the ledger.
func readControl(m ledger.Message) (act, bool, error) {
	kind, shard, err := ledger.ParseSubject(m.Subject)
	if err != nil || kind != ledger.KindControl && kind != ledger.KindClosing {
		return act{}, false, nil
	}
	e, err := ledger.DecodeAct(kind, m.Header, m.Data)
	if err != nil {
		return act{}, true, err
	}
	if newer := seen.Beyond(shard, m.Sequence, e); newer != nil {
		// What acts after it mean, and which corrections count, a newer program knows.
		return act{}, true, newer
	}
	var out act
	row := &out.ControlRow
	*row = history.ControlRow{Position: position(m), Shard: shard, ID: e.GetId(), Author: e.GetAuthor(), CreatedAt: usage.Micros(e.GetCreatedAtUnixMicros())}
	switch e.GetBody().(type) {
	case *tollkeeperv1.ControlEntry_Tick:
		// One a second and shard, and nobody's act: they say that time passed.
		return out, false, nil
	case *tollkeeperv1.ControlEntry_ClockAdvance:
		if m.TestClock {
			return out, false, nil // likewise, of a test clock
		}
		row.Kind = "clock_advance" // a dead letter of the aggregator's
	case *tollkeeperv1.ControlEntry_PlanSet:
		row.Kind = "plan_set"
	case *tollkeeperv1.ControlEntry_AccountSet:
		row.Kind = "account_set"
	case *tollkeeperv1.ControlEntry_ProducerClosed:
		row.Kind = "producer_closed"
	case *tollkeeperv1.ControlEntry_Correction:
		row.Kind = "correction"
		out.correction = acts.Correction(&m, row, e.GetCorrection())
	case *tollkeeperv1.ControlEntry_CoreVersion:
		row.Kind = "core_version"
	default:
		row.Kind = "unknown" // a newer writer's
	}
	body, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(e)
	if err != nil {
		return out, true, &usage.InvalidError{Reason: usage.ReasonMalformed, Message: "the control entry can't be written as JSON: " + err.Error()}
	}
	// protojson varies its spaces on purpose; a row must come out the same.
	compact, err := compactJSON(body)
	row.Body = compact
	return out, true, err
}

// readAlert reads a transition of an episode.
func readAlert(m ledger.Message) (history.AlertRow, bool, error) {
	row := history.AlertRow{Position: position(m)}
	if err := json.Unmarshal(m.Data, &row.Alert); err != nil {
		return row, true, &usage.InvalidError{Reason: usage.ReasonMalformed, Message: "the alert is not JSON: " + err.Error()}
	}
	var err error
	row.Body, err = compactJSON(m.Data)
	return row, true, err
}

func compactJSON(data []byte) (string, error) {
	var v json.RawMessage = data
	out, err := json.Marshal(v) // compacts
	if err != nil {
		return "", &usage.InvalidError{Reason: usage.ReasonMalformed, Message: "not JSON: " + err.Error()}
	}
	return string(out), nil
}
