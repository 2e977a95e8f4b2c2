package historian

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/quota"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
	"github.com/tollkeeper/tollkeeper/services/internal/blocks"
	"github.com/tollkeeper/tollkeeper/services/internal/history"
)

var nopLog = zerolog.Nop()

type fataler interface{ Fatal(args ...any) }

// discard takes metrics that nobody asks for.
type discard struct{}

func (discard) Register(prometheus.Collector) error  { return nil }
func (discard) MustRegister(...prometheus.Collector) {}
func (discard) Unregister(prometheus.Collector) bool { return true }

type silent struct{}

func (silent) OK()             {}
func (silent) NotReady(string) {}

// table is a server's table as a lane sees it: rows and tokens, which a kill can
// tear apart.
type table struct {
	rows    int
	tokens  []string
	sent    []string
	trouble []func(t *table, token string) (handled bool, err error) // one an insert
}

func (t *table) Table() string { return "calls" }
func (t *table) Rows() int     { return 1 }

func (t *table) Insert(_ context.Context, token string) error {
	t.sent = append(t.sent, token)
	if len(t.trouble) > 0 {
		do := t.trouble[0]
		t.trouble = t.trouble[1:]
		if handled, err := do(t, token); handled {
			return err
		}
	}
	if slices.Contains(t.tokens, token) {
		return nil
	}
	t.tokens = append(t.tokens, token)
	t.rows++
	return nil
}

func (t *table) Present(context.Context) (bool, error) {
	if t.rows > 1 {
		return false, history.ErrTorn
	}
	return t.rows == 1, nil
}

var errGone = errors.New("the connection is gone")

func testLane(t *testing.T) *lane {
	m, err := newMetrics(prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	return &lane{name: "calls", metrics: m, ready: silent{}, log: nopLog}
}

func TestAPartArrivesOnceWhateverTheServerKept(t *testing.T) {
	t.Parallel()
	type trouble = func(*table, string) (bool, error)
	for name, c := range map[string]struct {
		trouble []trouble
		doubt   bool
	}{
		"nothing happens": {},
		"nothing was kept": {trouble: []trouble{
			func(*table, string) (bool, error) { return true, errGone },
		}},
		"all was kept, the answer was lost": {trouble: []trouble{
			func(t *table, token string) (bool, error) {
				t.rows++
				t.tokens = append(t.tokens, token)
				return true, errGone
			},
		}},
		"the rows were kept, the token was not": {trouble: []trouble{
			func(t *table, _ string) (bool, error) { t.rows++; return true, errGone },
		}},
		"the token was kept, the rows were not": {trouble: []trouble{
			func(t *table, token string) (bool, error) { t.tokens = append(t.tokens, token); return true, errGone },
		}},
		"the token was kept twice without rows": {trouble: []trouble{
			func(t *table, token string) (bool, error) { t.tokens = append(t.tokens, token); return true, errGone },
			func(t *table, token string) (bool, error) { t.tokens = append(t.tokens, token); return true, errGone },
			func(t *table, token string) (bool, error) { t.tokens = append(t.tokens, token); return true, errGone },
		}},
		"an earlier process had sent it": {doubt: true, trouble: nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				tab := &table{trouble: c.trouble}
				if c.doubt {
					tab.rows = 1
				}
				if err := testLane(t).insert(t.Context(), t.Context(), tab, "token", c.doubt); err != nil {
					t.Fatal(err)
				}
				if tab.rows != 1 {
					t.Errorf("the part is there %d times; sent as %v", tab.rows, tab.sent)
				}
				if c.doubt && len(tab.sent) != 0 {
					t.Error("what was there was sent again")
				}
			})
		})
	}
}

func TestATornBlockStopsTheHistorian(t *testing.T) {
	t.Parallel()
	tab := &table{rows: 2}
	err := testLane(t).insert(t.Context(), t.Context(), tab, "token", true)
	if !errors.Is(err, history.ErrTorn) {
		t.Errorf("a block with rows too many gave %v", err)
	}
}

// memory is a journal without a NATS.
type memory struct {
	saved []boundary
	fail  int
}

func (m *memory) load(context.Context) (boundary, bool, error) { return boundary{}, false, nil }
func (m *memory) save(_ context.Context, b boundary) error {
	if m.fail > 0 {
		m.fail--
		return errGone
	}
	m.saved = append(m.saved, b)
	return nil
}

func TestABoundaryStandsBeforeItsBlockAndOnlyOneIsOpen(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := testLane(t)
		journal := &memory{fail: 3}
		l.journal = journal
		tab := &table{}
		boundariesAtInsert := []int{}
		note := func(*table, string) (bool, error) {
			boundariesAtInsert = append(boundariesAtInsert, len(journal.saved))
			tab.rows = 0 // the next block is another one
			return false, nil
		}
		tab.trouble = []func(*table, string) (bool, error){note, note}
		full := make(chan sealed)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- l.commitAll(ctx, full) }()
		for i := range uint64(2) {
			full <- sealed{Span: blocks.Span{From: i*10 + 1, To: i*10 + 10}, rows: 1, parts: []part{tab}, token: fmt.Sprint(i)}
			synctest.Wait()
			time.Sleep(time.Second) // the tries of the journal, in the bubble's own time
			synctest.Wait()
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if want := []int{1, 3}; !slices.Equal(boundariesAtInsert, want) {
			t.Errorf("blocks were sent after %v boundaries and marks, wanted %v", boundariesAtInsert, want)
		}
		var said []string
		for _, b := range journal.saved {
			said = append(said, fmt.Sprint(b.From, "-", b.To, " ", b.Done))
		}
		if want := []string{"1-10 false", "1-10 true", "11-20 false", "11-20 true"}; !slices.Equal(said, want) {
			t.Errorf("the journal says %v, wanted %v", said, want)
		}
	})
}

// said is what a lane last told of itself.
type said struct {
	ok   bool
	text string
}

func (s *said) OK()               { s.ok, s.text = true, "" }
func (s *said) NotReady(w string) { s.ok, s.text = false, w }

// By newer rules other calls may count twice, and other corrections count at all: what
// an older historian made of them would stand in the history for good.
func TestTheHistoryEndsWhereNewerRulesBeginUntilANewerHistorianGoesOn(t *testing.T) {
	t.Parallel()
	control := func(sequence uint64, e *tollkeeperv1.ControlEntry) ledger.Message {
		e.Id = fmt.Sprint(sequence)
		m, err := ledger.ControlMessage(1, e)
		if err != nil {
			t.Fatal(err)
		}
		return ledger.Message{Sequence: sequence, Time: time.Unix(1_763_370_000, 0), Subject: m.Subject, Header: m.Header, Data: m.Data}
	}
	rules := func(sequence uint64, version uint32) ledger.Message {
		return control(sequence, &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_CoreVersion{CoreVersion: &tollkeeperv1.CoreVersion{Version: version, ForeignHorizonMicros: 1}}})
	}
	calls := func(sequence uint64) ledger.Message {
		var b ledger.Builder
		b.Add(&usage.Call{Time: usage.OldestTimeMicros, Account: "a"})
		m := ledger.FrameMessage(0, b.Seal(ledger.Header{Producer: ksuid.KSUID{1}, Number: sequence}))
		return ledger.Message{Sequence: sequence, Time: time.Unix(1_763_370_000, 0), Subject: m.Subject, Header: m.Header, Data: m.Data}
	}
	lanes := map[string]func() gatherer{
		"calls": func() gatherer { return testCalls(t) },
		"control": func() gatherer {
			m, err := newMetrics(discard{})
			if err != nil {
				t.Fatal(err)
			}
			return &pump[act]{lane: "control", read: readControl, metrics: m, log: nopLog, parts: func([]act, blocks.Span) []part { return nil }}
		},
	}
	for name, gather := range lanes {
		// Also where an earlier historian had been beyond it.
		for _, committed := range []uint64{0, 5} {
			t.Run(fmt.Sprint(name, " after ", committed), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					l, told := testLane(t), &said{}
					l.ready, l.gather, l.limits = told, gather(), blocks.Limits{Rows: 100, Bytes: 1 << 20, Entries: 100, Age: time.Second, Stall: 10 * time.Second}
					in, out := make(chan ledger.Message, 5), make(chan sealed, 5)
					in <- rules(1, quota.CoreVersion)
					in <- calls(2)
					in <- rules(3, quota.CoreVersion+1)
					in <- calls(4)
					in <- control(5, &tollkeeperv1.ControlEntry{Body: &tollkeeperv1.ControlEntry_AccountSet{AccountSet: &tollkeeperv1.AccountSet{}}})
					ctx, cancel := context.WithCancel(t.Context())
					done := make(chan error, 1)
					go func() { done <- l.build(ctx, boundary{From: committed + 1, To: committed, Done: true}, in, out) }()
					time.Sleep(time.Minute) // in the bubble's own time: what is open is sealed by then
					synctest.Wait()
					l.works() // as after an insert that had to be repeated
					if told.ok || !strings.Contains(told.text, "run a newer version") {
						t.Errorf("it says: ready %t, %q", told.ok, told.text)
					}
					if len(in) != 2 {
						t.Errorf("%d entries are left where they are, wanted those two after", len(in))
					}
					var spans []blocks.Span
					for len(out) > 0 {
						spans = append(spans, (<-out).Span)
					}
					if want := []blocks.Span{{From: 1, To: 2}}; committed == 0 && !slices.Equal(spans, want) || committed > 0 && len(spans) > 0 {
						t.Errorf("sealed are %v", spans)
					}
					cancel()
					if err := <-done; !errors.Is(err, context.Canceled) {
						t.Error(err)
					}
				})
			})
		}
	}
}
