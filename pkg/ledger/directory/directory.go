// Package directory is the wire form of the directory's bucket: which accounts and
// API keys there are, and under which plans (schemas/proto, DirectoryAccounts). It is
// pure. A part is read in place: what was read keeps the bytes it was read from, and
// finds what is in them without an object for each account or key.
package directory

import (
	"bytes"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas/gen/tollkeeperv1"
)

const (
	// Parts is how many records all accounts stand in, and all keys.
	Parts = 1 << partBits
	// MaxRecordBytes bounds a record, so that it fits a message of any NATS.
	MaxRecordBytes = 900 << 10

	partBits = 10
	// PlansKey is the KV key of all plans.
	PlansKey       = "plans"
	accountsPrefix = "accounts."
	keysPrefix     = "keys."
)

// Fields of the messages, which have the same numbers throughout.
const (
	fieldEntry  = 1 // of a part: an account or a key
	fieldFirst  = 1 // id, sha256
	fieldSecond = 2 // parent, key_id
	fieldThird  = 3 // plan, account
)

// Hash is the SHA-256 of an API key.
type Hash = [32]byte

// Account of the directory.
type Account struct {
	ID, Parent, Plan string
}

// Key of the directory: an API key.
type Key struct {
	Hash        Hash
	ID, Account string
}

// AccountPart is the part that an account is in.
func AccountPart(id string) int {
	h := fnv.New64a()
	_, _ = h.Write([]byte(id)) // hash.Hash never fails
	return int(h.Sum64() % Parts)
}

// KeyPart is the part that a key is in.
func KeyPart(h Hash) int { return int(h[0])<<(partBits-8) | int(h[1])>>(16-partBits) }

// AccountsKey is the KV key of a part of the accounts.
func AccountsKey(part int) string { return accountsPrefix + strconv.Itoa(part) }

// KeysKey is the KV key of a part of the keys.
func KeysKey(part int) string { return keysPrefix + strconv.Itoa(part) }

// Kind of a record.
type Kind uint8

// The kinds of records. Other is one of a newer writer.
const (
	Other Kind = iota
	Plans
	AccountsPart
	KeysPart
)

// ParseKey returns what stands under a KV key, and which part of it.
func ParseKey(key string) (Kind, int) {
	if key == PlansKey {
		return Plans, 0
	}
	kind, rest := AccountsPart, ""
	var ok bool
	if rest, ok = strings.CutPrefix(key, accountsPrefix); !ok {
		if rest, ok = strings.CutPrefix(key, keysPrefix); !ok {
			return Other, 0
		}
		kind = KeysPart
	}
	part, err := strconv.Atoi(rest)
	if err != nil || part < 0 || part >= Parts || strconv.Itoa(part) != rest {
		return Other, 0
	}
	return kind, part
}

// Records returns all records of a directory, by KV key. Records without an
// entry are not among them. Ids and hashes must each be there once.
func Records(plans []usage.Plan, accounts []Account, keys []Key) (map[string][]byte, error) {
	out := make(map[string][]byte, 2*Parts+1)
	set := &tollkeeperv1.PlanSet{}
	for i := range plans {
		set.Plans = append(set.Plans, ledger.PlanToProto(&plans[i]))
	}
	slices.SortFunc(set.Plans, func(a, b *tollkeeperv1.Plan) int { return strings.Compare(a.GetId(), b.GetId()) })
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(set)
	if err != nil {
		return nil, fmt.Errorf("plans of the directory: %w", err)
	}
	if len(plans) > 0 {
		out[PlansKey] = data
	}

	byAccount := make([][]*Account, Parts)
	for i := range accounts {
		p := AccountPart(accounts[i].ID)
		byAccount[p] = append(byAccount[p], &accounts[i])
	}
	for p, list := range byAccount {
		if len(list) == 0 {
			continue
		}
		slices.SortFunc(list, func(a, b *Account) int { return strings.Compare(a.ID, b.ID) })
		var data []byte
		for _, a := range list {
			data = appendEntry(data, []byte(a.ID), a.Parent, a.Plan)
		}
		out[AccountsKey(p)] = data
	}
	byKey := make([][]*Key, Parts)
	for i := range keys {
		p := KeyPart(keys[i].Hash)
		byKey[p] = append(byKey[p], &keys[i])
	}
	for p, list := range byKey {
		if len(list) == 0 {
			continue
		}
		slices.SortFunc(list, func(a, b *Key) int { return bytes.Compare(a.Hash[:], b.Hash[:]) })
		var data []byte
		for _, k := range list {
			data = appendEntry(data, k.Hash[:], k.ID, k.Account)
		}
		out[KeysKey(p)] = data
	}
	return out, nil
}

func appendEntry(data, first []byte, second, third string) []byte {
	n := protowire.SizeTag(fieldFirst) + protowire.SizeBytes(len(first))
	for _, s := range []string{second, third} {
		if s != "" {
			n += protowire.SizeTag(fieldSecond) + protowire.SizeBytes(len(s))
		}
	}
	data = protowire.AppendTag(data, fieldEntry, protowire.BytesType)
	data = protowire.AppendVarint(data, uint64(n))
	data = protowire.AppendBytes(protowire.AppendTag(data, fieldFirst, protowire.BytesType), first)
	if second != "" {
		data = protowire.AppendString(protowire.AppendTag(data, fieldSecond, protowire.BytesType), second)
	}
	if third != "" {
		data = protowire.AppendString(protowire.AppendTag(data, fieldThird, protowire.BytesType), third)
	}
	return data
}

// ReadPlans reads the record of all plans.
func ReadPlans(data []byte) ([]usage.Plan, error) {
	var set tollkeeperv1.PlanSet
	if err := proto.Unmarshal(data, &set); err != nil {
		return nil, fmt.Errorf("it is not protobuf: %w", err)
	}
	out := make([]usage.Plan, 0, len(set.GetPlans()))
	for _, p := range set.GetPlans() {
		if p.GetId() == "" {
			return nil, errors.New("a plan has no id")
		}
		out = append(out, ledger.PlanFromProto(p))
	}
	return out, nil
}

// Part is the entries of one record. It never changes; its bytes are those it was
// read from. A nil Part has no entries.
type Part struct {
	data []byte
	at   []uint32 // where each entry begins
}

// ReadAccounts reads a part of the accounts.
func ReadAccounts(part int, data []byte) (*Part, error) {
	return read(data, func(first []byte) error {
		if AccountPart(string(first)) != part {
			return errors.New("an account is in the wrong part")
		}
		return nil
	})
}

// ReadKeys reads a part of the keys.
func ReadKeys(part int, data []byte) (*Part, error) {
	return read(data, func(first []byte) error {
		if len(first) != len(Hash{}) {
			return errors.New("a key's hash has not 32 bytes")
		}
		if KeyPart(Hash(first)) != part {
			return errors.New("a key is in the wrong part")
		}
		return nil
	})
}

func read(data []byte, check func(first []byte) error) (*Part, error) {
	p := &Part{data: data}
	var before []byte
	for at := 0; at < len(data); {
		number, kind, n := protowire.ConsumeTag(data[at:])
		if n < 0 {
			return nil, fmt.Errorf("it is not protobuf: %w", protowire.ParseError(n))
		}
		if number != fieldEntry || kind != protowire.BytesType {
			skip := protowire.ConsumeFieldValue(number, kind, data[at+n:])
			if skip < 0 {
				return nil, fmt.Errorf("it is not protobuf: %w", protowire.ParseError(skip))
			}
			at += n + skip
			continue
		}
		entry, m := protowire.ConsumeBytes(data[at+n:])
		if m < 0 {
			return nil, fmt.Errorf("it is not protobuf: %w", protowire.ParseError(m))
		}
		first, _, _, err := fields(entry)
		if err != nil {
			return nil, err
		}
		if len(first) == 0 || len(p.at) > 0 && bytes.Compare(before, first) >= 0 {
			return nil, errors.New("its entries are not in order, or one has no name")
		}
		if err := check(first); err != nil {
			return nil, err
		}
		before = first
		p.at = append(p.at, uint32(at+n))
		at += n + m
	}
	p.at = slices.Clip(p.at)
	return p, nil
}

// fields returns the three fields of an entry; unknown ones are skipped.
func fields(entry []byte) (first, second, third []byte, err error) {
	for len(entry) > 0 {
		number, kind, n := protowire.ConsumeTag(entry)
		if n < 0 {
			return nil, nil, nil, fmt.Errorf("it is not protobuf: %w", protowire.ParseError(n))
		}
		entry = entry[n:]
		if kind != protowire.BytesType || number > fieldThird {
			skip := protowire.ConsumeFieldValue(number, kind, entry)
			if skip < 0 {
				return nil, nil, nil, fmt.Errorf("it is not protobuf: %w", protowire.ParseError(skip))
			}
			entry = entry[skip:]
			continue
		}
		v, n := protowire.ConsumeBytes(entry)
		if n < 0 {
			return nil, nil, nil, fmt.Errorf("it is not protobuf: %w", protowire.ParseError(n))
		}
		switch number {
		case fieldFirst:
			first = v
		case fieldSecond:
			second = v
		case fieldThird:
			third = v
		}
		entry = entry[n:]
	}
	return first, second, third, nil
}

// Len is how many entries there are.
func (p *Part) Len() int {
	if p == nil {
		return 0
	}
	return len(p.at)
}

// Bytes are those that the part was read from; they must not be changed.
func (p *Part) Bytes() []byte {
	if p == nil {
		return nil
	}
	return p.data
}

func (p *Part) entry(i int) (first, second, third []byte) {
	entry, _ := protowire.ConsumeBytes(p.data[p.at[i]:])
	first, second, third, _ = fields(entry) // it was read before
	return first, second, third
}

func (p *Part) find(first []byte) (int, bool) {
	if p == nil {
		return 0, false
	}
	lo, hi := 0, len(p.at)
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		entry, _ := protowire.ConsumeBytes(p.data[p.at[mid]:])
		// The first field is mostly the first; one of another writer's is found too.
		at, _, _, _ := fields(entry)
		switch c := bytes.Compare(at, first); {
		case c == 0:
			return mid, true
		case c < 0:
			lo = mid + 1
		default:
			hi = mid
		}
	}
	return 0, false
}

// Account finds an account of a part of the accounts. The strings are copies.
func (p *Part) Account(id string) (Account, bool) {
	i, ok := p.find([]byte(id))
	if !ok {
		return Account{}, false
	}
	_, parent, plan := p.entry(i)
	return Account{ID: id, Parent: string(parent), Plan: string(plan)}, true
}

// Has reports whether there is a key of this hash. It does not allocate.
func (p *Part) Has(h Hash) bool {
	_, ok := p.find(h[:])
	return ok
}

// Key finds a key of a part of the keys. The strings are copies.
func (p *Part) Key(h Hash) (Key, bool) {
	i, ok := p.find(h[:])
	if !ok {
		return Key{}, false
	}
	_, id, account := p.entry(i)
	return Key{Hash: h, ID: string(id), Account: string(account)}, true
}

// Differ calls f with the id or hash of each entry that is in one of two parts only,
// or is not the same in both, in order. What f is called with must not be kept.
func Differ(old, next *Part, f func(first []byte)) {
	if bytes.Equal(old.Bytes(), next.Bytes()) {
		return
	}
	i, k := 0, 0
	for i < old.Len() || k < next.Len() {
		var a, b []byte
		if i < old.Len() {
			a, _, _ = old.entry(i)
		}
		if k < next.Len() {
			b, _, _ = next.entry(k)
		}
		switch c := bytes.Compare(a, b); {
		case b == nil || a != nil && c < 0:
			f(a)
			i++
		case a == nil || c > 0:
			f(b)
			k++
		default:
			_, second, third := old.entry(i)
			if _, s, t := next.entry(k); !bytes.Equal(second, s) || !bytes.Equal(third, t) {
				f(a)
			}
			i++
			k++
		}
	}
}
