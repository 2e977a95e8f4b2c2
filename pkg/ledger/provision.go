package ledger

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/tollkeeper/tollkeeper/schemas"
)

// ProvisionOptions say how the streams are to be made.
type ProvisionOptions struct {
	// Shards of a ledger that does not exist yet; an existing one keeps its own.
	Shards uint32
	// Replicas of every stream and bucket; 1 when 0.
	Replicas int
}

// Geometry is what must never change once a ledger exists.
type Geometry struct {
	Shards uint32
}

// shardsKey of the config bucket holds the number of shards in decimal.
const shardsKey = "ledger.shards"

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

// Provision makes the streams and buckets of schemas/streams.json that do not
// exist yet and returns the ledger's geometry. Streams that exist are left as
// they are: an operator may have tuned them. It can be called by every service
// at the same time.
func Provision(ctx context.Context, js jetstream.JetStream, o ProvisionOptions) (Geometry, error) {
	var defs definitions
	if err := json.Unmarshal(schemas.Streams, &defs); err != nil {
		return Geometry{}, fmt.Errorf("streams.json: %w", err)
	}
	replicas := max(o.Replicas, 1)
	for _, cfg := range defs.Streams {
		cfg.Replicas = replicas
		if _, err := js.CreateStream(ctx, cfg); err != nil && !errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
			return Geometry{}, fmt.Errorf("create stream %s: %w", cfg.Name, err)
		}
	}
	for _, b := range defs.Buckets {
		_, err := js.CreateKeyValue(ctx, jetstream.KeyValueConfig{
			Bucket: b.Bucket, Description: b.Description, History: b.History, MaxBytes: b.MaxBytes, MaxValueSize: b.MaxValueSize, Replicas: replicas,
		})
		if err != nil && !errors.Is(err, jetstream.ErrBucketExists) {
			return Geometry{}, fmt.Errorf("create bucket %s: %w", b.Bucket, err)
		}
	}
	for _, b := range defs.Objects {
		_, err := js.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{Bucket: b.Bucket, Description: b.Description, MaxBytes: b.MaxBytes, Replicas: replicas})
		if err != nil && !errors.Is(err, jetstream.ErrBucketExists) {
			return Geometry{}, fmt.Errorf("create object bucket %s: %w", b.Bucket, err)
		}
	}
	shards := o.Shards
	if shards == 0 {
		shards = DefaultLocalShards
	}
	if shards > MaxShards {
		return Geometry{}, fmt.Errorf("%d shards: at most %d", shards, MaxShards)
	}
	kv, err := js.KeyValue(ctx, ConfigBucket)
	if err != nil {
		return Geometry{}, fmt.Errorf("bucket %s: %w", ConfigBucket, err)
	}
	if _, err := kv.Create(ctx, shardsKey, []byte(strconv.FormatUint(uint64(shards), 10))); err == nil {
		return Geometry{Shards: shards}, nil
	} else if !errors.Is(err, jetstream.ErrKeyExists) {
		return Geometry{}, fmt.Errorf("write %s: %w", shardsKey, err)
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
	return Geometry{Shards: uint32(n)}, nil
}
