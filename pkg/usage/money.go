package usage

import "fmt"

// DefaultCurrency is that of a ledger which was not given another at its birth.
const DefaultCurrency = "USD"

// ValidCurrency reports whether s has the form of an ISO 4217 code: three capital
// letters.
func ValidCurrency[T ~string | ~[]byte](s T) bool {
	if len(s) != 3 {
		return false
	}
	for i := range len(s) {
		if s[i] < 'A' || s[i] > 'Z' {
			return false
		}
	}
	return true
}

// ReportsCost reports whether the call says what it cost, if only that it cost 0.
func (c *Call) ReportsCost() bool {
	_, known := c.Quantities.BuiltIn(CostIndex)
	return known
}

// validMoney refuses a cost that is in no currency.
func (c *Call) validMoney() error {
	switch {
	case c.Currency == "" && c.ReportsCost():
		return &InvalidError{ReasonWrongCurrency, "the event reports a cost and no currency: add its ISO 4217 code, such as USD"}
	case c.Currency != "" && !ValidCurrency(c.Currency):
		return &InvalidError{ReasonWrongCurrency, fmt.Sprintf("%.32q is no currency: use its ISO 4217 code, three capital letters such as USD", c.Currency)}
	}
	return nil
}

// CostIn reports, as an *InvalidError, that the call reports a cost in another currency
// than the ledger's: the sums and limits of the meter cost are in that one, and two
// currencies are not added. A call without a cost may name any.
func (c *Call) CostIn(currency string) error {
	if !c.ReportsCost() || c.Currency == currency {
		return nil
	}
	return OtherCurrency(c.Currency, currency)
}

// OtherCurrency is the error of a cost in one currency where costs are in another.
func OtherCurrency(is, want string) *InvalidError {
	return &InvalidError{ReasonWrongCurrency, fmt.Sprintf("the event's cost is in %.32q and this ledger's costs are in %s: two currencies are not added; send the cost in %s, or as a meter of your own", is, want, want)}
}
