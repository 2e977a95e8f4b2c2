package aggregator

import (
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// shardCollector tells of the shards as they are when it is asked.
type shardCollector struct{ owners []*owner }

var (
	beaconAgeDesc  = prometheus.NewDesc("tollkeeper_aggregator_beacon_age_seconds", "How long ago the owned shard that has been silent for longest sent its last beacon.", nil, nil)
	ownedDesc      = prometheus.NewDesc("tollkeeper_aggregator_shard_owned", "1 for the shards that this member owns and has fenced, 0 for those that it stands by for.", []string{"shard"}, nil)
	leaseUnitsDesc = prometheus.NewDesc("tollkeeper_aggregator_lease_units", "Units of shared allowances of owned shards, by meter: outstanding is with gateways that may use it, dead in leases that ended without a word, exposure was handed out again all the same, overdraft was spent beyond the amount.", []string{"meter", "state"}, nil)
	allowancesDesc = prometheus.NewDesc("tollkeeper_aggregator_shared_allowances", "Allowances (account, limit, window) of owned shards that gateways hold leases of.", nil, nil)
)

// Describe implements prometheus.Collector.
func (c *shardCollector) Describe(to chan<- *prometheus.Desc) {
	to <- beaconAgeDesc
	to <- ownedDesc
	to <- allowancesDesc
	to <- leaseUnitsDesc
}

// otherMeter stands for meters of the users' own, so that labels stay few.
const otherMeter usage.Meter = "other"

// leaseUnits of a meter; sums of shards, in units of the meter.
type leaseUnits struct{ outstanding, dead, exposure, overdraft int64 }

// sumLeases keeps the sums for who asks for metrics. It looks at every allowance,
// so it takes a hundredth of the owner's time at most.
func (o *owner) sumLeases(now time.Time) {
	if now.Before(o.sumAt) {
		return
	}
	sums, builtIn := map[usage.Meter]leaseUnits{}, usage.BuiltInMeters()
	for meter, s := range o.state.LeaseSums() {
		if !slices.Contains(builtIn[:], meter) {
			meter = otherMeter
		}
		u := sums[meter]
		u.outstanding, u.dead = u.outstanding+s.Outstanding-s.Dead, u.dead+s.Dead
		u.exposure, u.overdraft = u.exposure+s.Exposure, u.overdraft+s.Overdraft
		sums[meter] = u
	}
	o.leaseUnits.Store(&sums)
	o.sumAt = now.Add(max(2*time.Second, 100*time.Since(now)))
}

// Collect implements prometheus.Collector.
func (c *shardCollector) Collect(to chan<- prometheus.Metric) {
	now, age, allowances := time.Now().UnixNano(), int64(0), int64(0)
	units := map[usage.Meter]leaseUnits{}
	for _, o := range c.owners {
		owned := 0.0
		if last := o.lastBeacon.Load(); last != 0 {
			owned, age = 1, max(age, now-last)
		}
		allowances += o.allowances.Load()
		if sums := o.leaseUnits.Load(); sums != nil {
			for meter, s := range *sums {
				u := units[meter]
				units[meter] = leaseUnits{u.outstanding + s.outstanding, u.dead + s.dead, u.exposure + s.exposure, u.overdraft + s.overdraft}
			}
		}
		to <- prometheus.MustNewConstMetric(ownedDesc, prometheus.GaugeValue, owned, strconv.FormatUint(uint64(o.shard), 10))
	}
	to <- prometheus.MustNewConstMetric(beaconAgeDesc, prometheus.GaugeValue, time.Duration(age).Seconds())
	to <- prometheus.MustNewConstMetric(allowancesDesc, prometheus.GaugeValue, float64(allowances))
	for meter, u := range units {
		for state, n := range map[string]int64{"outstanding": u.outstanding, "dead": u.dead, "exposure": u.exposure, "overdraft": u.overdraft} {
			to <- prometheus.MustNewConstMetric(leaseUnitsDesc, prometheus.GaugeValue, float64(n), string(meter), state)
		}
	}
}
