-- Every revision of every decision (stream KV_decisions).
CREATE TABLE IF NOT EXISTS decisions
(
    sequence        UInt64               COMMENT 'position in the stream of decisions' CODEC(Delta(8), ZSTD(1)),
    stream_time     DateTime64(6, 'UTC') CODEC(Delta(8), ZSTD(1)),
    id              String               CODEC(ZSTD(1)),
    account         String               CODEC(ZSTD(1)),
    limit_id        LowCardinality(String),
    meter           LowCardinality(String),
    verdict         LowCardinality(String) COMMENT 'allow, warn, deny',
    code            LowCardinality(String),
    revision        UInt64               COMMENT 'the ledger position that led to it' CODEC(Delta(8), ZSTD(1)),
    shard           UInt16,
    epoch           UInt64,
    used            Int64                CODEC(ZSTD(1)),
    amount          Int64                CODEC(ZSTD(1)),
    window          LowCardinality(String),
    period_start    DateTime64(6, 'UTC') COMMENT '1970: lifetime' CODEC(Delta(8), ZSTD(1)),
    period_end      DateTime64(6, 'UTC') COMMENT '1970: lifetime' CODEC(Delta(8), ZSTD(1)),
    plan_version    LowCardinality(String),
    decided_at      DateTime64(6, 'UTC') CODEC(Delta(8), ZSTD(1)),
    cause           DateTime64(6, 'UTC') COMMENT 'event time of the crossing call; 1970: none' CODEC(Delta(8), ZSTD(1)),
    INDEX by_id id TYPE bloom_filter(0.001) GRANULARITY 4,
    INDEX by_sequence sequence TYPE minmax GRANULARITY 1
)
ENGINE = MergeTree
ORDER BY (account, decided_at, sequence)
SETTINGS non_replicated_deduplication_window = 10000;

-- The control entries of the ledger, as they stand there.
CREATE TABLE IF NOT EXISTS control
(
    sequence        UInt64               COMMENT 'position in the ledger' CODEC(Delta(8), ZSTD(1)),
    stream_time     DateTime64(6, 'UTC') CODEC(Delta(8), ZSTD(1)),
    shard           UInt16,
    id              String               CODEC(ZSTD(1)),
    author          LowCardinality(String),
    created_at      DateTime64(6, 'UTC') CODEC(Delta(8), ZSTD(1)),
    kind            LowCardinality(String) COMMENT 'plan_set, account_set, producer_closed; ticks are left out',
    body            String               COMMENT 'JSON' CODEC(ZSTD(3))
)
ENGINE = MergeTree
ORDER BY sequence
SETTINGS non_replicated_deduplication_window = 10000;

-- Every transition of every episode.
CREATE TABLE IF NOT EXISTS alerts
(
    sequence        UInt64               COMMENT 'position in the stream of alerts' CODEC(Delta(8), ZSTD(1)),
    stream_time     DateTime64(6, 'UTC') CODEC(Delta(8), ZSTD(1)),
    episode_id      String               CODEC(ZSTD(1)),
    transition      LowCardinality(String) COMMENT 'firing, resolved',
    n               Int64,
    rule            LowCardinality(String),
    scope           String               CODEC(ZSTD(1)),
    severity        LowCardinality(String),
    started_at      DateTime64(6, 'UTC') COMMENT 'the first breach' CODEC(Delta(8), ZSTD(1)),
    at              DateTime64(6, 'UTC') CODEC(Delta(8), ZSTD(1)),
    value           Float64              CODEC(ZSTD(1)),
    threshold       Float64              CODEC(ZSTD(1)),
    refused_accounts Int64               CODEC(ZSTD(1)),
    active_accounts Int64                CODEC(ZSTD(1)),
    reason          String               COMMENT 'of a resolve' CODEC(ZSTD(1)),
    summary         String               CODEC(ZSTD(1)),
    body            String               COMMENT 'the whole transition, JSON' CODEC(ZSTD(3))
)
ENGINE = MergeTree
ORDER BY sequence
SETTINGS non_replicated_deduplication_window = 10000;
