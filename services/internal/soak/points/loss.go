package points

import (
	"fmt"
	"slices"
	"time"

	"github.com/tollkeeper/tollkeeper/services/internal/soak/traffic"
)

// Loss says what killed gateways took with them.
type Loss struct {
	Calls int64 `json:"calls"`
	Kills int   `json:"gateway_kills"`
	// Most of one kill, and how long before its gateway's end the oldest of them
	// had been answered.
	Most   int64         `json:"most_of_one_kill"`
	Oldest time.Duration `json:"oldest_answered_before_ns"`
}

// unsealedFor is how long an answered call may be in its gateway's memory alone at
// most: an acknowledgement is waited for 5 s before the frame goes to disk.
const unsealedFor = 6 * time.Second

// Losses holds lost calls against the ends of gateways (sorted, in microseconds
// like Seen.Ended): only what a gateway had answered shortly before it was killed
// may be missing. It returns what is wrong with the others.
func Losses(seen []traffic.Seen, lost []int, ends [][]int64) (l Loss, wrong []string) {
	type kill struct{ gateway, number int }
	each := map[kill]int64{}
	for _, list := range ends {
		l.Kills += len(list)
	}
	for _, n := range lost {
		s := seen[n]
		var list []int64
		if int(s.Gateway) < len(ends) {
			list = ends[s.Gateway]
		}
		i, _ := slices.BinarySearch(list, s.Ended) // the first kill after the answer
		if i == len(list) {
			if len(wrong) < mostNamed {
				wrong = append(wrong, fmt.Sprintf("call %d was answered by gateway-%d, which was not killed after, and is lost", n, s.Gateway+1))
			}
			continue
		}
		l.Calls++
		k := kill{int(s.Gateway), i}
		each[k]++
		l.Most = max(l.Most, each[k])
		l.Oldest = max(l.Oldest, time.Duration(list[i]-s.Ended)*time.Microsecond)
	}
	if l.Oldest > unsealedFor {
		wrong = append(wrong, fmt.Sprintf("a lost call had been answered %s before its gateway was killed: frames are sent or spooled within %s", l.Oldest, unsealedFor))
	}
	return l, wrong
}
