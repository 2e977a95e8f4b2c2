package lease

// Micros is a time of the ledger's clock (microseconds since the Unix epoch)
// or a span of it (microseconds).
type Micros int64

// Gateway identifies one run of a gateway: a ksuid's bytes, new at each start.
// A gateway that comes back is another one, which is what fences the old.
type Gateway [20]byte

// MaxUnits bounds allowances and what a message may say; sums of a thousand of
// them do not overflow.
const MaxUnits = int64(1) << 53

// maxTotal bounds what was granted, used and returned since a lease began: units that
// come back and are granted again count each time.
const maxTotal = int64(1) << 60

// Ask is all that a gateway ever says about one allowance: what it has done
// with its lease, and what it would like. It is an entry of the ledger. Used,
// Returned and Over are totals since the lease began and only grow, so that a
// lost message is made good by any later one.
type Ask struct {
	Gateway Gateway
	// Seq numbers the gateway's messages about this allowance from 1.
	Seq uint64
	// Sent is the ledger's time as the gateway estimates it.
	Sent Micros
	// Seen is the newest Answer.Revision that this message takes account of.
	Seen uint64
	// Known is the newest Answer.Granted that the gateway has heard.
	Known int64
	// Used units are spent for good.
	Used int64
	// Returned units will never be used under this lease.
	Returned int64
	// Over is what calls cost beyond their reservation and beyond the lease.
	Over int64
	// Held units are reserved for calls that are under way; not a total.
	Held int64
	// Need is the least that would help a call that waits, beyond what the
	// gateway has; 0: none waits.
	Need int64
	// Want is what would be convenient.
	Want int64
	// Renew asks for more time.
	Renew bool
	// Closing is the gateway's last word: what is not Used comes back.
	Closing bool
}

// finalSeq is after every number that a running gateway can have reached.
const finalSeq = ^uint64(0)

// LastWord is what a spool says for a gateway that died: used and over as the
// spool has them, which must include every call that was let through and the whole
// bound of each reservation that was open.
func LastWord(g Gateway, sent Micros, used, over int64) Ask {
	return Ask{Gateway: g, Seq: finalSeq, Sent: sent, Seen: finalSeq, Used: used, Over: over, Closing: true}
}

// wrong says why no gateway can have meant the message; empty: it can.
func (m *Ask) wrong() string {
	for _, n := range [...]int64{m.Over, m.Held, m.Need, m.Want} {
		if n < 0 || n > MaxUnits {
			return "an amount is negative or too large"
		}
	}
	for _, n := range [...]int64{m.Known, m.Used, m.Returned} {
		if n < 0 || n > maxTotal {
			return "a total is negative or too large"
		}
	}
	switch {
	case m.Seq == 0:
		return "the message has no number"
	case m.Seq != finalSeq && m.Used+m.Returned+m.Held > m.Known:
		return "more is used, held and returned than was granted"
	case m.Closing && (m.Held != 0 || m.Need != 0 || m.Want != 0):
		return "a last word that still holds or wants something"
	}
	return ""
}

// Verdict is how an allowance stands for one gateway.
type Verdict uint8

// The verdicts.
const (
	// Open: use what is granted, ask for more.
	Open Verdict = iota
	// Waiting: the ask is in the queue, others were asked to give back.
	Waiting
	// DeniedEarly: there is nothing to hand out, and some that is out might
	// yet come back unused: ask again in a while.
	DeniedEarly
	// DeniedFinal: more than Room will not be had in this window whatever comes
	// back, unless the allowance is raised.
	DeniedFinal
	// Ended: the window is over, or the lease unknown or closed.
	Ended
)

// Answer is all that is ever said to a gateway about one allowance: the fold of
// the ledger up to Revision. An owner sends it only for what it has read back.
type Answer struct {
	Gateway Gateway
	// Epoch of the owner that speaks; the owner fills it in.
	Epoch uint64
	// Revision is the ledger sequence that led here.
	Revision uint64
	// Seq is the newest Ask that is folded.
	Seq uint64
	// Granted is the total since the lease began.
	Granted int64
	// Expiry ends all use of the lease, less the greatest clock skew.
	Expiry Micros
	// Verdict for what was asked; with a denial, calls of more than Room units
	// are refused, whatever else they could draw on.
	Verdict Verdict
	Room    int64
	// Soon is, with DeniedEarly, what may come back in a while: units that are not with
	// the dead.
	Soon int64
	// Recall is the revision at which everything unused was called back, 0 when
	// nothing is.
	Recall uint64
}
