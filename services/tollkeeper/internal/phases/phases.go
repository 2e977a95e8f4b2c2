// Package phases tells how long each part of a start took.
package phases

import (
	"sync"
	"time"

	"github.com/rs/zerolog"
)

// Phases of one start. Safe for concurrent use.
type Phases struct {
	mu    sync.Mutex
	began time.Time
	last  time.Duration // since began, when the newest phase ended
	took  []phase
}

type phase struct {
	name string
	took time.Duration
}

// Begin starts the clock.
func Begin() *Phases { return &Phases{began: time.Now()} }

// Ended notes a phase that began when the one before it ended.
func (p *Phases) Ended(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Since(p.began)
	p.took, p.last = append(p.took, phase{name, now - p.last}), now
}

// Beside notes a phase that the others did not wait for.
func (p *Phases) Beside(name string, took time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.took = append(p.took, phase{name + "_beside", took})
}

// Tell logs them in milliseconds, a field each; those below one are left out.
func (p *Phases) Tell(log zerolog.Logger) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fields := zerolog.Dict()
	for _, ph := range p.took {
		if ms := ph.took.Milliseconds(); ms > 0 {
			fields.Int64(ph.name+"_ms", ms)
		}
	}
	log.Info().Int64("total_ms", time.Since(p.began).Milliseconds()).Dict("phases", fields).Msg("every part has started")
}
