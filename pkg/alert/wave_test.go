package alert

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// scene plays accounts, second by second, against the default rule.
type scene struct {
	t   *testing.T
	d   *Ratio
	now usage.Micros
	got []usage.Alert
}

func newScene(t *testing.T) *scene {
	t.Helper()
	return &scene{t: t, d: newRatio(t, DefaultRule()), now: day}
}

// play lets time pass; each is asked in every second s for the accounts that call in it.
func (s *scene) play(seconds int, each func(s int, call func(from, to int, code usage.Code))) {
	s.t.Helper()
	for i := range seconds {
		s.got = append(s.got, s.d.Advance(s.now, s.now)...)
		each(i, func(from, to int, code usage.Code) {
			for a := from; a < to; a++ {
				s.d.Observe(fmt.Appendf(nil, "a%d", a), code, s.now)
			}
		})
		s.now += second
	}
}

// told returns the transitions since it was asked last, in short.
func (s *scene) told() string {
	var parts []string
	for _, a := range s.got {
		part := string(a.Transition)
		if a.Reason != "" {
			part += " " + a.Reason
		}
		parts = append(parts, part)
	}
	s.got = nil
	return strings.Join(parts, ", ")
}

func (s *scene) want(what, told string) []usage.Alert {
	s.t.Helper()
	got := s.got
	if is := s.told(); is != told {
		s.t.Fatalf("%s: %q, want %q\n%+v", what, is, told, got)
	}
	return got
}

const denied = usage.QuotaExceeded

// peace is a system of which nothing is to be told: 60 accounts call every second.
func peace(_ int, call func(from, to int, code usage.Code)) { call(0, 60, "") }

// spike is the same with 12 accounts refused, who try again every second.
func spike(_ int, call func(from, to int, code usage.Code)) { call(12, 60, ""); call(0, 12, denied) }

func TestNothingResolvesWhileItsAccountsAreStillRefused(t *testing.T) {
	t.Parallel()
	for name, refused := range map[string]func(s int, call func(from, to int, code usage.Code)){
		"they try again every second": spike,
		"they try again every 90 s, which is longer than the window": func(s int, call func(from, to int, code usage.Code)) {
			call(12, 60, "")
			if s%90 == 0 {
				call(0, 12, denied)
			}
		},
		"they try again one after the other": func(s int, call func(from, to int, code usage.Code)) {
			call(12, 60, "")
			if s < 5 {
				call(0, 12, denied)
			}
			if s%10 == 0 {
				call(s/10%12, s/10%12+1, denied)
			}
		},
		"others come, so that they are few by then": func(s int, call func(from, to int, code usage.Code)) {
			spike(s, call)
			if s > 20 {
				call(60, 600, "")
			}
		},
		"they are admitted to something else": func(_ int, call func(from, to int, code usage.Code)) {
			call(0, 60, "")
			call(0, 12, denied)
		},
		"half of them recovers, and is no tenth": func(s int, call func(from, to int, code usage.Code)) {
			if s < 20 {
				spike(s, call)
				return
			}
			call(6, 60, "")
			call(0, 6, denied)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t)
			s.play(120, peace)
			s.play(1200, refused)
			s.want("20 minutes", "firing")
			s.play(600, peace)
			a := s.want("10 minutes of peace", "resolved recovered")[0]
			if a.StillRefused != 0 || len(a.Accounts) != 0 || !strings.HasPrefix(a.Summary, "no account of this alert gets 402s any more, of 1") {
				t.Errorf("%+v", a)
			}
		})
	}
}

func TestEveryWaveIsTold(t *testing.T) {
	t.Parallel()
	t.Run("other accounts while the first are still refused", func(t *testing.T) {
		t.Parallel()
		s := newScene(t)
		s.play(120, peace)
		s.play(300, spike)
		first := s.want("the first", "firing")[0]
		s.play(30, func(_ int, call func(from, to int, code usage.Code)) { call(32, 60, ""); call(0, 32, denied) })
		got := s.want("the second", "resolved new_wave, firing")
		if got[0].StartedAt != first.StartedAt || got[1].StartedAt <= first.At || got[1].Refused != 20 || got[1].StillRefused != 32 {
			t.Errorf("%+v", got)
		}
		if want := "not over: 32 accounts are refused with 402; a new wave has begun, with an alert of its own"; got[0].Summary != want {
			t.Errorf("%q", got[0].Summary)
		}
		if want := "20 of 60 active accounts (33%) began to be refused with 402 within 1m, the threshold is 20%; codes: QUOTA_EXCEEDED 20; 12 of the wave before are still refused"; got[1].Summary != want {
			t.Errorf("%q", got[1].Summary)
		}
		// The second mended, the first not: it is not over.
		s.play(600, spike)
		s.want("12 are left", "")
		s.play(600, peace)
		s.want("peace", "resolved recovered")
	})
	t.Run("the same accounts after they had recovered", func(t *testing.T) {
		t.Parallel()
		s := newScene(t)
		s.play(120, peace)
		s.play(60, spike)
		s.play(120, peace)
		s.want("the first", "firing, resolved recovered")
		s.play(30, spike)
		s.want("the second, sooner than quiet is over", "firing")
		s.play(120, peace)
		s.want("peace", "resolved recovered")
	})
	t.Run("the same accounts while others are still refused", func(t *testing.T) {
		t.Parallel()
		s := newScene(t)
		s.play(120, peace)
		both := func(_ int, call func(from, to int, code usage.Code)) { call(32, 60, ""); call(0, 32, denied) }
		s.play(120, both)
		s.want("the first", "firing")
		s.play(150, spike) // 20 of them recover
		s.want("20 are mended", "")
		s.play(30, both)
		got := s.want("and refused again", "resolved new_wave, firing")
		if want := "20 of 60 active accounts (33%) are refused with 402 again since the last wave was over, the threshold is 20%; codes: QUOTA_EXCEEDED 32; 12 of the wave before are still refused"; got[1].Summary != want {
			t.Errorf("%q", got[1].Summary)
		}
	})
	t.Run("a leak while the first are still refused", func(t *testing.T) {
		t.Parallel()
		s := newScene(t)
		s.play(120, peace)
		s.play(180, spike)
		s.want("the first", "firing")
		s.play(14*60, func(i int, call func(from, to int, code usage.Code)) {
			call(12+i/60, 60, "")
			call(0, 12+i/60, denied) // one more every minute
		})
		s.want("a leak of 12", "resolved new_wave, firing")
	})
	t.Run("one wave that grows is one", func(t *testing.T) {
		t.Parallel()
		s := newScene(t)
		s.play(120, peace)
		s.play(300, func(i int, call func(from, to int, code usage.Code)) {
			n := min(12+i/5, 60)
			call(n, 60, "")
			call(0, n, denied)
		})
		s.want("all of them within five minutes", "firing")
	})
}

func TestWhatWasRefusedBeforeKeepsNoAlertOpen(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	chronic := func(_ int, call func(from, to int, code usage.Code)) { call(4, 60, ""); call(0, 4, denied) }
	s.play(600, chronic)
	s.want("four are no incident", "")
	s.play(60, func(_ int, call func(from, to int, code usage.Code)) { call(24, 60, ""); call(0, 24, denied) })
	if a := s.want("20 more", "firing")[0]; a.Refused != 20 || a.RefusedBefore != 4 || !strings.HasSuffix(a.Summary, "; 4 others were refused before it began") {
		t.Errorf("%+v", a)
	}
	s.play(180, chronic)
	a := s.want("the 20 are mended", "resolved recovered")[0]
	if want := "no account of this alert gets 402s any more, of 20; 4 others were refused before it began"; a.Summary != want || len(a.Accounts) != 4 {
		t.Errorf("%q %+v", a.Summary, a.Accounts)
	}
}

func TestAResolveSaysWhoIsStillRefusedAndWhyThatIsNoIncident(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		peak, left int
		want       string
	}{
		{12, 2, "2 accounts are still refused with 402, of 12: an incident has 5 or more"},
		{50, 5, "5 accounts are still refused with 402, of 50: at most a tenth is left, which keeps no alert open"},
	} {
		s := newScene(t)
		s.play(120, peace)
		s.play(60, func(_ int, call func(from, to int, code usage.Code)) { call(c.peak, 60, ""); call(0, c.peak, denied) })
		s.play(300, func(_ int, call func(from, to int, code usage.Code)) { call(c.left, 60, ""); call(0, c.left, denied) })
		got := s.want("all but a few are mended", "firing, resolved recovered")
		if a := got[1]; a.Summary != c.want || a.StillRefused != c.left || len(a.Accounts) != c.left || a.Codes[0].Accounts != c.left {
			t.Errorf("%q %+v", a.Summary, a)
		}
	}
}

func TestAccountsThatNeverCallAgainKeepAnAlertOpenUntilQuietIsOver(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.play(120, peace)
	s.play(10, spike)
	s.play(280, func(_ int, call func(from, to int, code usage.Code)) { call(12, 60, "") })
	s.want("they may be waiting", "firing")
	s.play(60, func(_ int, call func(from, to int, code usage.Code)) { call(12, 60, "") })
	s.want("they have gone", "resolved recovered")
}

// An account that hits a limit by the minute in every minute is refused again and again,
// and that is no news: outside of an episode it begins once.
func TestALimitByTheMinuteIsNoNewWaveEveryMinute(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.play(3600, func(i int, call func(from, to int, code usage.Code)) {
		if i%60 < 40 {
			peace(i, call)
			return
		}
		call(0, 60, "") // of another model
		call(0, 30, denied)
	})
	s.want("an hour", "firing")
}

func TestAnAlerterThatStartsWithinAnIncidentSaysSo(t *testing.T) {
	t.Parallel()
	start := func(refused int) *scene {
		s := newScene(t)
		s.d.Restore(Memory{EvaluatedTo: day + 400*second, Blind: true}) // what was before is only read
		s.play(430, func(_ int, call func(from, to int, code usage.Code)) { call(refused, 60, ""); call(0, refused, denied) })
		return s
	}
	s := start(12)
	a := s.want("12 are refused", "firing")[0]
	if want := "12 of 60 active accounts (20%) are refused with 402, since before the alerter watched, the threshold is 20%; codes: QUOTA_EXCEEDED 12"; a.Summary != want || len(a.Accounts) != 10 {
		t.Errorf("%q %+v", a.Summary, a)
	}
	s.play(300, peace)
	s.want("they are mended", "resolved recovered")

	s = start(4)
	s.want("4 are no incident", "")
	s.play(60, func(_ int, call func(from, to int, code usage.Code)) { call(12, 60, ""); call(0, 12, denied) })
	s.want("8 of 60 begin, which are few", "")
}

// Between the two transitions of a new wave the alerter was killed: the second is told
// by the next.
func TestANewWaveIsToldThoughTheAlerterDiesBeforeIt(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.play(120, peace)
	s.play(300, spike)
	both := func(_ int, call func(from, to int, code usage.Code)) { call(32, 60, ""); call(0, 32, denied) }
	s.play(30, both)
	got := s.want("two waves", "firing, resolved new_wave, firing")
	s.d.Adopt(&got[1]) // it was the last that was stored
	s.play(30, both)
	again := s.want("the second", "firing")[0]
	if again.RefusedBefore != 0 || again.StillRefused != 32 {
		t.Errorf("%+v", again)
	}
	s.play(600, spike)
	s.want("12 are left", "")
}

func TestWhatAnotherAlerterStoredIsWhatThisOneGoesOnFrom(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.play(120, peace)
	s.play(300, spike)
	s.play(30, func(_ int, call func(from, to int, code usage.Code)) { call(32, 60, ""); call(0, 32, denied) })
	memory := s.d.Memory()
	got := s.want("two waves", "firing, resolved new_wave, firing")
	for i := range got {
		got[i].At = min(got[i].At, memory.EvaluatedTo)
		s.d.Adopt(&got[i])
	}
	if after := s.d.Memory(); after.Started != memory.Started || after.Before != memory.Before || !after.Firing || after.Peak != memory.Peak {
		t.Errorf("%+v became %+v", memory, after)
	}
}

func TestTheTextsOfALagAndOfNoTraffic(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.play(120, peace)
	s.play(10, spike)
	s.now += 1000 * second
	s.play(1, peace)
	got := s.want("nothing was called for long", "firing, resolved no_traffic")
	if want := "no calls for 10m: whether accounts are still refused is not known"; got[1].Summary != want {
		t.Errorf("%q", got[1].Summary)
	}
	for _, a := range got {
		if strings.Contains(a.Summary, "recovered") || time.Duration(a.LagSeconds) != 0 {
			t.Errorf("%+v", a)
		}
	}
}
