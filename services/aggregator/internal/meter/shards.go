package meter

import (
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tollkeeper/tollkeeper/pkg/lease"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
)

// Shard is how one stands.
type Shard struct {
	Number uint32
	// LastBeacon is when it was sent, in Unix nanoseconds; 0: the shard is not owned.
	LastBeacon int64
	Allowances int64
	// Open counters lack what was used before they began.
	Open   int64
	Leases map[usage.Meter]LeaseUnits // read only
}

// LeaseUnits of a meter; sums of shards, in units of the meter.
type LeaseUnits struct{ Outstanding, Dead, Exposure, Overdraft int64 }

// otherMeter stands for meters of the users' own, so that labels stay few.
const otherMeter usage.Meter = "other"

// Sum is what of a shard's allowances is told, by meter.
func Sum(all map[usage.Meter]lease.State) map[usage.Meter]LeaseUnits {
	sums, builtIn := map[usage.Meter]LeaseUnits{}, usage.BuiltInMeters()
	for of, s := range all {
		if !slices.Contains(builtIn[:], of) {
			of = otherMeter
		}
		u := sums[of]
		u.Outstanding, u.Dead = u.Outstanding+s.Outstanding-s.Dead, u.Dead+s.Dead
		u.Exposure, u.Overdraft = u.Exposure+s.Exposure, u.Overdraft+s.Overdraft
		sums[of] = u
	}
	return sums
}

// Shards tells of the shards as they are when it is asked.
type Shards struct{ Now func() []Shard }

var (
	beaconAgeDesc  = prometheus.NewDesc("tollkeeper_aggregator_beacon_age_seconds", "How long ago the owned shard that has been silent for longest sent its last beacon.", nil, nil)
	ownedDesc      = prometheus.NewDesc("tollkeeper_aggregator_shard_owned", "1 for the shards that this member owns and has fenced, 0 for those that it stands by for.", []string{"shard"}, nil)
	leaseUnitsDesc = prometheus.NewDesc("tollkeeper_aggregator_lease_units", "Units of shared allowances of owned shards, by meter: outstanding is with gateways that may use it, dead in leases that ended without a word, exposure was handed out again all the same, overdraft was spent beyond the amount.", []string{"meter", "state"}, nil)
	allowancesDesc = prometheus.NewDesc("tollkeeper_aggregator_shared_allowances", "Allowances (account, limit, window) of owned shards that gateways hold leases of.", nil, nil)
	openDesc       = prometheus.NewDesc("tollkeeper_aggregator_open_counters", "Counters of new limits in owned shards that lack what was used before the limit was there: it is being counted out of the ledger, and until then the tiers exact and leased hand out nothing of them.", nil, nil)
)

// Describe implements prometheus.Collector.
func (c *Shards) Describe(to chan<- *prometheus.Desc) {
	to <- beaconAgeDesc
	to <- ownedDesc
	to <- allowancesDesc
	to <- openDesc
	to <- leaseUnitsDesc
}

// Collect implements prometheus.Collector.
func (c *Shards) Collect(to chan<- prometheus.Metric) {
	now, age, allowances, open := time.Now().UnixNano(), int64(0), int64(0), int64(0)
	units := map[usage.Meter]LeaseUnits{}
	for _, s := range c.Now() {
		owned := 0.0
		if s.LastBeacon != 0 {
			owned, age = 1, max(age, now-s.LastBeacon)
		}
		allowances += s.Allowances
		open += s.Open
		for meter, n := range s.Leases {
			u := units[meter]
			units[meter] = LeaseUnits{u.Outstanding + n.Outstanding, u.Dead + n.Dead, u.Exposure + n.Exposure, u.Overdraft + n.Overdraft}
		}
		to <- prometheus.MustNewConstMetric(ownedDesc, prometheus.GaugeValue, owned, strconv.FormatUint(uint64(s.Number), 10))
	}
	to <- prometheus.MustNewConstMetric(beaconAgeDesc, prometheus.GaugeValue, time.Duration(age).Seconds())
	to <- prometheus.MustNewConstMetric(allowancesDesc, prometheus.GaugeValue, float64(allowances))
	to <- prometheus.MustNewConstMetric(openDesc, prometheus.GaugeValue, float64(open))
	for meter, u := range units {
		for state, n := range map[string]int64{"outstanding": u.Outstanding, "dead": u.Dead, "exposure": u.Exposure, "overdraft": u.Overdraft} {
			to <- prometheus.MustNewConstMetric(leaseUnitsDesc, prometheus.GaugeValue, float64(n), string(meter), state)
		}
	}
}
