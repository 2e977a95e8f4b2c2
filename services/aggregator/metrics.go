package aggregator

import (
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// shardCollector tells of the shards as they are when it is asked.
type shardCollector struct{ owners []*owner }

var (
	beaconAgeDesc  = prometheus.NewDesc("tollkeeper_aggregator_beacon_age_seconds", "How long ago the owned shard that has been silent for longest sent its last beacon.", nil, nil)
	ownedDesc      = prometheus.NewDesc("tollkeeper_aggregator_shard_owned", "1 for the shards that this member owns and has fenced, 0 for those that it stands by for.", []string{"shard"}, nil)
	allowancesDesc = prometheus.NewDesc("tollkeeper_aggregator_shared_allowances", "Allowances (account, limit, window) of owned shards that gateways hold leases of.", nil, nil)
)

// Describe implements prometheus.Collector.
func (c *shardCollector) Describe(to chan<- *prometheus.Desc) {
	to <- beaconAgeDesc
	to <- ownedDesc
	to <- allowancesDesc
}

// Collect implements prometheus.Collector.
func (c *shardCollector) Collect(to chan<- prometheus.Metric) {
	now, age, allowances := time.Now().UnixNano(), int64(0), int64(0)
	for _, o := range c.owners {
		owned := 0.0
		if last := o.lastBeacon.Load(); last != 0 {
			owned, age = 1, max(age, now-last)
		}
		allowances += o.allowances.Load()
		to <- prometheus.MustNewConstMetric(ownedDesc, prometheus.GaugeValue, owned, strconv.FormatUint(uint64(o.shard), 10))
	}
	to <- prometheus.MustNewConstMetric(beaconAgeDesc, prometheus.GaugeValue, time.Duration(age).Seconds())
	to <- prometheus.MustNewConstMetric(allowancesDesc, prometheus.GaugeValue, float64(allowances))
}
