package alerter

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

var errCrash = errors.New("the process is dead")

// fault ends a process at its nth step, before or after the step took effect.
type fault struct {
	step  int // the step at which to die, from 0
	after bool
	n     int
	dead  bool
}

// do runs a step, or the process's death.
func (f *fault) do(step func() error) error {
	if f.dead {
		return errCrash
	}
	die := f.n == f.step
	f.n++
	if die && !f.after {
		f.dead = true
		return errCrash
	}
	err := step()
	if die {
		f.dead = true
		return errCrash
	}
	return err
}

type faultyStore struct {
	stateStore
	f *fault
}

func (s faultyStore) Get(ctx context.Context, key string) (e jetstream.KeyValueEntry, err error) {
	err = s.f.do(func() error { e, err = s.stateStore.Get(ctx, key); return err })
	return e, err
}

func (s faultyStore) Create(ctx context.Context, key string, value []byte, opts ...jetstream.KVCreateOpt) (rev uint64, err error) {
	err = s.f.do(func() error { rev, err = s.stateStore.Create(ctx, key, value, opts...); return err })
	return rev, err
}

func (s faultyStore) Update(ctx context.Context, key string, value []byte, revision uint64) (rev uint64, err error) {
	err = s.f.do(func() error { rev, err = s.stateStore.Update(ctx, key, value, revision); return err })
	return rev, err
}

type faultyLog struct {
	transitionLog
	f *fault
}

func (l faultyLog) Last(ctx context.Context, episode string) (n int, seq uint64, err error) {
	err = l.f.do(func() error { n, seq, err = l.transitionLog.Last(ctx, episode); return err })
	return n, seq, err
}

func (l faultyLog) Append(ctx context.Context, m *nats.Msg, expected uint64) (seq uint64, err error) {
	err = l.f.do(func() error {
		// The window of Nats-Msg-Id is over: nothing may rest on it.
		m.Header.Del(jetstream.MsgIDHeader)
		seq, err = l.transitionLog.Append(ctx, m, expected)
		return err
	})
	return seq, err
}

// life is the transitions that the fold of one ledger gives, for one rule.
func life(rule string) []usage.Alert {
	var all []usage.Alert
	for i := range 2 {
		start := usage.Micros(1_700_000_000_000_000 + i*100_000_000)
		all = append(all,
			usage.Alert{Transition: usage.AlertFiring, Rule: rule, Scope: "global", StartedAt: start, At: start + 5_000_000, Summary: fmt.Sprintf("firing %d", i)},
			usage.Alert{Transition: usage.AlertResolved, Rule: rule, Scope: "global", StartedAt: start, At: start + 50_000_000, Summary: fmt.Sprintf("resolved %d", i)})
	}
	// A new wave: its firing is of the same moment as the resolve.
	end := &all[len(all)-1]
	end.Reason = usage.ResolvedNewWave
	return append(all, usage.Alert{Transition: usage.AlertFiring, Rule: rule, Scope: "global", StartedAt: end.At - 1_000_000, At: end.At, Summary: "firing 2"})
}

// appended returns what ALERTS holds of a rule, without ids.
func appended(t *testing.T, b *bed, rule string) []string {
	t.Helper()
	stream, err := b.js.Stream(t.Context(), ledger.AlertsStream)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, episode := range []usage.Alert{life(rule)[0], life(rule)[2], life(rule)[4]} {
		c, err := stream.CreateConsumer(t.Context(), jetstream.ConsumerConfig{FilterSubject: alertSubject(episodeID(rule, "global", episode.StartedAt)), AckPolicy: jetstream.AckNonePolicy})
		if err != nil {
			t.Fatal(err)
		}
		n := int(c.CachedInfo().NumPending)
		batch, err := c.Fetch(max(n, 1), jetstream.FetchMaxWait(deadline))
		if n == 0 {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		for m := range batch.Messages() {
			var a usage.Alert
			if err := jsonInto(m.Data(), &a); err != nil {
				t.Fatal(err)
			}
			all = append(all, fmt.Sprintf("%d %s", a.N, a.Summary))
		}
	}
	return all
}

// A process dies before and after every single step of two episodes' lives; the
// next one goes on from a position before all of it. Nothing is lost, nothing
// is there twice, and nothing rests on Nats-Msg-Id.
func TestACrashBetweenAnyTwoStepsNeitherLosesNorDoublesATransition(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	kv, err := b.js.KeyValue(t.Context(), ledger.AlerterBucket)
	if err != nil {
		t.Fatal(err)
	}
	want := "[1 firing 0 2 resolved 0 1 firing 1 2 resolved 1 1 firing 2]"
	crashes := 0
	for _, after := range []bool{false, true} {
		for step := 0; ; step++ {
			rule := fmt.Sprintf("rule-%d-%t", step, after)
			f := &fault{step: step, after: after}
			mortal := &journal{kv: faultyStore{kv, f}, log: faultyLog{alertsLog{b.js}, f}}
			whole := true
			for _, a := range life(rule) {
				if _, _, err := mortal.commit(t.Context(), a); err != nil {
					if !errors.Is(err, errCrash) {
						t.Fatal(err)
					}
					whole = false
					break
				}
			}
			// The next process, which never dies. Were it to die too, the
			// step after its death is one of those of another round.
			j := &journal{kv: kv, log: alertsLog{b.js}}
			if _, err := j.recover(t.Context(), rule, "global"); err != nil {
				t.Fatal(err)
			}
			for _, a := range life(rule) {
				if _, _, err := j.commit(t.Context(), a); err != nil {
					t.Fatal(err)
				}
			}
			if got := fmt.Sprint(appended(t, b, rule)); got != want {
				t.Errorf("died at step %d (after it: %t): ALERTS holds %s", step, after, got)
			}
			if whole {
				break
			}
			crashes++
		}
	}
	if crashes < 30 {
		t.Errorf("only %d steps were tried", crashes)
	}
	t.Logf("%d crashes", crashes)
}

// slow lets another alerter do everything just before a step.
type slow struct {
	stateStore
	before func()
}

func (s slow) Update(ctx context.Context, key string, value []byte, revision uint64) (uint64, error) {
	if s.before != nil {
		s.before()
	}
	return s.stateStore.Update(ctx, key, value, revision)
}

func TestAnAlerterThatIsOvertakenTakesOverWhatTheOtherWrote(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	kv, err := b.js.KeyValue(t.Context(), ledger.AlerterBucket)
	if err != nil {
		t.Fatal(err)
	}
	all := life("rule")
	other := &journal{kv: kv, log: alertsLog{b.js}}
	mine := &journal{kv: kv, log: alertsLog{b.js}}
	if _, made, err := mine.commit(t.Context(), all[0]); err != nil || !made {
		t.Fatal(made, err)
	}
	once := true
	mine.kv = slow{kv, func() {
		if once {
			once = false
			if _, made, err := other.commit(t.Context(), all[1]); err != nil || !made {
				t.Error(made, err)
			}
		}
	}}
	if _, _, err := mine.commit(t.Context(), all[1]); !errors.Is(err, errConflict) {
		t.Fatalf("overtaken: %v", err)
	}
	s, made, err := mine.commit(t.Context(), all[1])
	if err != nil || made || s.Alert.Transition != usage.AlertResolved || s.Alert.N != 2 {
		t.Fatalf("%+v %t %v", s, made, err)
	}

	// The same breach, seen to begin a step later by the other one.
	late := all[0]
	late.StartedAt += 1_000_000
	if s, made, err := mine.commit(t.Context(), late); err != nil || made || s.firing() {
		t.Fatalf("an episode that is over began again: %+v %t %v", s, made, err)
	}
	// A resolve of an episode that is not the open one changes nothing.
	if _, made, err := other.commit(t.Context(), all[2]); err != nil || !made {
		t.Fatal(made, err)
	}
	if s, made, err := mine.commit(t.Context(), all[1]); err != nil || made || !s.firing() {
		t.Fatalf("%+v %t %v", s, made, err)
	}
}
