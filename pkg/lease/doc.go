// Package lease is the protocol by which many gateways share one allowance (account × limit ×
// window) without exceeding it: two state machines and the messages between them. No goroutine,
// clock or I/O: time and messages come in, messages go out.
//
// # Who does what
//
// A gateway's [Purse] admits calls from the lease it holds and writes an [Ask] now and then. An Ask
// is an entry of the shard's ledger, appended by the gateway or by the owner on its behalf. The
// [Escrow] is a fold of these entries (and of changes of the amount, and of passing time); what it
// grants follows from the entry and all before it, so a grant is in the ledger before anybody can
// say it. The shard's owner reads the ledger, applies, and sends each [Answer] it gets. An owner
// decides nothing and appends nothing but ticks ([Escrow.Due]), so two owners, a paused one that
// wakes, or one that repeats itself can do no harm; its epoch only keeps old news from gateways.
//
// Everything that matters in a message is a total that grows: granted (ledger to gateway), used,
// returned, over (gateway to ledger). Both sides keep the maximum: loss, copies and disorder change
// nothing that the next message does not mend. Seq orders what is no total (held, need); an Ask whose
// Known is behind what was granted grants nothing; Revision orders verdicts. A gateway's identity is
// new at each start, which fences what it was before.
//
// # Entries and what they do
//
//	Ask, first of its gateway   a lease begins; not after the window's end, nor if older than Horizon
//	  Used, Returned            outstanding → settled, outstanding → free (a report, a return)
//	  Over                      settled beyond the lease: counted Above, never dropped
//	  Need                      in the queue: granted, or others are recalled, or denied
//	  Want                      granted only if something is free and nobody waits; never queued
//	  Renew                     more time, as any Need or Want brings
//	  Closing, LastWord         all that is not used comes back; the lease is over for good
//	Ended                       the same for one that can't speak: all but what it can have used
//	Outside                     settled without a lease: foreign events, corrections
//	Amount                      raised: who was denied is told; lowered: what is out is called back
//	(nothing: a tick)           leases lapse, patience ends, the policy releases, the window opens or ends
//
// A grant is max(Need, min(Want, free / (2 × active gateways))): it shrinks as the allowance runs
// out. Want is the rate since the last grant × Term. When half of the last grant is used the purse
// asks for more, so calls seldom wait.
//
// # A lease's states
//
//	live      until expiry; the gateway stops Skew before it. Grants and renewals prolong it, never
//	          beyond the window. Unused for a term it is not renewed and its units go home.
//	lapsed    nobody may use it any more. What was not reported stays outstanding ("dead"), because it
//	          may have been used; the gateway's next word settles it, and a new grant revives it.
//	released  leased tier only: given up after ReleaseAfter of silence, within MaxExposure.
//	closed    after the last word; remembered for Horizon, so that copies begin nothing, and 32 times as
//	          long while calls of it are still to be counted, so that they are not settled twice.
//
// Always: settled + outstanding ≤ amount + excess, where excess only stems from Counts.Lowered, Above,
// Late and Outside; settled + outstanding + exposure ≤ what there was + MaxExposure (+ Above, Outside). Outstanding
// falls only by the holder's word or by a release: expiry, skew and failover free nothing. So a wrong
// clock can put a call into the wrong window, but can't admit one too many of any window's lease.
//
// # Marks
//
// Of a gateway that was killed nobody knows which calls were under way: they may have
// reached what they were for, and stand nowhere. So units of a purse that is Sealed
// can be taken only up to its mark, a total that is on disk (or wherever a kill leaves
// it) before the units are free. The mark goes ahead of use in steps, of an eighth of
// the newest grant or 16 units, when half of a step is left: calls wait for it only
// when they need more than that, or are the first. The next run of the gateway, once
// all that the dead one left is in the ledger, says how far each mark was: what is
// beyond was not used, and comes back. What is below and was not counted stays
// outstanding.
//
// # Rest
//
// A purse that has nothing in hand and nothing to say can be dropped, but not be forgotten:
// its lease goes on. Its Record is enough to make it again, when a call needs it or the
// gateway says its last words.
//
// # Denials
//
// DeniedFinal: settled + what the asker has + Need > amount; nothing that could come back would help,
// and only a raise or the window's end ends it. DeniedEarly: nothing is free, and everybody else was
// asked to give back and has answered or been silent for Patience, but what is out (reserved for calls,
// or with the silent and dead) would suffice if it came back unused. Soon says how much of
// it is not with the dead: a call that needs more than Room and that need not wait for it,
// and hears of it when what the dead had is there after all. Early denials are counted
// (Counts.DeniedEarly; the purse's repeats are RefusedEarly); one was wrong if at the window's end
// amount − settled is no less than what it asked for. Who was denied is told when there is room again,
// and a purse asks again by itself after Recheck (8 × that if final). A block never outlives the
// window at the gateway: from Skew before its end the outcome is Over, and the next purse must ask.
//
// # Reservations
//
// open → settled | voided | expired; expired → settled late, once. At the deadline nothing is freed in
// the exact tier: the bound stays held, as with the dead, until the call is settled or the window
// ends. In the leased tier up to Habits.ReleaseHolds units are freed; so calls should end before. Cost
// above the bound is taken from what is free in the lease, the rest is Over.
//
// # What dies, what becomes of its units, what bound holds
//
//	message lost, copied, late     made good by the next one                         exact
//	gateway, orderly               last word when its reservations are resolved      exact
//	gateway, orderly, unheard      dead until Ended; all but the counted come back   exact
//	gateway, killed, with marks    dead until Ended; what is beyond its mark is back exact
//	the same, below the mark       dead until counted, or until the window ends      exact
//	gateway, killed, no marks      dead until the window ends                        exact
//	the same, ReleaseAfter > 0     handed out again, exposure counted                leased: + MaxExposure
//	gateway cut off or paused      uses what it has until expiry, then Fetch (503)   exact
//	call that never settles        its bound stays held                              exact; leased: + ReleaseHolds a gateway
//	call above its reservation     settled, counted Above                            overdraft, measured
//	owner, ledger's leader         leases go on; who needs more waits                exact
//	owner paused, wakes            its answers are true but old: ignored by epoch    exact
//	clock within Skew              calls count in the right window                   exact
//	clock beyond Skew              calls may be in the wrong window                  exact by lease, not by time
//	allowance lowered              admitted ≤ max(new amount, what was out)          counted Lowered
package lease
