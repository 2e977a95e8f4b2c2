// Package simulation runs the whole of Tollkeeper in one goroutine, on a clock of
// its own, from a seed: gateways with their outboxes, purses and spools,
// aggregators that take shards from each other, a historian, a NATS server and a
// ClickHouse. The core and the state machines of the shells are the real ones
// (quota, lease, lane, publish, blocks, seen, and the frames and entries as they
// stand on the wire); what lies between them, sockets, disks, processes and
// clocks, is simulated and misbehaves:
//
//   - messages are late, lost, doubled and out of order; requests are carried out
//     and their answers lost
//   - processes are killed (what was not synced is gone), stopped and continued
//     (what they were about to do happens later), and cut off
//   - any aggregator may believe at any time that a shard is its own
//   - the clocks of gateways are wrong within what they are configured for
//   - ClickHouse is killed between keeping a block's token and its rows
//   - plans change, usage is corrected, foreign events come twice
//
// In the end all of it works for long enough, and then the laws are checked: see
// [Run]. A seed gives the same run, whenever.
package simulation
