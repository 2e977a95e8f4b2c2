// Package ownership says which of several aggregators owns which shard: one at
// a time, another within two seconds of its death, and as few moves as balance
// allows. The members of the fleet meet in a KV bucket; there is no leader. Package
// fleet below decides; this one carries out.
//
// # Keys
//
//	session.<id>  {member, state, beat, declines}  one start of a member; the only key that is renewed
//	shard.<n>     {session, member, released, to}  the claim: which session owns the shard
//
// Every write is conditional on the key's newest revision. A claim lives as long
// as the session that it names, so that the renewals cost three and a bit
// writes a second and member, however many shards there are. The revision of
// the write that made the claim is the fencing token: it grows from claim to
// claim, also over a bucket that was lost and made again (its sequences begin
// at the time of day).
//
// # Rules
//
//  1. A member may act on a shard while it holds the claim and now < sent + TTL -
//     Safety, where sent is when it SENT the newest renewal that it knows to be
//     stored, all by its own steady clock.
//  2. A session may be fenced (overwritten with "fenced", for good) by anyone who
//     has seen no new revision of it for a TTL by its own steady clock. The write
//     is conditional on that revision: a renewal on its way wins or loses as a
//     whole. A member whose renewal meets another revision reads what stands
//     there; if it was fenced, everything it held is over and it joins anew.
//  3. Silence means something only to who could speak and hear meanwhile: whose
//     own newest renewal was stored and is at most 2 Renew old. After a pause of
//     its own longer than TTL/2 everybody's silence begins anew. So an outage or
//     an election moves nothing.
//  4. A claim may be changed by its own session, or by anyone once that session
//     is over (ended or fenced). A session that the server has removed is fenced
//     by creating it, after a TTL of absence, like any silent one.
//  5. A session ends itself ("ended") only when none of its callbacks runs.
//  6. One write and no other ever creates a session: if it is not known to be
//     stored, its member goes on under a new id. A second creation could bring
//     the session back after it was fenced and the server removed what said so;
//     whoever remembers the fencing would take what it claims.
//
// Two members can't both be within rule 1: the later one claimed after the
// earlier one's session was fenced, at least a TTL after the fencing member first
// saw the newest renewal, which was not before that renewal was sent. That holds
// for any delay, loss, reordering and duplication of messages, readings from
// replicas that are behind, and writes that are stored long after they were
// given up.
//
// # A shard at one member
//
//	away ──claim──▶ claiming ──stored──▶ held ──plan says another, or leaving──▶ draining
//	 ▲                 │                  │                                        │ callback returned
//	 │◀─conflict───────┘                  │ not proved any more, fenced            ▼
//	 │                                    ▼                                    releasing
//	 │◀───────callback returned──────── ending ◀──────Drain is over─────────── draining
//	 └◀─────────────────────────────────stored──────────────────────────────── releasing
//
// Session: (created) alive → leaving → ended, or alive/leaving → fenced. After
// fenced a new session is created under a new id.
//
// # Who is to own what
//
// Each member computes the same plan from the bucket: what has an owner stays
// there as long as nobody has two shards more than another; free shards and those
// that must move go by rendezvous hashing of member name and shard. So a member
// that joins is given at most its share, only what a dead member had moves when it
// dies, and the heir of each shard (OnStandby) is known before. Plans decide who
// tries, conditional writes decide who gets: members that see things differently
// for a while can only waste a write. Against flapping, a shard is moved for
// balance only if the plan has wanted so for Timing.Poll, the shard was there for
// Timing.Dwell, and its new owner for Timing.Settle, doubled with each recent
// loss of that member. A free shard that its heir does not fetch for 2 TTL is taken
// by another.
//
// # What is assumed of time
//
//   - Over one TTL no two members' steady clocks differ by more than Safety (with
//     the defaults: one may run a sixth slower than the other). Wall clocks don't
//     matter, and neither does a step of them. The steady clock on Linux
//     is CLOCK_BOOTTIME, which counts suspension. A virtual machine that is
//     paused or migrated without its guest's clock being moved on breaks this.
//   - The NATS servers' wall clocks jump by less than 58 s at once: only then would
//     they remove a live session (message TTL of a minute). Even so its member
//     learns of it at its next renewal, before or after which nobody takes its
//     shards for a TTL.
//   - Between Check and the effect of an act any time may pass (a stopped process,
//     a client's buffer). That gap is closed by the act: a write to the
//     checkpoint that is conditional on its revision and carries the token.
//
// # What happens when
//
//	a member is killed            its shards are owned again after at most a TTL from its last
//	                              renewal, and the time that messages take: < 2 s
//	... is stopped and continued  the same; its contexts are cancelled and Check fails before
//	                              others may act, and when it wakes it finds itself fenced
//	... its loop hangs            the same: a timer of its own cancels the contexts
//	... is cut from NATS          the same
//	... leaves (ctx of Run)       each callback drains, its shard is released to its heir and claimed
//	                              at once, milliseconds after the callback returned
//	... a callback fails          the shard goes to another; here it is tried again after 1 s, 2 s ... 1 min
//	... a callback never returns  the shard is stuck until the process ends; it is logged
//	NATS is away                  after TTL - Safety nobody owns anything; afterwards everybody
//	                              owns what it owned, with new tokens, within 0.7 s
//	... shorter than that         nothing
//	... a node, a leader is lost  as above, for as long as the election takes
//	... and a member with it      its shards: a TTL and a request's time (2 Renew) after the election
//	all are killed at once        whoever comes waits a TTL before it takes the old claims
//	the bucket is deleted         the owners stop when they can't renew; it is made again at once, and
//	                              for up to TTL - Safety a new owner may act beside an old one: only
//	                              the checkpoint's fence stands then. Don't, while aggregators run
//	two members have one name     shards are not shared evenly; it is logged
package ownership
