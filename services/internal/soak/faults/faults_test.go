package faults

import (
	"math/rand/v2"
	"reflect"
	"testing"
	"time"
)

func schedule(seed uint64, kills int) []Fault {
	return Schedule(rand.New(rand.NewPCG(seed, 0)), Plan{
		Kills: kills, Victims: []string{"a", "b", "c", "d"}, Cables: []string{"a"}, Pause: time.Second, Last: 2 * time.Second,
	})
}

func TestASeedGivesTheSameFaults(t *testing.T) {
	t.Parallel()
	if !reflect.DeepEqual(schedule(1, 30), schedule(1, 30)) {
		t.Error("the same seed gave other faults")
	}
	if reflect.DeepEqual(schedule(1, 30), schedule(2, 30)) {
		t.Error("two seeds gave the same faults")
	}
}

func TestEverybodyIsKilledAndEverythingAtOnce(t *testing.T) {
	t.Parallel()
	kills, alone, atOnce := 0, map[string]bool{}, false
	for _, f := range schedule(3, 10) {
		if f.After < 0 || f.After >= time.Second || f.For < 0 || f.For >= 2*time.Second {
			t.Errorf("%+v is beyond the plan's times", f)
		}
		if f.Act == Cut && f.Victims[0] != "a" {
			t.Errorf("%s has no cable", f.Victims[0])
		}
		if f.Act != Kill {
			continue
		}
		kills++
		atOnce = atOnce || len(f.Victims) == 4
		if len(f.Victims) < 4 {
			for _, v := range f.Victims {
				alone[v] = true
			}
		}
	}
	if kills != 10 || len(alone) != 4 || !atOnce {
		t.Errorf("%d kills of %v, everything at once: %v", kills, alone, atOnce)
	}
}

func TestNobodyToKillIsNoSchedule(t *testing.T) {
	t.Parallel()
	if got := Schedule(rand.New(rand.NewPCG(1, 1)), Plan{Kills: 5}); got != nil {
		t.Errorf("got %v", got)
	}
}
