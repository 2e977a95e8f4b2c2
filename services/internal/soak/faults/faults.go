// Package faults draws what is done to whom, and when, from a seed.
package faults

import (
	"math/rand/v2"
	"slices"
	"time"
)

// Act is a kind of fault.
type Act string

// The acts. After Kill the victims are started again; after Freeze and Cut they
// go on.
const (
	Kill      Act = "kill"
	Freeze    Act = "freeze"
	Cut       Act = "cut"
	Terminate Act = "terminate"
)

// Fault is one act on some processes at the same time.
type Fault struct {
	// After is the pause since the fault before.
	After time.Duration
	Act   Act
	// Victims by name.
	Victims []string
	// For is how long it lasts: until the victims are started again, or go on.
	For time.Duration
}

// Plan of faults.
type Plan struct {
	Kills int
	// Victims that may be killed, and those that have a cable.
	Victims, Cables []string
	// Pause and Last are the longest pause between faults and the longest
	// duration of one.
	Pause, Last time.Duration
}

// Schedule draws faults from a seed until the planned number of kills is in it.
// The same seed and plan give the same schedule. Every victim's turn comes before
// anybody's second, in random order; everything at once is one of the turns.
func Schedule(r *rand.Rand, p Plan) []Fault {
	if len(p.Victims) == 0 || p.Kills <= 0 {
		return nil
	}
	var out []Fault
	var turns [][]string
	for kills := 0; kills < p.Kills; {
		f := Fault{After: Span(r, p.Pause), For: Span(r, p.Last)}
		switch dice := r.IntN(100); {
		case dice < 12:
			f.Act, f.Victims = Freeze, []string{p.Victims[r.IntN(len(p.Victims))]}
		case dice < 20 && len(p.Cables) > 0:
			f.Act, f.Victims = Cut, []string{p.Cables[r.IntN(len(p.Cables))]}
		case dice < 25:
			f.Act, f.Victims = Terminate, []string{p.Victims[r.IntN(len(p.Victims))]}
		default:
			if len(turns) == 0 {
				turns = append(turns, p.Victims)
				for _, v := range p.Victims {
					turn := []string{v}
					if other := p.Victims[r.IntN(len(p.Victims))]; r.IntN(5) == 0 && other != v {
						turn = append(turn, other) // two at the same time
					}
					turns = append(turns, turn)
				}
				r.Shuffle(len(turns), func(i, j int) { turns[i], turns[j] = turns[j], turns[i] })
			}
			f.Act, f.Victims = Kill, slices.Clone(turns[0])
			turns = turns[1:]
			kills++
		}
		out = append(out, f)
	}
	return out
}

// Span draws a duration below most.
func Span(r *rand.Rand, most time.Duration) time.Duration {
	if most <= 0 {
		return 0
	}
	return time.Duration(r.Int64N(int64(most)))
}
