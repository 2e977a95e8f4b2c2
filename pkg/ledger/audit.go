package ledger

// The conservation audit (pkg/audit): producers' claims, and what was found.
const (
	AuditStream = "AUDIT"
	AuditBucket = "audit"
	// AuditStatusKey of the bucket holds how far the audit is, and how many findings are open.
	AuditStatusKey = "status"
	// AuditFindingPrefix begins the keys of findings.
	AuditFindingPrefix = "finding."
)

// ClaimSubject is where the claims of a producer (ksuid in text form) are stored.
func ClaimSubject(producer string) string { return "audit.gateway." + producer }
