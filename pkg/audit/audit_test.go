package audit

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/tollkeeper/tollkeeper/pkg/dedup"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

const start = usage.Micros(1_700_000_000_000_000)

// sent is a call with its place.
type sent struct {
	call   usage.Call
	minute Minute
	hash   uint64
}

func drawCalls(t *rapid.T) []sent {
	var out []sent
	for i := range rapid.IntRange(0, 40).Draw(t, "calls") {
		c := usage.Call{Account: rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(t, "account")}
		if rapid.IntRange(0, 3).Draw(t, "refused") == 0 {
			c.Code = usage.QuotaExceeded
		}
		c.Quantities.SetBuiltIn(usage.InputTokensIndex, rapid.Int64Range(0, 9).Draw(t, "tokens"))
		c.Quantities.Set("pages", rapid.Int64Range(0, 3).Draw(t, "pages"))
		out = append(out, sent{c, Minute(rapid.IntRange(0, 3).Draw(t, "minute")), RowHash(7, i)})
	}
	return out
}

func count(limit int, calls []sent) *Cells {
	c := NewCells(limit)
	for i := range calls {
		c.At(calls[i].minute, []byte(calls[i].call.Account)).Add(&calls[i].call, calls[i].hash)
	}
	return c
}

// TestTheSameCallsAgreeInWhateverOrderAndHoweverManyAreToldApart.
func TestTheSameCallsAgreeInWhateverOrderAndHoweverManyAreToldApart(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		calls := drawCalls(t)
		shuffled := rapid.Permutation(calls).Draw(t, "shuffled")
		a := count(rapid.IntRange(0, 20).Draw(t, "limit"), calls)
		b := count(rapid.IntRange(0, 20).Draw(t, "limit of the other"), shuffled)
		if d := Compare(a, b); d != nil {
			t.Fatalf("the same calls differ: %+v", d)
		}
	})
}

// TestOneCallLostDoubledOrChangedIsFound, with its minute and account wherever
// they are told apart.
func TestOneCallLostDoubledOrChangedIsFound(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		calls := drawCalls(t)
		if len(calls) == 0 {
			return
		}
		at := rapid.IntRange(0, len(calls)-1).Draw(t, "at")
		x := calls[at]
		other := slices.Clone(calls)
		want := Gap
		switch rapid.SampledFrom([]Kind{Gap, Double, Other}).Draw(t, "kind") {
		case Gap:
			other = slices.Delete(other, at, at+1)
		case Double:
			other, want = append(other, x), Double
		default:
			other[at].hash, want = RowHash(8, at), Other
		}
		d := Compare(count(1000, calls), count(1000, other))
		if len(d) != 1 || d[0].Minute != x.minute || d[0].Account != x.call.Account || d[0].Kind != want || d[0].Others {
			t.Fatalf("%s of %s in %d is found as %+v", want, x.call.Account, x.minute, d)
		}
		// Where accounts are summed up it is still found, in its minute.
		d = Compare(count(2, calls), count(1, other))
		if len(d) != 1 || d[0].Minute != x.minute || d[0].Kind != want {
			t.Fatalf("%s of %s in %d, summed up, is found as %+v", want, x.call.Account, x.minute, d)
		}
	})
}

// TestAClaimIsWhatWasAdded: frames are claimed with the rows that readers of
// them come to, through messages of any size.
func TestAClaimIsWhatWasAdded(t *testing.T) {
	t.Parallel()
	producer := dedup.Producer{1, 2, 3}
	const text = "2abcdefghijklmnopqrstuvwxyz"
	rapid.Check(t, func(t *rapid.T) {
		limit := rapid.IntRange(1, 20).Draw(t, "limit")
		l := NewLane(text, 3, limit)
		want := NewCells(limit)
		number, next := uint64(0), uint64(1)
		take := func() {
			claims := l.Take()
			if (len(claims) == 1) == want.Empty() || len(claims) == 1 && claims[0].Through != number {
				t.Fatalf("after frame %d the claims are %+v", number, claims)
			}
			if len(claims) == 0 {
				return
			}
			c := claims[0]
			got := NewCells(1000)
			for _, data := range Encode(producer, next, []Claim{c}) {
				m, err := Decode(data)
				if err != nil || m.Producer != producer || m.Number != next || len(m.Claims) != 1 || m.Claims[0].From != c.From || m.Claims[0].Through != c.Through {
					t.Fatalf("message %d is %+v: %v", next, m, err)
				}
				for x := range m.Claims[0].Cells.All() {
					got.Add(&x)
				}
				next++
			}
			if d := Compare(want, got); d != nil {
				t.Fatalf("the claim differs: %+v", d)
			}
			want = NewCells(limit)
		}
		for range rapid.IntRange(0, 5).Draw(t, "frames") {
			rows := drawCalls(t)
			if len(rows) == 0 {
				continue
			}
			number++
			minute := Minute(rapid.IntRange(0, 2).Draw(t, "minute"))
			for i := range rows {
				l.Add(number, &rows[i].call)
				want.At(minute, []byte(rows[i].call.Account)).Add(&rows[i].call, RowHash(FrameHash(ProducerHash(text), 3, number), i))
			}
			l.Seal(usage.Micros(minute) * 60_000_000)
			if rapid.Bool().Draw(t, "take") {
				take()
			}
		}
		take()
	})
}

func TestALargeClaimIsDividedAndItsEndIsKnown(t *testing.T) {
	t.Parallel()
	c := Claim{Shard: 1, From: 1, Through: 9, Cells: NewCells(100_000)}
	for i := range 20_000 {
		c.Cells.At(5, fmt.Appendf(nil, "account-%d-%s", i, strings.Repeat("x", i%200))).Plus(&Tally{Count: int64(i), Hash: Mix(uint64(i))})
	}
	small := Claim{Shard: 2, From: 4, Through: 4, Cells: NewCells(1)}
	small.Cells.At(5, []byte("a")).Count = 1
	messages := Encode(dedup.Producer{9}, 7, []Claim{c, small})
	if len(messages) < 3 {
		t.Fatalf("%d messages", len(messages))
	}
	got, ended := NewCells(100_000), 0
	for i, data := range messages {
		if len(data) > MaxMessage {
			t.Errorf("message %d has %d bytes", i, len(data))
		}
		m, err := Decode(data)
		if err != nil || m.Number != uint64(7+i) {
			t.Fatalf("message %d: number %d, %v", i, m.Number, err)
		}
		for _, part := range m.Claims {
			if !part.More {
				ended++
			}
			if part.Shard == 1 {
				for x := range part.Cells.All() {
					got.Add(&x)
				}
			}
		}
	}
	if d := Compare(c.Cells, got); d != nil || ended != 2 {
		t.Errorf("%d differences, %d ends", len(d), ended)
	}
}

func TestADamagedMessageIsRefused(t *testing.T) {
	t.Parallel()
	l := NewLane("p", 0, 10)
	l.Add(1, &usage.Call{Account: "a"})
	l.Seal(start)
	good := Encode(dedup.Producer{1}, 1, l.Take())[0]
	for i := range good {
		bad := slices.Clone(good)
		bad[i] ^= 1
		if m, err := Decode(bad); err == nil {
			t.Errorf("with byte %d changed it is read as %+v", i, m)
		}
		if m, err := Decode(good[:i]); err == nil {
			t.Errorf("cut off at %d it is read as %+v", i, m)
		}
	}
}

func TestAFrameThatWasBegunAndNeverSealedIsNotClaimed(t *testing.T) {
	t.Parallel()
	l := NewLane("p", 0, 10)
	l.Add(1, &usage.Call{Account: "a"})
	if c := l.Take(); c != nil {
		t.Errorf("claimed: %+v", c)
	}
	l.Seal(start)
	l.Seal(start) // nothing is open
	if c := l.Take(); len(c) != 1 || c[0].From != 1 || c[0].Through != 1 || c[0].Cells.Len() != 1 {
		t.Errorf("claimed: %+v", c)
	}
}

func TestFramesThatMayHaveBeenClaimedBeforeAreClaimedOneByOne(t *testing.T) {
	t.Parallel()
	l := NewLaneAgain("p", 2, 10)
	for _, number := range []uint64{4, 5, 9} {
		l.Add(number, &usage.Call{Account: "a"})
		l.Seal(start)
	}
	claims := l.Take()
	if len(claims) != 3 || claims[2].From != 9 || claims[2].Through != 9 || claims[2].Shard != 2 {
		t.Fatalf("claims: %+v", claims)
	}
	if m, err := Decode(Encode(dedup.Producer{1}, 1, claims)[0]); err != nil || len(m.Claims) != 3 || m.Claims[1].From != 5 {
		t.Errorf("%+v, %v", m, err)
	}
}

func TestWhatDiffersIsSaidInWords(t *testing.T) {
	t.Parallel()
	want := Tally{Count: 5, Refused: 1, Hash: 3}
	got := want
	got.Count, got.Refused = 3, 2
	got.Sums[usage.InputTokensIndex], got.Sums[Own] = -7, 2
	for _, c := range []struct {
		got  Tally
		want string
	}{
		{got, "-2 calls, +1 refused, input_tokens -7, own meters +2"},
		{Tally{Count: 5, Refused: 1, Hash: 4}, "the same number and sums of other calls"},
	} {
		if diff := cmp.Diff(c.want, Describe(&want, &c.got)); diff != "" {
			t.Error(diff)
		}
	}
	if s := MinuteOf(start).String(); s != "2023-11-14 22:13 UTC" {
		t.Error(s)
	}
	if MinuteOf(-1) != -1 {
		t.Error("before the epoch")
	}
}

// TestClaimsThatNobodyTakesAreBounded: a spool may be large, and the audit away.
func TestClaimsThatNobodyTakesAreBounded(t *testing.T) {
	t.Parallel()
	l := NewLaneAgain("p", 2, 10)
	frame := func(number uint64, accounts int) {
		for i := range accounts {
			l.Add(number, &usage.Call{Account: fmt.Sprint("a", i)})
		}
		l.Seal(start)
	}
	for number := range uint64(5) {
		frame(number+1, 4)
	}
	if claims := l.Take(); len(claims) != 2 || claims[1].Through != 2 {
		t.Errorf("waiting: %+v", claims)
	}
	frame(6, 20)
	frame(7, 1)
	if claims := l.Take(); len(claims) != 1 || claims[0].From != 6 || claims[0].Cells.Len() != 10 {
		t.Errorf("then: %+v", claims)
	}
}

// BenchmarkACallAtTheGateway is what the claim adds to a call's way.
func BenchmarkACallAtTheGateway(b *testing.B) {
	calls := make([]usage.Call, 1000)
	for i := range calls {
		calls[i].Account = fmt.Sprintf("account-%d", i%100)
		calls[i].Quantities.SetBuiltIn(usage.InputTokensIndex, int64(i))
	}
	l := NewLane("p", 0, 100_000)
	b.ReportAllocs()
	for i := range b.N {
		l.Add(uint64(i/500+1), &calls[i%1000])
		if i%500 == 499 {
			l.Seal(start)
		}
	}
}
