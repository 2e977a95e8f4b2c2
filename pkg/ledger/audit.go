package ledger

// The conservation audit (pkg/audit): producers' claims, and what was found: how
// far the audit is, and findings.
const (
	AuditStream        = "AUDIT"
	AuditBucket        = "audit"
	BooksBucket        = "books" // of objects
	AuditStatusKey     = "status"
	AuditFindingPrefix = "finding."
)

// ClaimSubject is where the claims of a producer (ksuid in text form) are stored.
func ClaimSubject(producer string) string { return "audit.gateway." + producer }
