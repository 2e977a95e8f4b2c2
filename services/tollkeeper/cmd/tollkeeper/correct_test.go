package main

import (
	"strings"
	"testing"
)

func TestAMeterIsCorrectedOnce(t *testing.T) {
	t.Parallel()
	got, err := adjustments([]string{"calls=-3", "output_tokens=+40"})
	if err != nil || len(got) != 2 || got["calls"] != -3 || got["output_tokens"] != 40 {
		t.Fatalf("%v, %v", got, err)
	}
	for given, want := range map[string]string{
		"calls=-3 calls=4": "twice",
		"calls=1 calls=1":  "twice",
		"calls":            "such as calls=-3",
		"calls=":           "such as calls=-3",
		"calls=1.5":        "such as calls=-3",
		"calls=+-3":        "such as calls=-3",
		"calls=1;bytes=2":  "such as calls=-3",
	} {
		if got, err := adjustments(strings.Fields(given)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v", given, got, err)
		}
	}
}
