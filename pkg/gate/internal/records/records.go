// Package records reads the records of the directory's bucket.
package records

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/gate/table"
	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

const (
	keyPrefix     = "key."
	accountPrefix = "account."
)

// Read returns the key or the account of a change that is not a deletion; neither
// when it is of a newer writer.
func Read(c *ledger.Change) (*table.Key, *table.AccountRecord, error) {
	if token, ok := strings.CutPrefix(c.Key, keyPrefix); ok {
		h, err := parseHash(token)
		if err != nil {
			return nil, nil, err
		}
		var r tollkeeperv1.KeyRecord
		if err := proto.Unmarshal(c.Value, &r); err != nil {
			return nil, nil, fmt.Errorf("it is not protobuf: %w", err)
		}
		if r.GetAccount() == "" {
			return nil, nil, errors.New("it names no account")
		}
		return &table.Key{Hash: h, KeyID: r.GetKeyId(), Account: r.GetAccount(), Seq: c.Sequence}, nil, nil
	}
	if strings.HasPrefix(c.Key, accountPrefix) {
		var r tollkeeperv1.AccountRecord
		if err := proto.Unmarshal(c.Value, &r); err != nil {
			return nil, nil, fmt.Errorf("it is not protobuf: %w", err)
		}
		if r.GetId() == "" || ledger.DirectoryAccount(r.GetId()) != c.Key {
			return nil, nil, errors.New("it is the record of another account")
		}
		a := &table.AccountRecord{ID: r.GetId(), Path: r.GetPath(), Plan: r.GetPlan(), Seq: c.Sequence}
		for _, l := range r.GetLimits() {
			limit := ledger.LimitFromProto(l.GetLimit())
			if !limit.Tier.Leased() {
				a.Eventual = true
				continue
			}
			if l.GetAccount() == "" || limit.ID == "" || !limit.Meter.Valid() {
				return nil, nil, errors.New("a limit of it has no account, name or meter")
			}
			a.Leased = append(a.Leased, table.LeasedLimit{Account: l.GetAccount(), LimitID: l.GetPlan() + "/" + limit.ID, Limit: limit})
		}
		return nil, a, nil
	}
	return nil, nil, nil // of a newer writer
}

// Key returns the hash that a key of the bucket is of, and whether it is one.
func Key(key string) (table.KeyHash, bool) {
	token, ok := strings.CutPrefix(key, keyPrefix)
	if !ok {
		return table.KeyHash{}, false
	}
	h, err := parseHash(token)
	return h, err == nil
}

// Account returns the account that a key of the bucket is of, and whether it is one.
func Account(key string) (string, bool) {
	token, ok := strings.CutPrefix(key, accountPrefix)
	if !ok {
		return "", false
	}
	id, err := accountOf(token)
	return id, err == nil
}

func parseHash(token string) (h table.KeyHash, err error) {
	b, err := hex.DecodeString(token)
	if err != nil || len(b) != len(h) {
		return h, errors.New("it is not under a SHA-256 in hex")
	}
	return table.KeyHash(b), nil
}

// accountOf is the inverse of ledger.KeyToken.
func accountOf(token string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(token); i++ {
		if token[i] != '=' {
			b.WriteByte(token[i])
			continue
		}
		if i+3 > len(token) {
			return "", errors.New("an escape is cut off")
		}
		c, err := hex.DecodeString(token[i+1 : i+3])
		if err != nil {
			return "", fmt.Errorf("an escape is not hex: %w", err)
		}
		b.WriteByte(c[0])
		i += 2
	}
	return b.String(), nil
}
