package fleet

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestAPlanIsBalancedAndMovesNoMoreThanBalanceNeeds(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var members []string
		for i := range rapid.IntRange(1, 9).Draw(t, "members") {
			members = append(members, fmt.Sprintf("m%d", i))
		}
		owner := rapid.SliceOfN(rapid.IntRange(nobody, len(members)-1), 1, 100).Draw(t, "owner")
		target := plan(owner, members, func(int, uint32) bool { return false })
		had, has, kept := make([]int, len(members)), make([]int, len(members)), make([]int, len(members))
		for s := range owner {
			has[target[s]]++
			if owner[s] != nobody {
				had[owner[s]]++
				if owner[s] == target[s] {
					kept[owner[s]]++
				}
			}
		}
		low, high := len(owner)/len(members), (len(owner)+len(members)-1)/len(members)
		if slices.Min(has) < low || slices.Max(has) > high {
			t.Fatalf("%v of %d shards", has, len(owner))
		}
		for m := range members {
			// Who has no more than its share gives nothing away.
			if kept[m] < min(had[m], low) {
				t.Fatalf("%s had %d and keeps %d, its share is %d to %d", members[m], had[m], kept[m], low, high)
			}
		}
		if again := plan(target, members, func(int, uint32) bool { return false }); !slices.Equal(again, target) {
			t.Fatalf("a plan of a plan moves shards: %v, %v", target, again)
		}
	})
}

func TestAPlanGivesAShardToNobodyWhoDeclinesIt(t *testing.T) {
	t.Parallel()
	members := []string{"a", "b", "c"}
	declines := func(m int, s uint32) bool { return s == 1 && m != 2 || s == 2 }
	target := plan([]int{0, 0, 0, 0, nobody, nobody}, members, declines)
	if target[1] != 2 || target[2] != nobody {
		t.Errorf("got %v", target)
	}
}
