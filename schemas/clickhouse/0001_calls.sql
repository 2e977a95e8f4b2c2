-- One row a call event, with its position in the ledger. Written by the
-- historian alone, in blocks whose boundaries are durable before they are sent.
--
-- Sorted by account and time, so that what one account did lies together. In
-- that order ledger positions, frame numbers and times climb together, and
-- their differences are small: that is where the bytes a row are won.
--
-- A quantity that was not reported is unknown: its bit in `known` is 0 (bit i
-- is meter i of the wire: calls, input_tokens, output_tokens,
-- cached_input_tokens, reasoning_tokens, cost, bytes) and the column holds 0.
-- One mask is cheaper than seven Nullable columns to write, keep and sum.
--
-- The token window is counted in blocks, not in time: 10,000 of them.
CREATE TABLE IF NOT EXISTS calls
(
    account             String                     COMMENT 'who pays: the leaf of the path' CODEC(ZSTD(1)),
    time                DateTime64(6, 'UTC')       COMMENT 'event time by the gateway''s clock, not clamped' CODEC(Delta(8), ZSTD(1)),
    sequence            UInt64                     COMMENT 'position of the frame in the ledger' CODEC(Delta(8), ZSTD(1)),
    row                 UInt16                     COMMENT 'index of the call in its frame' CODEC(ZSTD(1)),
    stream_time         DateTime('UTC')            COMMENT 'the ledger''s time of the frame; never goes back' CODEC(Delta(4), ZSTD(1)),
    shard               UInt16                     CODEC(ZSTD(1)),
    producer            LowCardinality(String)     COMMENT 'ksuid; empty: a foreign event without a frame' CODEC(ZSTD(1)),
    frame               UInt64                     COMMENT 'number of the frame, per producer and shard' CODEC(Delta(8), ZSTD(1)),
    gateway             LowCardinality(String)     CODEC(ZSTD(1)),
    key_id              LowCardinality(String)     CODEC(ZSTD(1)),
    request_id          String                     CODEC(ZSTD(1)),
    trace_id            FixedString(16)            CODEC(ZSTD(1)),
    span_id             FixedString(8)             CODEC(ZSTD(1)),
    trace_flags         UInt8                      CODEC(ZSTD(1)),
    method              LowCardinality(String)     CODEC(ZSTD(1)),
    route               LowCardinality(String)     CODEC(ZSTD(1)),
    model               LowCardinality(String)     CODEC(ZSTD(1)),
    region              LowCardinality(String)     CODEC(ZSTD(1)),
    status              UInt16                     CODEC(ZSTD(1)),
    code                LowCardinality(String)     COMMENT 'why it was refused; empty: admitted' CODEC(ZSTD(1)),
    decision_id         String                     CODEC(ZSTD(1)),
    duration_micros     UInt64                     CODEC(T64, ZSTD(1)),
    flags               UInt32                     COMMENT '1 admitted while unknown, 2 estimated, 4 event time ahead of the ledger' CODEC(T64, ZSTD(1)),
    late                UInt8                      COMMENT 'its minute had ended more than a minute before it entered the ledger' CODEC(ZSTD(1)),
    source              LowCardinality(String)     CODEC(ZSTD(1)),
    event_id            String                     CODEC(ZSTD(1)),
    price_version       LowCardinality(String)     CODEC(ZSTD(1)),
    currency            LowCardinality(String)     CODEC(ZSTD(1)),
    known               UInt32                     CODEC(T64, ZSTD(1)),
    calls               Int64                      CODEC(T64, ZSTD(1)),
    input_tokens        Int64                      CODEC(T64, ZSTD(1)),
    output_tokens       Int64                      CODEC(T64, ZSTD(1)),
    cached_input_tokens Int64                      CODEC(T64, ZSTD(1)),
    reasoning_tokens    Int64                      CODEC(T64, ZSTD(1)),
    cost                Int64                      COMMENT 'nano-units of the currency' CODEC(T64, ZSTD(1)),
    bytes               Int64                      CODEC(T64, ZSTD(1)),
    custom              Map(LowCardinality(String), Int64) COMMENT 'the user''s own meters' CODEC(ZSTD(1))
)
ENGINE = MergeTree
PARTITION BY toYYYYMM(stream_time)
PRIMARY KEY (account, time)
ORDER BY (account, time, sequence, row)
SETTINGS non_replicated_deduplication_window = 10000;
