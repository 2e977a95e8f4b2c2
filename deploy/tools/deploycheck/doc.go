// Package deploycheck checks what stands in deploy/ and dashboards/ as far as it
// can be without a container engine: with the parsers, servers and tools of
// those who will read it. It has tests only.
package deploycheck
