// Package lease holds the two state machines of allowances that many gateways
// share: the escrow, a fold of the ledger that hands out leases, and the purse
// with which a gateway uses one.
package lease
