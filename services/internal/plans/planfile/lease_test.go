package planfile

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

func leasedPlan(tier string, lease *Lease) *Document {
	return &Document{Version: 1, Plans: []Plan{{ID: "p", Limits: []Limit{{ID: "l", Meter: "calls", Window: "day", Amount: 100, Tier: tier, Lease: lease}}}}}
}

func TestALeaseIsOfTheTiersThatHaveOne(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ limit, want string }{
		"eventual with a lease": {"tier: eventual, lease: {term: 5s}",
			"a limit of the tier eventual has no lease: leave it out, or write tier: exact or tier: leased"},
		"no tier with a lease": {"lease: {term: 5s}",
			"a limit of the tier eventual has no lease: leave it out, or write tier: exact or tier: leased"},
		"leased without its bound": {"tier: leased, lease: {term: 5s, release_after: 30s}",
			`the lease has no max_exposure: add it, or write tier: exact: a silent gateway's share is then never handed out twice`},
		"leased without a lease": {"tier: leased",
			`the lease has no release_after: add it, or write tier: exact: a silent gateway's share is then never handed out twice` + "\n" +
				`the lease has no max_exposure: add it, or write tier: exact: a silent gateway's share is then never handed out twice`},
		"exact that is released": {"tier: exact, lease: {release_after: 30s}",
			"release_after would let an exact limit be exceeded: leave it out, or write tier: leased"},
		"exact with an exposure": {"tier: exact, lease: {max_exposure: 1}",
			"max_exposure would let an exact limit be exceeded: leave it out, or write tier: leased"},
		"no span":              {"tier: exact, lease: {term: soon}", "term is not a span of time: write it like 5s, 400ms or 1m30s"},
		"a number":             {"tier: exact, lease: {term: 5}", "term is a number, not text: put it in quotes"},
		"a short term":         {"tier: exact, lease: {term: 900ms}", "term is 900ms: write at least 1s"},
		"a long term":          {"tier: exact, lease: {term: 25h}", "term is 25h: write at most 24h0m0s"},
		"a term beyond time":   {"tier: exact, lease: {term: 99999999999h}", "term is not a span of time: write it like 5s, 400ms or 1m30s"},
		"half microseconds":    {"tier: exact, lease: {term: 1000000500ns}", "term is 1000000500ns: write whole microseconds"},
		"little patience":      {"tier: exact, lease: {patience: 40ms}", "patience is 40ms: write at least 50ms"},
		"more patience":        {"tier: exact, lease: {term: 1s, patience: 1s}", "patience is 1s and the term 1s: write a patience below the term"},
		"more than by default": {"tier: exact, lease: {patience: 6s}", "patience is 6s and the term 5s: write a patience below the term"},
		"released at once":     {"tier: leased, lease: {release_after: 10ms, max_exposure: 1}", "release_after is 10ms: write at least 1s"},
		"no exposure":          {"tier: leased, lease: {release_after: 10s, max_exposure: 0}", "max_exposure is below 1: write a number from 1 on"},
		"another field":        {"tier: exact, lease: {terms: 5s}", `"terms" is not a field of a lease: known are term, patience, release_after, max_exposure`},
		"another tier":         {"tier: strict", `tier "strict" is not known: use one of eventual, exact, leased`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := Parse("f.yaml", []byte("version: 1\nplans: [{id: p, limits: [{id: l, meter: calls, window: day, amount: 100, "+c.limit+"}]}]\n"))
			var bad *Error
			if !errors.As(err, &bad) {
				t.Fatalf("got %v", err)
			}
			var got []string
			for _, p := range bad.Problems {
				if p.Line != 2 || !strings.HasPrefix(p.Pointer, "/plans/0/limits/0/") {
					t.Errorf("the problem is told of %d:%d, %s", p.Line, p.Column, p.Pointer)
				}
				got = append(got, p.Reason+": "+p.Do)
			}
			if diff := cmp.Diff(c.want, strings.Join(got, "\n")); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestTermsOfALeaseAreInTheWordsOfTheCore(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		tier  string
		lease *Lease
		want  usage.LeaseTerms
	}{
		"eventual": {"", nil, usage.LeaseTerms{}},
		"defaults": {"exact", nil, usage.LeaseTerms{Term: 5e6, Patience: 4e5}},
		"some":     {"exact", &Lease{Term: "1m30s"}, usage.LeaseTerms{Term: 90e6, Patience: 4e5}},
		"leased": {"leased", &Lease{Term: "2s", Patience: "100ms", ReleaseAfter: "30s", MaxExposure: 7},
			usage.LeaseTerms{Term: 2e6, Patience: 1e5, ReleaseAfter: 30e6, MaxExposure: 7}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			doc := leasedPlan(c.tier, c.lease)
			if got := doc.Plans[0].Limits[0].Usage().Lease; got != c.want {
				t.Errorf("got %+v", got)
			}
			if got := doc.Canonical().Plans[0].Limits[0].Usage().Lease; got != c.want {
				t.Errorf("the canonical form says %+v", got)
			}
		})
	}
}

func TestTheSameTermsAreTheSameVersion(t *testing.T) {
	t.Parallel()
	plain, written := leasedPlan("exact", nil), leasedPlan("exact", &Lease{Term: "5000ms", Patience: "0.4s"})
	if Version(plain) != Version(written) {
		t.Error("defaults written out in another way are another version")
	}
	if Version(plain) == Version(leasedPlan("", nil)) || Version(plain) == Version(leasedPlan("exact", &Lease{Term: "6s"})) {
		t.Error("another tier or term is the same version")
	}
}

func TestADifferenceTellsTheTerms(t *testing.T) {
	t.Parallel()
	got := Compare(leasedPlan("", nil), leasedPlan("leased", &Lease{ReleaseAfter: "30s", MaxExposure: 100})).String()
	want := `~ plan p
    ~ limit l
        tier: eventual → leased
        lease.term: (none) → 5s
        lease.patience: (none) → 400ms
        lease.release_after: (none) → 30s
        lease.max_exposure: (none) → 100
accounts  0 added, 0 changed, 0 removed, 0 unchanged
keys      0 added, 0 changed, 0 removed, 0 unchanged
plans     0 added, 1 changed, 0 removed, 0 unchanged
limits    0 added, 1 changed, 0 removed, 0 unchanged`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestEveryTierOfTheFileIsTakenByTheCore(t *testing.T) {
	t.Parallel()
	doc, err := Parse("f.yaml", []byte(`version: 1
plans:
  - id: p
    limits:
      - {id: a, meter: calls, window: day, amount: 100, tier: exact}
      - {id: b, meter: calls, window: minute, amount: 10, tier: exact, code: RATE_LIMITED, lease: {term: 1s, patience: 50ms}}
      - {id: c, meter: output_tokens, window: lifetime, amount: 100, tier: leased, lease: {term: 24h, release_after: 24h, max_exposure: 9_007_199_254_740_992}}
      - {id: d, meter: cost, window: month, amount: 90_000_000_000_000_000, tier: eventual}
`))
	if err != nil {
		t.Fatal(err)
	}
	if err := Check(doc.Canonical()); err != nil {
		t.Errorf("written out: %v", err)
	}
}
