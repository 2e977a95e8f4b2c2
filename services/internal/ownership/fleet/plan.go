package fleet

import "slices"

// weight is how much a shard belongs to a member: the highest wins (rendezvous
// hashing). It depends on names only, so that all members agree and a member
// that comes back gets about what it had.
func weight(member string, shard uint32) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(member) {
		h = (h ^ uint64(member[i])) * 1099511628211
	}
	h ^= uint64(shard) * 0x9e3779b97f4a7c15
	// FNV alone leaves the last bytes in the low bits.
	h = (h ^ h>>30) * 0xbf58476d1ce4e5b9
	h = (h ^ h>>27) * 0x94d049bb133111eb
	return h ^ h>>31
}

const nobody = -1

// plan says who is to own each shard: the index of a member, or nobody when
// every member declines it. What has an owner stays there as far as balance
// allows (no member has two more than another), so that a member that joins is
// given at most its fair share and one that goes moves only what it had; which
// shards go where is by weight. members are sorted and not empty; owner has an
// index or nobody for each shard.
func plan(owner []int, members []string, declines func(member int, shard uint32) bool) []int {
	target := slices.Clone(owner)
	count := make([]int, len(members))
	for s, m := range target {
		if m != nobody && declines(m, uint32(s)) {
			target[s] = nobody
		} else if m != nobody {
			count[m]++
		}
	}
	low, more := len(owner)/len(members), len(owner)%len(members)
	full := 0 // members that have one more than low
	for _, n := range count {
		if n > low {
			full++
		}
	}
	for s, m := range target {
		if m != nobody {
			continue
		}
		best, spare := nobody, nobody
		for m := range members {
			switch {
			case declines(m, uint32(s)):
			case count[m] < low || count[m] == low && full < more:
				if best == nobody || weight(members[m], uint32(s)) > weight(members[best], uint32(s)) {
					best = m
				}
			case spare == nobody || count[m] < count[spare]:
				spare = m
			}
		}
		if best == nobody {
			best = spare
		}
		if best == nobody {
			continue
		}
		if count[best] == low {
			full++
		}
		target[s] = best
		count[best]++
	}
	// From whoever has most to whoever has least is the fewest moves.
	for range owner {
		from, to := 0, 0
		for m := range members {
			if count[m] > count[from] {
				from = m
			}
			if count[m] < count[to] {
				to = m
			}
		}
		if count[from]-count[to] < 2 {
			break
		}
		best := nobody
		for s, m := range target {
			if m == from && !declines(to, uint32(s)) && (best == nobody || weight(members[to], uint32(s)) > weight(members[to], uint32(best))) {
				best = s
			}
		}
		if best == nobody {
			break
		}
		target[best] = to
		count[from]--
		count[to]++
	}
	return target
}

// rank is a member's place among all for a shard; 0 is first.
func rank(member int, members []string, shard uint32) int {
	n := 0
	own := weight(members[member], shard)
	for m := range members {
		if m != member && weight(members[m], shard) > own {
			n++
		}
	}
	return n
}
