package lease

// Holding is what one gateway has of an allowance. Outstanding is what it may
// have used without having said so; Expiry is when it may not any more.
type Holding struct {
	Gateway                                                    Gateway
	Granted, Used, Over, Returned, Outstanding, Held, Released int64
	Expiry                                                     Micros
	Lapsed, Closed                                             bool
}

// Holdings returns what each gateway has, in the order of gateways; those that
// were forgotten are not among them.
func (e *Escrow) Holdings() []Holding {
	list := make([]Holding, 0, len(e.leases))
	for i := range e.leases {
		l := &e.leases[i]
		list = append(list, Holding{l.gateway, l.granted, l.used, l.over, l.returned, l.out(), l.held, l.released, l.expiry, l.lapsed, l.closed})
	}
	return list
}
