package ledger

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/segmentio/ksuid"

	"github.com/tollkeeper/tollkeeper/pkg/usage"
	"github.com/tollkeeper/tollkeeper/schemas"
)

// ProvisionOptions say how the streams are to be made.
type ProvisionOptions struct {
	// Shards of a ledger that does not exist yet; an existing one keeps its own.
	Shards uint32
	// Currency of the costs of a ledger that does not exist yet (ISO 4217);
	// usage.DefaultCurrency when empty. It is an error when an existing ledger has
	// another.
	Currency string
	// Replicas of every stream and bucket; 1 when 0.
	Replicas int
	// TestClock gives a ledger that does not exist yet a test clock, which stands at
	// this time (package testclock advances it). Zero: its time is the server's.
	TestClock time.Time
	// Notice is told, in a sentence, what whoever runs the ledger should know;
	// may be nil.
	Notice func(string)
}

// Geometry is what must never change once a ledger exists.
type Geometry struct {
	Shards uint32
	// Currency in which all costs are (ISO 4217).
	Currency string
}

// Keys of the config bucket: the number of shards in decimal, and the currency. A
// ledger of before it had one counts in usage.DefaultCurrency.
const (
	shardsKey   = "ledger.shards"
	currencyKey = "ledger.currency"
)

type definitions struct {
	Streams []jetstream.StreamConfig `json:"streams"`
	Buckets []struct {
		Bucket       string `json:"bucket"`
		Description  string `json:"description"`
		History      uint8  `json:"history"`
		MaxBytes     int64  `json:"max_bytes"`
		MaxValueSize int32  `json:"max_value_size"`
	} `json:"buckets"`
	Objects []struct {
		Bucket      string `json:"bucket"`
		Description string `json:"description"`
		MaxBytes    int64  `json:"max_bytes"`
	} `json:"objects"`
}

// piece is one stream, KV bucket or object bucket to be made.
type piece struct {
	stream   string // name of its stream
	maxBytes int64
	create   func(ctx context.Context, maxBytes int64) error
}

func pieces(js jetstream.JetStream, defs *definitions, replicas int, testClock time.Time) []piece {
	var all []piece
	for _, cfg := range defs.Streams {
		all = append(all, piece{cfg.Name, cfg.MaxBytes, func(ctx context.Context, maxBytes int64) error {
			cfg.Replicas, cfg.MaxBytes = replicas, maxBytes
			if cfg.Name == Stream && !testClock.IsZero() {
				cfg.Metadata = map[string]string{bornKey: strconv.FormatInt(testClock.UnixMicro(), 10)}
			}
			_, err := js.CreateStream(ctx, cfg)
			return err
		}})
	}
	for _, b := range defs.Buckets {
		all = append(all, piece{"KV_" + b.Bucket, b.MaxBytes, func(ctx context.Context, maxBytes int64) error {
			_, err := js.CreateKeyValue(ctx, jetstream.KeyValueConfig{
				Bucket: b.Bucket, Description: b.Description, History: b.History, MaxBytes: maxBytes, MaxValueSize: b.MaxValueSize, Replicas: replicas,
			})
			return err
		}})
	}
	for _, b := range defs.Objects {
		all = append(all, piece{"OBJ_" + b.Bucket, b.MaxBytes, func(ctx context.Context, maxBytes int64) error {
			_, err := js.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{Bucket: b.Bucket, Description: b.Description, MaxBytes: maxBytes, Replicas: replicas})
			return err
		}})
	}
	return all
}

// maxDivisor is how far the sizes of streams.json may be divided: what fits
// on a disk smaller than that is no ledger.
const maxDivisor = 256

// JetStream's codes for a stream whose max_bytes, which it reserves, do not fit
// beside those of the others: on one server, and in a cluster, where there are
// other reasons to find no peers.
const (
	errCodeNoRoom     = 10047
	errCodeNoPeers    = 10005
	noPeersForStorage = "insufficient storage"
)

func noRoom(err error) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && (api.ErrorCode == errCodeNoRoom ||
		api.ErrorCode == errCodeNoPeers && strings.Contains(api.Description, noPeersForStorage))
}

// How long streams can't be made because a cluster has just started, lost a node
// or elects: its leader knows what each node has room for only once it has heard
// from it, and forgets it when a route is made anew; and what it is asked while
// another takes its place nobody answers.
const (
	settlesWithin = 30 * time.Second
	makeTimeout   = 5 * time.Second // of one try
)

// errCodeUnavailable is JetStream's code while it has no leader.
const errCodeUnavailable = 10008

// unsettled says that the same request may succeed a moment later.
func unsettled(err error) bool {
	var api *jetstream.APIError
	if errors.As(err, &api) {
		return api.ErrorCode == errCodeUnavailable || api.ErrorCode == errCodeNoPeers && !noRoom(err)
	}
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, nats.ErrTimeout) || errors.Is(err, nats.ErrNoResponders) || errors.Is(err, jetstream.ErrNoStreamResponse)
}

// settled makes a request, again and again while the cluster is unsettled. The
// request must be one that may be carried out twice: of a try without an answer
// nobody knows whether it was.
func settled(ctx context.Context, request func(context.Context) error) error {
	over := time.Now().Add(settlesWithin)
	for {
		try, cancel := context.WithTimeout(ctx, makeTimeout)
		err := request(try)
		cancel()
		if err == nil || !unsettled(err) || ctx.Err() != nil || time.Now().After(over) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// remove deletes a stream, which may be gone already.
func remove(ctx context.Context, js jetstream.JetStream, name string) error {
	err := settled(ctx, func(ctx context.Context) error { return js.DeleteStream(ctx, name) })
	if err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
		return fmt.Errorf("delete stream %s: %w", name, err)
	}
	return nil
}

// subjectsTimeout bounds the change of a stream: whoever lacks the right to it is
// not answered.
const subjectsTimeout = 2 * time.Second

// addSubjects lets the ledger take the subjects that it did not have when it was
// made. Nothing else of it is changed; and where it cannot be done here, everything
// but those subjects works.
func addSubjects(ctx context.Context, js jetstream.JetStream, defs *definitions, notice func(string)) error {
	defined := slices.IndexFunc(defs.Streams, func(c jetstream.StreamConfig) bool { return c.Name == Stream })
	var cfg jetstream.StreamConfig
	err := settled(ctx, func(ctx context.Context) error {
		s, err := findStream(ctx, js, Stream)
		if err == nil {
			cfg = s.CachedInfo().Config
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("stream %s: %w", Stream, err)
	}
	missing := slices.DeleteFunc(slices.Clone(defs.Streams[defined].Subjects), func(s string) bool { return slices.Contains(cfg.Subjects, s) })
	if len(missing) == 0 {
		return nil
	}
	cfg.Subjects = append(slices.Clone(cfg.Subjects), missing...)
	try, cancel := context.WithTimeout(ctx, subjectsTimeout)
	defer cancel()
	if _, err := js.UpdateStream(try, cfg); err != nil && notice != nil {
		notice(fmt.Sprintf("the stream %s was made by a version without the subjects %s and could not be given them (%v): what is meant for them waits at the gateways; run `nats stream edit %s --subjects '%s'` as an operator",
			Stream, strings.Join(missing, ", "), err, Stream, strings.Join(cfg.Subjects, ",")))
	}
	return nil
}

// Provision makes the streams and buckets of schemas/streams.json that do not
// exist yet and returns the ledger's geometry. Streams that exist are left as
// they are, for an operator may have tuned them; only the ledger is given subjects
// that an older version did not know. The sizes of streams.json are for
// a server with room for all of them; where there is less, all are divided by
// the same power of two, and Notice is told. It can be called by every service
// at the same time.
func Provision(ctx context.Context, js jetstream.JetStream, o ProvisionOptions) (Geometry, error) {
	var defs definitions
	if err := json.Unmarshal(schemas.Streams, &defs); err != nil {
		return Geometry{}, fmt.Errorf("streams.json: %w", err)
	}
	replicas := max(o.Replicas, 1)
	if o.Shards > MaxShards {
		return Geometry{}, fmt.Errorf("%d shards: at most %d", o.Shards, MaxShards)
	}
	if o.Currency != "" && !usage.ValidCurrency(o.Currency) {
		return Geometry{}, fmt.Errorf("%q is no currency: use its ISO 4217 code, three capital letters such as USD", o.Currency)
	}
	all := pieces(js, &defs, replicas, o.TestClock)
	missing, err := missingOf(ctx, js, all)
	if err != nil {
		return Geometry{}, err
	}
	if len(missing) > 0 {
		if err := makeMissing(ctx, js, all, replicas, o.Notice); err != nil {
			return Geometry{}, err
		}
	}
	if err := addSubjects(ctx, js, &defs, o.Notice); err != nil {
		return Geometry{}, err
	}
	var g Geometry
	err = settled(ctx, func(ctx context.Context) (err error) {
		g, err = setGeometry(ctx, js, o)
		return err
	})
	return g, err
}

func missingOf(ctx context.Context, js jetstream.JetStream, all []piece) ([]piece, error) {
	var missing []piece
	for _, p := range all {
		err := settled(ctx, func(ctx context.Context) error {
			_, err := findStream(ctx, js, p.stream)
			return err
		})
		switch {
		case errors.Is(err, jetstream.ErrStreamNotFound):
			missing = append(missing, p)
		case err != nil:
			return nil, fmt.Errorf("stream %s: %w", p.stream, err)
		}
	}
	return missing, nil
}

// turnStream is there while somebody makes streams: two who look for room at
// the same time would each find too little.
const turnStream = "TOLLKEEPER_PROVISIONING"

// turnLasts is when a turn is over, whether it was given up or its holder died.
const turnLasts = 15 * time.Second

// takeTurn waits until nobody else makes streams.
func takeTurn(ctx context.Context, js jetstream.JetStream) (give func() error, err error) {
	id := ksuid.New().String()
	cfg := jetstream.StreamConfig{
		Name: turnStream, Description: "Tollkeeper: there while streams are made; safe to delete.",
		Subjects: []string{"tollkeeper.provisioning." + id}, MaxBytes: 1 << 16,
	}
	for {
		err := settled(ctx, func(ctx context.Context) error {
			_, err := js.CreateStream(ctx, cfg)
			return err
		})
		if err == nil {
			return func() error { return remove(ctx, js, turnStream) }, nil
		}
		if !errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
			return nil, fmt.Errorf("create stream %s: %w", turnStream, err)
		}
		if s, err := findStream(ctx, js, turnStream); err == nil {
			if i := s.CachedInfo(); i.TimeStamp.Sub(i.Created) > turnLasts {
				if err := remove(ctx, js, turnStream); err != nil {
					return nil, err
				}
				continue
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for another process that makes streams: %w", ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func makeMissing(ctx context.Context, js jetstream.JetStream, all []piece, replicas int, notice func(string)) (err error) {
	give, err := takeTurn(ctx, js)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, give()) }()
	missing, err := missingOf(ctx, js, all)
	if err != nil || len(missing) == 0 {
		return err
	}
	var total int64
	for _, p := range missing {
		total += p.maxBytes
	}
	divisor, err := findRoom(ctx, js, total, replicas)
	if err != nil {
		return err
	}
	if divisor > 1 && notice != nil {
		notice(fmt.Sprintf("NATS has no room for streams of %d GiB altogether: they are made with 1/%d of their sizes; give its file store more room to avoid a full ledger", total>>30, divisor))
	}
	for _, p := range missing {
		err := p.createInRoom(ctx, p.maxBytes/divisor)
		if err != nil && !errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) && !errors.Is(err, jetstream.ErrBucketExists) {
			return fmt.Errorf("create stream %s: %w", p.stream, err)
		}
	}
	return nil
}

// roomReturns bounds the wait for the room that the probe took.
const roomReturns = 5 * time.Second

// createInRoom creates a piece for which there is room: the nodes of a cluster
// tell each other only from time to time what they have reserved, so that the
// room of a stream that was just removed may seem to be taken still.
func (p *piece) createInRoom(ctx context.Context, maxBytes int64) error {
	over := time.After(roomReturns)
	for {
		err := settled(ctx, func(ctx context.Context) error { return p.create(ctx, maxBytes) })
		if !noRoom(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-over:
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// findRoom returns the power of two by which the sizes must be divided to fit
// together. A server does not tell how much room it has, only whether a
// stream fits: so one of the whole size is made and removed at once. Were the
// streams made one by one instead, the first would take what the last needs.
//
// Another stream must be there (the turn's is): a server that removes its only
// stream removes the directory of streams too, and does so after it has
// answered, under the hands of whoever makes the next.
func findRoom(ctx context.Context, js jetstream.JetStream, total int64, replicas int) (int64, error) {
	cfg := jetstream.StreamConfig{Name: "TOLLKEEPER_ROOM_" + ksuid.New().String(), Description: "Tollkeeper: looks how much room there is; safe to delete.", Replicas: replicas}
	cfg.Subjects = []string{"tollkeeper.room." + cfg.Name}
	for divisor := int64(1); ; divisor *= 2 {
		cfg.MaxBytes = total / divisor
		err := settled(ctx, func(ctx context.Context) error {
			_, err := js.CreateStream(ctx, cfg)
			return err
		})
		switch {
		case err == nil:
			if err := remove(ctx, js, cfg.Name); err != nil {
				return 0, err
			}
			return divisor, nil
		case !noRoom(err):
			return 0, fmt.Errorf("create stream %s: %w", cfg.Name, err)
		case divisor == maxDivisor:
			return 0, fmt.Errorf("the file store of NATS has less than %d MiB to reserve, which is too little for a ledger: free disk space or raise its limit: %w", total/divisor>>20, err)
		}
	}
}

func setGeometry(ctx context.Context, js jetstream.JetStream, o ProvisionOptions) (Geometry, error) {
	// Read first: whoever finds a ledger needs no right to write its geometry.
	g, err := ReadGeometry(ctx, js)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		g, err = bear(ctx, js, o)
	}
	if err == nil && o.Currency != "" && o.Currency != g.Currency {
		return Geometry{}, fmt.Errorf("the costs of this ledger are in %s and were so from its birth, not in %s: leave the currency (--currency, TOLLKEEPER_CURRENCY) out, or begin another ledger in a data directory of its own", g.Currency, o.Currency)
	}
	return g, err
}

// bear writes the geometry of a ledger that has none. The number of shards comes last:
// with it the ledger exists.
func bear(ctx context.Context, js jetstream.JetStream, o ProvisionOptions) (Geometry, error) {
	kv, err := js.KeyValue(ctx, ConfigBucket)
	if err != nil {
		return Geometry{}, fmt.Errorf("bucket %s: %w", ConfigBucket, err)
	}
	shards := cmp.Or(o.Shards, DefaultLocalShards)
	for _, entry := range [...]struct{ key, value string }{
		{currencyKey, cmp.Or(o.Currency, usage.DefaultCurrency)}, {shardsKey, strconv.FormatUint(uint64(shards), 10)},
	} {
		// Another may have been first: then that is what holds.
		if _, err := kv.Create(ctx, entry.key, []byte(entry.value)); err != nil && !errors.Is(err, jetstream.ErrKeyExists) {
			return Geometry{}, fmt.Errorf("write %s: %w", entry.key, err)
		}
	}
	return ReadGeometry(ctx, js)
}

// ReadGeometry returns the geometry of an existing ledger.
func ReadGeometry(ctx context.Context, js jetstream.JetStream) (Geometry, error) {
	kv, err := js.KeyValue(ctx, ConfigBucket)
	if err != nil {
		return Geometry{}, fmt.Errorf("bucket %s: %w", ConfigBucket, err)
	}
	e, err := kv.Get(ctx, shardsKey)
	if err != nil {
		return Geometry{}, fmt.Errorf("read %s: %w", shardsKey, err)
	}
	n, err := strconv.ParseUint(string(e.Value()), 10, 32)
	if err != nil || n == 0 || n > MaxShards {
		return Geometry{}, fmt.Errorf("%s is %q, which is not a number of shards", shardsKey, e.Value())
	}
	g := Geometry{Shards: uint32(n), Currency: usage.DefaultCurrency}
	e, err = kv.Get(ctx, currencyKey)
	switch {
	case errors.Is(err, jetstream.ErrKeyNotFound):
	case err != nil:
		return Geometry{}, fmt.Errorf("read %s: %w", currencyKey, err)
	default:
		if g.Currency = string(e.Value()); !usage.ValidCurrency(g.Currency) {
			return Geometry{}, fmt.Errorf("%s is %q, which is not a currency", currencyKey, e.Value())
		}
	}
	return g, nil
}
