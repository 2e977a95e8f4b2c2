-- What was corrected: compensating entries of the ledger (ControlEntry.correction),
-- one row an act, what it adds to each meter signed. Written by the historian with
-- the block of control entries it stands in.
CREATE TABLE IF NOT EXISTS corrections
(
    sequence            UInt64               COMMENT 'position in the ledger' CODEC(Delta(8), ZSTD(1)),
    stream_time         DateTime64(6, 'UTC') CODEC(Delta(8), ZSTD(1)),
    shard               UInt16,
    id                  String               COMMENT 'identity of the act' CODEC(ZSTD(1)),
    author              LowCardinality(String),
    created_at          DateTime64(6, 'UTC') CODEC(Delta(8), ZSTD(1)),
    account             String               COMMENT 'whose usage was corrected' CODEC(ZSTD(1)),
    time                DateTime64(6, 'UTC') COMMENT 'of the corrected usage; not after stream_time' CODEC(Delta(8), ZSTD(1)),
    model               LowCardinality(String),
    route               LowCardinality(String),
    method              LowCardinality(String),
    calls               Int64                CODEC(T64, ZSTD(1)),
    input_tokens        Int64                CODEC(T64, ZSTD(1)),
    output_tokens       Int64                CODEC(T64, ZSTD(1)),
    cached_input_tokens Int64                CODEC(T64, ZSTD(1)),
    reasoning_tokens    Int64                CODEC(T64, ZSTD(1)),
    cost                Int64                CODEC(T64, ZSTD(1)),
    bytes               Int64                CODEC(T64, ZSTD(1)),
    custom              Map(LowCardinality(String), Int64) COMMENT 'the user''s own meters' CODEC(ZSTD(1)),
    reason              String               CODEC(ZSTD(1)),
    reference           String               COMMENT 'what was corrected, where that is known' CODEC(ZSTD(1)),
    INDEX by_account account TYPE bloom_filter(0.001) GRANULARITY 4
)
ENGINE = MergeTree
ORDER BY sequence
SETTINGS non_replicated_deduplication_window = 10000;

-- Each act once: an entry that repeats one of its shard changes nothing.
CREATE VIEW IF NOT EXISTS v_corrections AS
SELECT
    sequence, stream_time, shard, id, author, created_at, account, time, model, route, method,
    calls, input_tokens, output_tokens, cached_input_tokens, reasoning_tokens, cost, bytes, custom, reason, reference
FROM corrections
ORDER BY sequence
LIMIT 1 BY shard, id;

-- The views of usage tell corrections in columns of their own, adjusted_…: what was
-- reported stays as it was, and the sum of both is what counts. A correction is at
-- the time of the usage it corrects, under the code of what was admitted.
CREATE OR REPLACE VIEW v_usage_hourly AS
SELECT
    hour, account, model, code,
    sum(u.attempts) AS attempts, sum(u.refused) AS refused, sum(u.attempts) - sum(u.refused) AS admitted,
    sum(u.duration_micros) AS duration_micros,
    sum(u.calls) AS calls, sum(u.input_tokens) AS input_tokens, sum(u.output_tokens) AS output_tokens, sum(u.cached_input_tokens) AS cached_input_tokens, sum(u.reasoning_tokens) AS reasoning_tokens, sum(u.cost) AS cost, sum(u.bytes) AS bytes,
    sum(u.adjusted_calls) AS adjusted_calls, sum(u.adjusted_input_tokens) AS adjusted_input_tokens, sum(u.adjusted_output_tokens) AS adjusted_output_tokens, sum(u.adjusted_cached_input_tokens) AS adjusted_cached_input_tokens, sum(u.adjusted_reasoning_tokens) AS adjusted_reasoning_tokens, sum(u.adjusted_cost) AS adjusted_cost, sum(u.adjusted_bytes) AS adjusted_bytes
FROM
(
    SELECT
        r.hour AS hour, r.account AS account, r.model AS model, r.code AS code,
        r.attempts AS attempts, r.refused AS refused, r.duration_micros AS duration_micros,
        r.calls AS calls, r.input_tokens AS input_tokens, r.output_tokens AS output_tokens, r.cached_input_tokens AS cached_input_tokens, r.reasoning_tokens AS reasoning_tokens, r.cost AS cost, r.bytes AS bytes,
        toInt64(0) AS adjusted_calls, toInt64(0) AS adjusted_input_tokens, toInt64(0) AS adjusted_output_tokens, toInt64(0) AS adjusted_cached_input_tokens, toInt64(0) AS adjusted_reasoning_tokens, toInt64(0) AS adjusted_cost, toInt64(0) AS adjusted_bytes
    FROM usage_hourly AS r
    UNION ALL
    SELECT
        toStartOfHour(toDateTime(x.time, 'UTC')) AS hour, x.account AS account, CAST(x.model AS LowCardinality(String)) AS model, CAST('' AS LowCardinality(String)) AS code,
        toUInt64(0) AS attempts, toUInt64(0) AS refused, toUInt64(0) AS duration_micros,
        toInt64(0) AS calls, toInt64(0) AS input_tokens, toInt64(0) AS output_tokens, toInt64(0) AS cached_input_tokens, toInt64(0) AS reasoning_tokens, toInt64(0) AS cost, toInt64(0) AS bytes,
        x.calls AS adjusted_calls, x.input_tokens AS adjusted_input_tokens, x.output_tokens AS adjusted_output_tokens, x.cached_input_tokens AS adjusted_cached_input_tokens, x.reasoning_tokens AS adjusted_reasoning_tokens, x.cost AS adjusted_cost, x.bytes AS adjusted_bytes
    FROM v_corrections AS x
) AS u
GROUP BY hour, account, model, code;

-- By minute of the event time and account, out of the calls: ask it for one account or
-- a short time. For all accounts there is v_traffic_minute.
CREATE OR REPLACE VIEW v_usage_minute AS
SELECT
    minute, account, model, code,
    sum(u.attempts) AS attempts, sum(u.refused) AS refused, sum(u.attempts) - sum(u.refused) AS admitted,
    sum(u.duration_micros) AS duration_micros,
    sum(u.calls) AS calls, sum(u.input_tokens) AS input_tokens, sum(u.output_tokens) AS output_tokens, sum(u.cached_input_tokens) AS cached_input_tokens, sum(u.reasoning_tokens) AS reasoning_tokens, sum(u.cost) AS cost, sum(u.bytes) AS bytes,
    sum(u.adjusted_calls) AS adjusted_calls, sum(u.adjusted_input_tokens) AS adjusted_input_tokens, sum(u.adjusted_output_tokens) AS adjusted_output_tokens, sum(u.adjusted_cached_input_tokens) AS adjusted_cached_input_tokens, sum(u.adjusted_reasoning_tokens) AS adjusted_reasoning_tokens, sum(u.adjusted_cost) AS adjusted_cost, sum(u.adjusted_bytes) AS adjusted_bytes
FROM
(
    SELECT
        toStartOfMinute(c.time) AS minute, c.account AS account, c.model AS model, c.code AS code,
        toUInt64(1) AS attempts, toUInt64(c.code != '') AS refused, c.duration_micros AS duration_micros,
        if(c.code != '', 0, if(bitTest(c.known, 0), c.calls, 1)) AS calls,
        if(c.code != '', 0, c.input_tokens) AS input_tokens, if(c.code != '', 0, c.output_tokens) AS output_tokens, if(c.code != '', 0, c.cached_input_tokens) AS cached_input_tokens, if(c.code != '', 0, c.reasoning_tokens) AS reasoning_tokens, if(c.code != '', 0, c.cost) AS cost, if(c.code != '', 0, c.bytes) AS bytes,
        toInt64(0) AS adjusted_calls, toInt64(0) AS adjusted_input_tokens, toInt64(0) AS adjusted_output_tokens, toInt64(0) AS adjusted_cached_input_tokens, toInt64(0) AS adjusted_reasoning_tokens, toInt64(0) AS adjusted_cost, toInt64(0) AS adjusted_bytes
    FROM calls AS c
    UNION ALL
    SELECT
        toStartOfMinute(toDateTime(x.time, 'UTC')) AS minute, x.account AS account, CAST(x.model AS LowCardinality(String)) AS model, CAST('' AS LowCardinality(String)) AS code,
        toUInt64(0) AS attempts, toUInt64(0) AS refused, toUInt64(0) AS duration_micros,
        toInt64(0) AS calls, toInt64(0) AS input_tokens, toInt64(0) AS output_tokens, toInt64(0) AS cached_input_tokens, toInt64(0) AS reasoning_tokens, toInt64(0) AS cost, toInt64(0) AS bytes,
        x.calls AS adjusted_calls, x.input_tokens AS adjusted_input_tokens, x.output_tokens AS adjusted_output_tokens, x.cached_input_tokens AS adjusted_cached_input_tokens, x.reasoning_tokens AS adjusted_reasoning_tokens, x.cost AS adjusted_cost, x.bytes AS adjusted_bytes
    FROM v_corrections AS x
) AS u
GROUP BY minute, account, model, code;

CREATE OR REPLACE VIEW v_traffic_minute AS
SELECT
    minute, model, code,
    sum(u.attempts) AS attempts, sum(u.refused) AS refused, sum(u.attempts) - sum(u.refused) AS admitted,
    sum(u.duration_micros) AS duration_micros,
    sum(u.calls) AS calls, sum(u.input_tokens) AS input_tokens, sum(u.output_tokens) AS output_tokens, sum(u.cached_input_tokens) AS cached_input_tokens, sum(u.reasoning_tokens) AS reasoning_tokens, sum(u.cost) AS cost, sum(u.bytes) AS bytes,
    sum(u.adjusted_calls) AS adjusted_calls, sum(u.adjusted_input_tokens) AS adjusted_input_tokens, sum(u.adjusted_output_tokens) AS adjusted_output_tokens, sum(u.adjusted_cached_input_tokens) AS adjusted_cached_input_tokens, sum(u.adjusted_reasoning_tokens) AS adjusted_reasoning_tokens, sum(u.adjusted_cost) AS adjusted_cost, sum(u.adjusted_bytes) AS adjusted_bytes
FROM
(
    SELECT
        r.minute AS minute, r.model AS model, r.code AS code,
        r.attempts AS attempts, r.refused AS refused, r.duration_micros AS duration_micros,
        r.calls AS calls, r.input_tokens AS input_tokens, r.output_tokens AS output_tokens, r.cached_input_tokens AS cached_input_tokens, r.reasoning_tokens AS reasoning_tokens, r.cost AS cost, r.bytes AS bytes,
        toInt64(0) AS adjusted_calls, toInt64(0) AS adjusted_input_tokens, toInt64(0) AS adjusted_output_tokens, toInt64(0) AS adjusted_cached_input_tokens, toInt64(0) AS adjusted_reasoning_tokens, toInt64(0) AS adjusted_cost, toInt64(0) AS adjusted_bytes
    FROM traffic_minute AS r
    UNION ALL
    SELECT
        toStartOfMinute(toDateTime(x.time, 'UTC')) AS minute, CAST(x.model AS LowCardinality(String)) AS model, CAST('' AS LowCardinality(String)) AS code,
        toUInt64(0) AS attempts, toUInt64(0) AS refused, toUInt64(0) AS duration_micros,
        toInt64(0) AS calls, toInt64(0) AS input_tokens, toInt64(0) AS output_tokens, toInt64(0) AS cached_input_tokens, toInt64(0) AS reasoning_tokens, toInt64(0) AS cost, toInt64(0) AS bytes,
        x.calls AS adjusted_calls, x.input_tokens AS adjusted_input_tokens, x.output_tokens AS adjusted_output_tokens, x.cached_input_tokens AS adjusted_cached_input_tokens, x.reasoning_tokens AS adjusted_reasoning_tokens, x.cost AS adjusted_cost, x.bytes AS adjusted_bytes
    FROM v_corrections AS x
) AS u
GROUP BY minute, model, code;
