package telemetry

import (
	"encoding/json"
	"net/http"
	"sort"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tollkeeper/tollkeeper/services/internal/problem"
)

// Readiness knows which components of a process can do their work now. It is
// safe for concurrent use. It is also a prometheus.Collector of
// tollkeeper_component_ready.
type Readiness struct {
	mu         sync.Mutex
	components map[string]*Component
	desc       *prometheus.Desc
}

// Component is one part of a process that is ready or says why not. It is safe
// for concurrent use.
type Component struct {
	r      *Readiness
	name   string
	ok     bool
	reason string
	since  time.Time
}

// ComponentStatus is what a component last said.
type ComponentStatus struct {
	Name   string    `json:"name"`
	OK     bool      `json:"ok"`
	Reason string    `json:"reason,omitempty"` // why not; empty when OK
	Since  time.Time `json:"since"`            // when OK last changed
}

// ReadinessStatus is the body of /readyz.
type ReadinessStatus struct {
	Ready      bool              `json:"ready"`
	Components []ComponentStatus `json:"components"` // by name
}

// NewReadiness returns one without components, which counts as ready.
func NewReadiness() *Readiness {
	return &Readiness{
		components: make(map[string]*Component),
		desc: prometheus.NewDesc("tollkeeper_component_ready",
			"1 if the component can do its work now, 0 if not.", []string{"component"}, nil),
	}
}

// Component returns the component of that name, which is not ready ("starting")
// when it is new. Names come from the code, never from input: each is a metric's
// label.
func (r *Readiness) Component(name string) *Component {
	r.mu.Lock()
	defer r.mu.Unlock()
	c, ok := r.components[name]
	if !ok {
		c = &Component{r: r, name: name, reason: "starting", since: time.Now()}
		r.components[name] = c
	}
	return c
}

// OK says that the component can do its work.
func (c *Component) OK() { c.set(true, "") }

// NotReady says in a sentence why the component can't do its work. No secrets:
// the sentence is served to whoever may read /readyz.
func (c *Component) NotReady(reason string) { c.set(false, reason) }

func (c *Component) set(ok bool, reason string) {
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	if c.ok != ok {
		c.ok, c.since = ok, time.Now()
	}
	c.reason = reason
}

// Status returns a copy of what all components last said, ordered by name.
func (r *Readiness) Status() ReadinessStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := ReadinessStatus{Ready: true, Components: make([]ComponentStatus, 0, len(r.components))}
	for _, c := range r.components {
		s.Ready = s.Ready && c.ok
		s.Components = append(s.Components, ComponentStatus{Name: c.name, OK: c.ok, Reason: c.reason, Since: c.since.UTC()})
	}
	sort.Slice(s.Components, func(i, j int) bool { return s.Components[i].Name < s.Components[j].Name })
	return s
}

// ServeHTTP answers 200 when all components are ready, else 503, with the status
// as JSON in both cases.
func (r *Readiness) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	s := r.Status()
	body, err := json.Marshal(s)
	if err != nil {
		problem.Of(http.StatusInternalServerError, problem.CodeInternal, "the status can't be written as JSON").Write(w)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	if !s.Ready {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	// An error here is the client's going away.
	_, _ = w.Write(append(body, '\n'))
}

// Describe implements prometheus.Collector.
func (r *Readiness) Describe(ch chan<- *prometheus.Desc) { ch <- r.desc }

// Collect implements prometheus.Collector.
func (r *Readiness) Collect(ch chan<- prometheus.Metric) {
	for _, c := range r.Status().Components {
		v := 0.0
		if c.OK {
			v = 1
		}
		ch <- prometheus.MustNewConstMetric(r.desc, prometheus.GaugeValue, v, c.Name)
	}
}
