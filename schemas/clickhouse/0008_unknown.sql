-- Unknown stays unknown in the sums: of how many admitted calls a quantity was reported is
-- kept beside its sum, and where none reported it the views say NULL, and how many did not.
-- Rows from before these columns say that all reported, as their views did. Sums that a
-- block adds itself are exact.
ALTER TABLE usage_hourly
    ADD COLUMN IF NOT EXISTS known_input_tokens SimpleAggregateFunction(sum, UInt64) DEFAULT attempts - refused COMMENT 'admitted calls that reported input_tokens' CODEC(T64, ZSTD(1)),
    ADD COLUMN IF NOT EXISTS known_output_tokens SimpleAggregateFunction(sum, UInt64) DEFAULT attempts - refused COMMENT 'admitted calls that reported output_tokens' CODEC(T64, ZSTD(1)),
    ADD COLUMN IF NOT EXISTS known_cached_input_tokens SimpleAggregateFunction(sum, UInt64) DEFAULT attempts - refused COMMENT 'admitted calls that reported cached_input_tokens' CODEC(T64, ZSTD(1)),
    ADD COLUMN IF NOT EXISTS known_reasoning_tokens SimpleAggregateFunction(sum, UInt64) DEFAULT attempts - refused COMMENT 'admitted calls that reported reasoning_tokens' CODEC(T64, ZSTD(1)),
    ADD COLUMN IF NOT EXISTS known_cost SimpleAggregateFunction(sum, UInt64) DEFAULT attempts - refused COMMENT 'admitted calls that reported cost' CODEC(T64, ZSTD(1)),
    ADD COLUMN IF NOT EXISTS known_bytes SimpleAggregateFunction(sum, UInt64) DEFAULT attempts - refused COMMENT 'admitted calls that reported bytes' CODEC(T64, ZSTD(1));

ALTER TABLE traffic_minute
    ADD COLUMN IF NOT EXISTS known_input_tokens SimpleAggregateFunction(sum, UInt64) DEFAULT attempts - refused COMMENT 'admitted calls that reported input_tokens' CODEC(T64, ZSTD(1)),
    ADD COLUMN IF NOT EXISTS known_output_tokens SimpleAggregateFunction(sum, UInt64) DEFAULT attempts - refused COMMENT 'admitted calls that reported output_tokens' CODEC(T64, ZSTD(1)),
    ADD COLUMN IF NOT EXISTS known_cached_input_tokens SimpleAggregateFunction(sum, UInt64) DEFAULT attempts - refused COMMENT 'admitted calls that reported cached_input_tokens' CODEC(T64, ZSTD(1)),
    ADD COLUMN IF NOT EXISTS known_reasoning_tokens SimpleAggregateFunction(sum, UInt64) DEFAULT attempts - refused COMMENT 'admitted calls that reported reasoning_tokens' CODEC(T64, ZSTD(1)),
    ADD COLUMN IF NOT EXISTS known_cost SimpleAggregateFunction(sum, UInt64) DEFAULT attempts - refused COMMENT 'admitted calls that reported cost' CODEC(T64, ZSTD(1)),
    ADD COLUMN IF NOT EXISTS known_bytes SimpleAggregateFunction(sum, UInt64) DEFAULT attempts - refused COMMENT 'admitted calls that reported bytes' CODEC(T64, ZSTD(1));

CREATE OR REPLACE VIEW v_usage_hourly AS
SELECT
    hour, account, model, code,
    sum(u.attempts) AS attempts, sum(u.refused) AS refused, sum(u.attempts) - sum(u.refused) AS admitted,
    sum(u.duration_micros) AS duration_micros,
    sum(u.calls) AS calls,
    if(sum(u.known_input_tokens) = 0, NULL, sum(u.input_tokens)) AS input_tokens,
    if(sum(u.known_output_tokens) = 0, NULL, sum(u.output_tokens)) AS output_tokens,
    if(sum(u.known_cached_input_tokens) = 0, NULL, sum(u.cached_input_tokens)) AS cached_input_tokens,
    if(sum(u.known_reasoning_tokens) = 0, NULL, sum(u.reasoning_tokens)) AS reasoning_tokens,
    if(sum(u.known_cost) = 0, NULL, sum(u.cost)) AS cost,
    if(sum(u.known_bytes) = 0, NULL, sum(u.bytes)) AS bytes,
    sum(u.adjusted_calls) AS adjusted_calls,
    sum(u.adjusted_input_tokens) AS adjusted_input_tokens,
    sum(u.adjusted_output_tokens) AS adjusted_output_tokens,
    sum(u.adjusted_cached_input_tokens) AS adjusted_cached_input_tokens,
    sum(u.adjusted_reasoning_tokens) AS adjusted_reasoning_tokens,
    sum(u.adjusted_cost) AS adjusted_cost,
    sum(u.adjusted_bytes) AS adjusted_bytes,
    sum(u.attempts) - sum(u.refused) - sum(u.known_input_tokens) AS unknown_input_tokens,
    sum(u.attempts) - sum(u.refused) - sum(u.known_output_tokens) AS unknown_output_tokens,
    sum(u.attempts) - sum(u.refused) - sum(u.known_cached_input_tokens) AS unknown_cached_input_tokens,
    sum(u.attempts) - sum(u.refused) - sum(u.known_reasoning_tokens) AS unknown_reasoning_tokens,
    sum(u.attempts) - sum(u.refused) - sum(u.known_cost) AS unknown_cost,
    sum(u.attempts) - sum(u.refused) - sum(u.known_bytes) AS unknown_bytes
FROM
(
    SELECT
        r.hour AS hour, r.account AS account, r.model AS model, r.code AS code,
        r.attempts AS attempts, r.refused AS refused, r.duration_micros AS duration_micros,
        r.calls AS calls, r.input_tokens AS input_tokens, r.output_tokens AS output_tokens, r.cached_input_tokens AS cached_input_tokens, r.reasoning_tokens AS reasoning_tokens, r.cost AS cost, r.bytes AS bytes,
        r.known_input_tokens AS known_input_tokens, r.known_output_tokens AS known_output_tokens, r.known_cached_input_tokens AS known_cached_input_tokens, r.known_reasoning_tokens AS known_reasoning_tokens, r.known_cost AS known_cost, r.known_bytes AS known_bytes,
        toInt64(0) AS adjusted_calls, toInt64(0) AS adjusted_input_tokens, toInt64(0) AS adjusted_output_tokens, toInt64(0) AS adjusted_cached_input_tokens, toInt64(0) AS adjusted_reasoning_tokens, toInt64(0) AS adjusted_cost, toInt64(0) AS adjusted_bytes
    FROM usage_hourly AS r
    UNION ALL
    SELECT
        toStartOfHour(toDateTime(x.time, 'UTC')) AS hour, x.account AS account, CAST(x.model AS LowCardinality(String)) AS model, CAST('' AS LowCardinality(String)) AS code,
        toUInt64(0) AS attempts, toUInt64(0) AS refused, toUInt64(0) AS duration_micros,
        toInt64(0) AS calls, toInt64(0) AS input_tokens, toInt64(0) AS output_tokens, toInt64(0) AS cached_input_tokens, toInt64(0) AS reasoning_tokens, toInt64(0) AS cost, toInt64(0) AS bytes,
        toUInt64(0) AS known_input_tokens, toUInt64(0) AS known_output_tokens, toUInt64(0) AS known_cached_input_tokens, toUInt64(0) AS known_reasoning_tokens, toUInt64(0) AS known_cost, toUInt64(0) AS known_bytes,
        x.calls AS adjusted_calls, x.input_tokens AS adjusted_input_tokens, x.output_tokens AS adjusted_output_tokens, x.cached_input_tokens AS adjusted_cached_input_tokens, x.reasoning_tokens AS adjusted_reasoning_tokens, x.cost AS adjusted_cost, x.bytes AS adjusted_bytes
    FROM v_corrections AS x
) AS u
GROUP BY hour, account, model, code;

CREATE OR REPLACE VIEW v_usage_minute AS
SELECT
    minute, account, model, code,
    sum(u.attempts) AS attempts, sum(u.refused) AS refused, sum(u.attempts) - sum(u.refused) AS admitted,
    sum(u.duration_micros) AS duration_micros,
    sum(u.calls) AS calls,
    if(sum(u.known_input_tokens) = 0, NULL, sum(u.input_tokens)) AS input_tokens,
    if(sum(u.known_output_tokens) = 0, NULL, sum(u.output_tokens)) AS output_tokens,
    if(sum(u.known_cached_input_tokens) = 0, NULL, sum(u.cached_input_tokens)) AS cached_input_tokens,
    if(sum(u.known_reasoning_tokens) = 0, NULL, sum(u.reasoning_tokens)) AS reasoning_tokens,
    if(sum(u.known_cost) = 0, NULL, sum(u.cost)) AS cost,
    if(sum(u.known_bytes) = 0, NULL, sum(u.bytes)) AS bytes,
    sum(u.adjusted_calls) AS adjusted_calls,
    sum(u.adjusted_input_tokens) AS adjusted_input_tokens,
    sum(u.adjusted_output_tokens) AS adjusted_output_tokens,
    sum(u.adjusted_cached_input_tokens) AS adjusted_cached_input_tokens,
    sum(u.adjusted_reasoning_tokens) AS adjusted_reasoning_tokens,
    sum(u.adjusted_cost) AS adjusted_cost,
    sum(u.adjusted_bytes) AS adjusted_bytes,
    sum(u.attempts) - sum(u.refused) - sum(u.known_input_tokens) AS unknown_input_tokens,
    sum(u.attempts) - sum(u.refused) - sum(u.known_output_tokens) AS unknown_output_tokens,
    sum(u.attempts) - sum(u.refused) - sum(u.known_cached_input_tokens) AS unknown_cached_input_tokens,
    sum(u.attempts) - sum(u.refused) - sum(u.known_reasoning_tokens) AS unknown_reasoning_tokens,
    sum(u.attempts) - sum(u.refused) - sum(u.known_cost) AS unknown_cost,
    sum(u.attempts) - sum(u.refused) - sum(u.known_bytes) AS unknown_bytes
FROM
(
    SELECT
        toStartOfMinute(c.time) AS minute, c.account AS account, c.model AS model, c.code AS code,
        toUInt64(1) AS attempts, toUInt64(c.code != '') AS refused, c.duration_micros AS duration_micros,
        if(c.code != '', 0, if(bitTest(c.known, 0), c.calls, 1)) AS calls,
        if(c.code != '', 0, c.input_tokens) AS input_tokens, if(c.code != '', 0, c.output_tokens) AS output_tokens, if(c.code != '', 0, c.cached_input_tokens) AS cached_input_tokens, if(c.code != '', 0, c.reasoning_tokens) AS reasoning_tokens, if(c.code != '', 0, c.cost) AS cost, if(c.code != '', 0, c.bytes) AS bytes,
        toUInt64(c.code = '' AND bitTest(c.known, 1)) AS known_input_tokens, toUInt64(c.code = '' AND bitTest(c.known, 2)) AS known_output_tokens, toUInt64(c.code = '' AND bitTest(c.known, 3)) AS known_cached_input_tokens, toUInt64(c.code = '' AND bitTest(c.known, 4)) AS known_reasoning_tokens, toUInt64(c.code = '' AND bitTest(c.known, 5)) AS known_cost, toUInt64(c.code = '' AND bitTest(c.known, 6)) AS known_bytes,
        toInt64(0) AS adjusted_calls, toInt64(0) AS adjusted_input_tokens, toInt64(0) AS adjusted_output_tokens, toInt64(0) AS adjusted_cached_input_tokens, toInt64(0) AS adjusted_reasoning_tokens, toInt64(0) AS adjusted_cost, toInt64(0) AS adjusted_bytes
    FROM calls AS c
    UNION ALL
    SELECT
        toStartOfMinute(toDateTime(x.time, 'UTC')) AS minute, x.account AS account, CAST(x.model AS LowCardinality(String)) AS model, CAST('' AS LowCardinality(String)) AS code,
        toUInt64(0) AS attempts, toUInt64(0) AS refused, toUInt64(0) AS duration_micros,
        toInt64(0) AS calls, toInt64(0) AS input_tokens, toInt64(0) AS output_tokens, toInt64(0) AS cached_input_tokens, toInt64(0) AS reasoning_tokens, toInt64(0) AS cost, toInt64(0) AS bytes,
        toUInt64(0) AS known_input_tokens, toUInt64(0) AS known_output_tokens, toUInt64(0) AS known_cached_input_tokens, toUInt64(0) AS known_reasoning_tokens, toUInt64(0) AS known_cost, toUInt64(0) AS known_bytes,
        x.calls AS adjusted_calls, x.input_tokens AS adjusted_input_tokens, x.output_tokens AS adjusted_output_tokens, x.cached_input_tokens AS adjusted_cached_input_tokens, x.reasoning_tokens AS adjusted_reasoning_tokens, x.cost AS adjusted_cost, x.bytes AS adjusted_bytes
    FROM v_corrections AS x
) AS u
GROUP BY minute, account, model, code;

CREATE OR REPLACE VIEW v_traffic_minute AS
SELECT
    minute, model, code,
    sum(u.attempts) AS attempts, sum(u.refused) AS refused, sum(u.attempts) - sum(u.refused) AS admitted,
    sum(u.duration_micros) AS duration_micros,
    sum(u.calls) AS calls,
    if(sum(u.known_input_tokens) = 0, NULL, sum(u.input_tokens)) AS input_tokens,
    if(sum(u.known_output_tokens) = 0, NULL, sum(u.output_tokens)) AS output_tokens,
    if(sum(u.known_cached_input_tokens) = 0, NULL, sum(u.cached_input_tokens)) AS cached_input_tokens,
    if(sum(u.known_reasoning_tokens) = 0, NULL, sum(u.reasoning_tokens)) AS reasoning_tokens,
    if(sum(u.known_cost) = 0, NULL, sum(u.cost)) AS cost,
    if(sum(u.known_bytes) = 0, NULL, sum(u.bytes)) AS bytes,
    sum(u.adjusted_calls) AS adjusted_calls,
    sum(u.adjusted_input_tokens) AS adjusted_input_tokens,
    sum(u.adjusted_output_tokens) AS adjusted_output_tokens,
    sum(u.adjusted_cached_input_tokens) AS adjusted_cached_input_tokens,
    sum(u.adjusted_reasoning_tokens) AS adjusted_reasoning_tokens,
    sum(u.adjusted_cost) AS adjusted_cost,
    sum(u.adjusted_bytes) AS adjusted_bytes,
    sum(u.attempts) - sum(u.refused) - sum(u.known_input_tokens) AS unknown_input_tokens,
    sum(u.attempts) - sum(u.refused) - sum(u.known_output_tokens) AS unknown_output_tokens,
    sum(u.attempts) - sum(u.refused) - sum(u.known_cached_input_tokens) AS unknown_cached_input_tokens,
    sum(u.attempts) - sum(u.refused) - sum(u.known_reasoning_tokens) AS unknown_reasoning_tokens,
    sum(u.attempts) - sum(u.refused) - sum(u.known_cost) AS unknown_cost,
    sum(u.attempts) - sum(u.refused) - sum(u.known_bytes) AS unknown_bytes
FROM
(
    SELECT
        r.minute AS minute, r.model AS model, r.code AS code,
        r.attempts AS attempts, r.refused AS refused, r.duration_micros AS duration_micros,
        r.calls AS calls, r.input_tokens AS input_tokens, r.output_tokens AS output_tokens, r.cached_input_tokens AS cached_input_tokens, r.reasoning_tokens AS reasoning_tokens, r.cost AS cost, r.bytes AS bytes,
        r.known_input_tokens AS known_input_tokens, r.known_output_tokens AS known_output_tokens, r.known_cached_input_tokens AS known_cached_input_tokens, r.known_reasoning_tokens AS known_reasoning_tokens, r.known_cost AS known_cost, r.known_bytes AS known_bytes,
        toInt64(0) AS adjusted_calls, toInt64(0) AS adjusted_input_tokens, toInt64(0) AS adjusted_output_tokens, toInt64(0) AS adjusted_cached_input_tokens, toInt64(0) AS adjusted_reasoning_tokens, toInt64(0) AS adjusted_cost, toInt64(0) AS adjusted_bytes
    FROM traffic_minute AS r
    UNION ALL
    SELECT
        toStartOfMinute(toDateTime(x.time, 'UTC')) AS minute, CAST(x.model AS LowCardinality(String)) AS model, CAST('' AS LowCardinality(String)) AS code,
        toUInt64(0) AS attempts, toUInt64(0) AS refused, toUInt64(0) AS duration_micros,
        toInt64(0) AS calls, toInt64(0) AS input_tokens, toInt64(0) AS output_tokens, toInt64(0) AS cached_input_tokens, toInt64(0) AS reasoning_tokens, toInt64(0) AS cost, toInt64(0) AS bytes,
        toUInt64(0) AS known_input_tokens, toUInt64(0) AS known_output_tokens, toUInt64(0) AS known_cached_input_tokens, toUInt64(0) AS known_reasoning_tokens, toUInt64(0) AS known_cost, toUInt64(0) AS known_bytes,
        x.calls AS adjusted_calls, x.input_tokens AS adjusted_input_tokens, x.output_tokens AS adjusted_output_tokens, x.cached_input_tokens AS adjusted_cached_input_tokens, x.reasoning_tokens AS adjusted_reasoning_tokens, x.cost AS adjusted_cost, x.bytes AS adjusted_bytes
    FROM v_corrections AS x
) AS u
GROUP BY minute, model, code;

CREATE OR REPLACE VIEW v_conservation AS
SELECT
    account, code,
    count() AS attempts, countIf(c.code != '') AS refused, countIf(c.code = '') AS admitted,
    sumIf(if(bitTest(c.known, 0), c.calls, 1), c.code = '') AS calls,
    sumOrNullIf(c.input_tokens, c.code = '' AND bitTest(c.known, 1)) AS input_tokens,
    sumOrNullIf(c.output_tokens, c.code = '' AND bitTest(c.known, 2)) AS output_tokens,
    sumOrNullIf(c.cached_input_tokens, c.code = '' AND bitTest(c.known, 3)) AS cached_input_tokens,
    sumOrNullIf(c.reasoning_tokens, c.code = '' AND bitTest(c.known, 4)) AS reasoning_tokens,
    sumOrNullIf(c.cost, c.code = '' AND bitTest(c.known, 5)) AS cost,
    sumOrNullIf(c.bytes, c.code = '' AND bitTest(c.known, 6)) AS bytes,
    sumMapIf(c.custom, c.code = '') AS custom,
    min(c.time) AS first_time, max(c.time) AS last_time,
    countIf(c.code = '' AND NOT bitTest(c.known, 1)) AS unknown_input_tokens,
    countIf(c.code = '' AND NOT bitTest(c.known, 2)) AS unknown_output_tokens,
    countIf(c.code = '' AND NOT bitTest(c.known, 3)) AS unknown_cached_input_tokens,
    countIf(c.code = '' AND NOT bitTest(c.known, 4)) AS unknown_reasoning_tokens,
    countIf(c.code = '' AND NOT bitTest(c.known, 5)) AS unknown_cost,
    countIf(c.code = '' AND NOT bitTest(c.known, 6)) AS unknown_bytes
FROM calls AS c
GROUP BY account, code;

-- A comment on every column. CREATE OR REPLACE VIEW drops those of its view: whoever replaces
-- one repeats them.
ALTER TABLE calls
    COMMENT COLUMN IF EXISTS `account` 'who pays: the leaf of the path',
    COMMENT COLUMN IF EXISTS `time` 'event time by the gateway''s clock, not clamped',
    COMMENT COLUMN IF EXISTS `sequence` 'position of the frame in the ledger',
    COMMENT COLUMN IF EXISTS `row` 'index of the call in its frame',
    COMMENT COLUMN IF EXISTS `stream_time` 'the ledger''s time of the entry; never goes back',
    COMMENT COLUMN IF EXISTS `shard` 'shard of the ledger: that of the account''s root',
    COMMENT COLUMN IF EXISTS `producer` 'ksuid of who sent the frame; empty: a foreign event without a frame',
    COMMENT COLUMN IF EXISTS `frame` 'number of the frame, per producer and shard',
    COMMENT COLUMN IF EXISTS `gateway` 'name of the gateway',
    COMMENT COLUMN IF EXISTS `key_id` 'id of the API key, never the key',
    COMMENT COLUMN IF EXISTS `request_id` 'request id; empty: none',
    COMMENT COLUMN IF EXISTS `trace_id` 'W3C trace id, 16 bytes; zeros: none',
    COMMENT COLUMN IF EXISTS `span_id` 'W3C span id, 8 bytes; zeros: none',
    COMMENT COLUMN IF EXISTS `trace_flags` 'W3C trace flags',
    COMMENT COLUMN IF EXISTS `method` 'HTTP method',
    COMMENT COLUMN IF EXISTS `route` 'route of the gateway''s configuration; empty: none',
    COMMENT COLUMN IF EXISTS `model` 'model that was asked for; empty: none given',
    COMMENT COLUMN IF EXISTS `region` 'region of the gateway; empty: none',
    COMMENT COLUMN IF EXISTS `status` 'HTTP status that was answered',
    COMMENT COLUMN IF EXISTS `code` 'why it was refused; empty: admitted',
    COMMENT COLUMN IF EXISTS `decision_id` 'decision that refused it; empty: none',
    COMMENT COLUMN IF EXISTS `duration_micros` 'microseconds from the request to the end of its answer',
    COMMENT COLUMN IF EXISTS `late` '1: its minute had ended more than a minute before it entered the ledger',
    COMMENT COLUMN IF EXISTS `source` 'source of a foreign event; empty: none',
    COMMENT COLUMN IF EXISTS `event_id` 'id of a foreign event within its source; empty: none',
    COMMENT COLUMN IF EXISTS `price_version` 'version of the prices it was rated with; empty: not rated',
    COMMENT COLUMN IF EXISTS `currency` 'ISO 4217 code of the cost; empty: none',
    COMMENT COLUMN IF EXISTS `known` 'bit i: meter i was reported (calls, input_tokens, output_tokens, cached_input_tokens, reasoning_tokens, cost, bytes)',
    COMMENT COLUMN IF EXISTS `custom` 'the user''s own meters that were reported',
    COMMENT COLUMN IF EXISTS `frame_minute` 'minute of the frame''s sealing; without a frame that of stream_time; 1970: from before this column',
    COMMENT COLUMN IF EXISTS `calls` 'calls; 0 where its bit in known is 0',
    COMMENT COLUMN IF EXISTS `input_tokens` 'tokens; 0 where its bit in known is 0',
    COMMENT COLUMN IF EXISTS `output_tokens` 'tokens; 0 where its bit in known is 0',
    COMMENT COLUMN IF EXISTS `cached_input_tokens` 'tokens; 0 where its bit in known is 0',
    COMMENT COLUMN IF EXISTS `reasoning_tokens` 'tokens; 0 where its bit in known is 0',
    COMMENT COLUMN IF EXISTS `cost` 'nano-units of the currency; 0 where its bit in known is 0',
    COMMENT COLUMN IF EXISTS `bytes` 'bytes; 0 where its bit in known is 0';

ALTER TABLE usage_hourly
    COMMENT COLUMN IF EXISTS `month` 'YYYYMM of the ledger''s time',
    COMMENT COLUMN IF EXISTS `hour` 'hour of counted time: the earlier of event time and ledger time',
    COMMENT COLUMN IF EXISTS `account` 'who pays: the leaf of the path',
    COMMENT COLUMN IF EXISTS `model` 'model that was asked for; empty: none given',
    COMMENT COLUMN IF EXISTS `code` 'why it was refused; empty: admitted',
    COMMENT COLUMN IF EXISTS `attempts` 'calls, admitted and refused',
    COMMENT COLUMN IF EXISTS `refused` 'calls that were refused',
    COMMENT COLUMN IF EXISTS `duration_micros` 'sum of microseconds of all calls',
    COMMENT COLUMN IF EXISTS `custom` 'the user''s own meters that were reported',
    COMMENT COLUMN IF EXISTS `last_sequence` 'newest ledger position in the sums',
    COMMENT COLUMN IF EXISTS `calls` 'sum over admitted calls, calls; unreported is left out',
    COMMENT COLUMN IF EXISTS `input_tokens` 'sum over admitted calls, tokens; unreported is left out',
    COMMENT COLUMN IF EXISTS `output_tokens` 'sum over admitted calls, tokens; unreported is left out',
    COMMENT COLUMN IF EXISTS `cached_input_tokens` 'sum over admitted calls, tokens; unreported is left out',
    COMMENT COLUMN IF EXISTS `reasoning_tokens` 'sum over admitted calls, tokens; unreported is left out',
    COMMENT COLUMN IF EXISTS `cost` 'sum over admitted calls, nano-units of the currency; unreported is left out',
    COMMENT COLUMN IF EXISTS `bytes` 'sum over admitted calls, bytes; unreported is left out',
    COMMENT COLUMN IF EXISTS `known_input_tokens` 'admitted calls that reported input_tokens',
    COMMENT COLUMN IF EXISTS `known_output_tokens` 'admitted calls that reported output_tokens',
    COMMENT COLUMN IF EXISTS `known_cached_input_tokens` 'admitted calls that reported cached_input_tokens',
    COMMENT COLUMN IF EXISTS `known_reasoning_tokens` 'admitted calls that reported reasoning_tokens',
    COMMENT COLUMN IF EXISTS `known_cost` 'admitted calls that reported cost',
    COMMENT COLUMN IF EXISTS `known_bytes` 'admitted calls that reported bytes';

ALTER TABLE traffic_minute
    COMMENT COLUMN IF EXISTS `month` 'YYYYMM of the ledger''s time',
    COMMENT COLUMN IF EXISTS `minute` 'minute of counted time: the earlier of event time and ledger time',
    COMMENT COLUMN IF EXISTS `model` 'model that was asked for; empty: none given',
    COMMENT COLUMN IF EXISTS `code` 'why it was refused; empty: admitted',
    COMMENT COLUMN IF EXISTS `attempts` 'calls, admitted and refused',
    COMMENT COLUMN IF EXISTS `refused` 'calls that were refused',
    COMMENT COLUMN IF EXISTS `duration_micros` 'sum of microseconds of all calls',
    COMMENT COLUMN IF EXISTS `custom` 'the user''s own meters that were reported',
    COMMENT COLUMN IF EXISTS `last_sequence` 'newest ledger position in the sums',
    COMMENT COLUMN IF EXISTS `calls` 'sum over admitted calls, calls; unreported is left out',
    COMMENT COLUMN IF EXISTS `input_tokens` 'sum over admitted calls, tokens; unreported is left out',
    COMMENT COLUMN IF EXISTS `output_tokens` 'sum over admitted calls, tokens; unreported is left out',
    COMMENT COLUMN IF EXISTS `cached_input_tokens` 'sum over admitted calls, tokens; unreported is left out',
    COMMENT COLUMN IF EXISTS `reasoning_tokens` 'sum over admitted calls, tokens; unreported is left out',
    COMMENT COLUMN IF EXISTS `cost` 'sum over admitted calls, nano-units of the currency; unreported is left out',
    COMMENT COLUMN IF EXISTS `bytes` 'sum over admitted calls, bytes; unreported is left out',
    COMMENT COLUMN IF EXISTS `known_input_tokens` 'admitted calls that reported input_tokens',
    COMMENT COLUMN IF EXISTS `known_output_tokens` 'admitted calls that reported output_tokens',
    COMMENT COLUMN IF EXISTS `known_cached_input_tokens` 'admitted calls that reported cached_input_tokens',
    COMMENT COLUMN IF EXISTS `known_reasoning_tokens` 'admitted calls that reported reasoning_tokens',
    COMMENT COLUMN IF EXISTS `known_cost` 'admitted calls that reported cost',
    COMMENT COLUMN IF EXISTS `known_bytes` 'admitted calls that reported bytes';

ALTER TABLE decisions
    COMMENT COLUMN IF EXISTS `sequence` 'position in the stream of decisions',
    COMMENT COLUMN IF EXISTS `stream_time` 'when it was published',
    COMMENT COLUMN IF EXISTS `id` 'identity of the decision, a ksuid',
    COMMENT COLUMN IF EXISTS `account` 'whose limit it is',
    COMMENT COLUMN IF EXISTS `limit_id` 'plan and limit: PLAN/LIMIT',
    COMMENT COLUMN IF EXISTS `meter` 'what is counted',
    COMMENT COLUMN IF EXISTS `verdict` 'allow, warn, deny',
    COMMENT COLUMN IF EXISTS `code` 'of the refusal; empty unless denied',
    COMMENT COLUMN IF EXISTS `revision` 'the ledger position that led to it',
    COMMENT COLUMN IF EXISTS `shard` 'shard of the ledger: that of the account''s root',
    COMMENT COLUMN IF EXISTS `epoch` 'of the owner that published it',
    COMMENT COLUMN IF EXISTS `used` 'units that were used when it was decided',
    COMMENT COLUMN IF EXISTS `amount` 'units that the window allows',
    COMMENT COLUMN IF EXISTS `window` 'minute, hour, day, week, month, lifetime',
    COMMENT COLUMN IF EXISTS `period_start` 'begin of the window; 1970: lifetime',
    COMMENT COLUMN IF EXISTS `period_end` 'end of the window; 1970: lifetime',
    COMMENT COLUMN IF EXISTS `plan_version` 'version of the plans it was decided by',
    COMMENT COLUMN IF EXISTS `decided_at` 'the ledger''s time of the entry that led to it',
    COMMENT COLUMN IF EXISTS `cause` 'event time of the crossing call; 1970: none';

ALTER TABLE v_decisions
    COMMENT COLUMN IF EXISTS `sequence` 'position in the stream of decisions',
    COMMENT COLUMN IF EXISTS `stream_time` 'when it was published',
    COMMENT COLUMN IF EXISTS `id` 'identity of the decision, a ksuid',
    COMMENT COLUMN IF EXISTS `account` 'whose limit it is',
    COMMENT COLUMN IF EXISTS `limit_id` 'plan and limit: PLAN/LIMIT',
    COMMENT COLUMN IF EXISTS `meter` 'what is counted',
    COMMENT COLUMN IF EXISTS `verdict` 'allow, warn, deny',
    COMMENT COLUMN IF EXISTS `code` 'of the refusal; empty unless denied',
    COMMENT COLUMN IF EXISTS `revision` 'the ledger position that led to it',
    COMMENT COLUMN IF EXISTS `shard` 'shard of the ledger: that of the account''s root',
    COMMENT COLUMN IF EXISTS `epoch` 'of the owner that published it',
    COMMENT COLUMN IF EXISTS `used` 'units that were used when it was decided',
    COMMENT COLUMN IF EXISTS `amount` 'units that the window allows',
    COMMENT COLUMN IF EXISTS `window` 'minute, hour, day, week, month, lifetime',
    COMMENT COLUMN IF EXISTS `period_start` 'begin of the window; 1970: lifetime',
    COMMENT COLUMN IF EXISTS `period_end` 'end of the window; 1970: lifetime',
    COMMENT COLUMN IF EXISTS `plan_version` 'version of the plans it was decided by',
    COMMENT COLUMN IF EXISTS `decided_at` 'the ledger''s time of the entry that led to it',
    COMMENT COLUMN IF EXISTS `cause` 'event time of the crossing call; 1970: none',
    COMMENT COLUMN IF EXISTS `latency_micros` 'microseconds from the crossing call to the publishing; NULL: no call led to it';

ALTER TABLE control
    COMMENT COLUMN IF EXISTS `sequence` 'position in the ledger',
    COMMENT COLUMN IF EXISTS `stream_time` 'the ledger''s time of the entry; never goes back',
    COMMENT COLUMN IF EXISTS `shard` 'shard of the ledger: that of the account''s root',
    COMMENT COLUMN IF EXISTS `id` 'identity of the act',
    COMMENT COLUMN IF EXISTS `author` 'who did it',
    COMMENT COLUMN IF EXISTS `created_at` 'when it was made, by the author''s clock',
    COMMENT COLUMN IF EXISTS `kind` 'plan_set, account_set, producer_closed and others; ticks are left out',
    COMMENT COLUMN IF EXISTS `body` 'the entry, JSON';

ALTER TABLE v_control
    COMMENT COLUMN IF EXISTS `sequence` 'position in the ledger',
    COMMENT COLUMN IF EXISTS `stream_time` 'the ledger''s time of the entry; never goes back',
    COMMENT COLUMN IF EXISTS `shard` 'shard of the ledger: that of the account''s root',
    COMMENT COLUMN IF EXISTS `id` 'identity of the act',
    COMMENT COLUMN IF EXISTS `author` 'who did it',
    COMMENT COLUMN IF EXISTS `created_at` 'when it was made, by the author''s clock',
    COMMENT COLUMN IF EXISTS `kind` 'plan_set, account_set, producer_closed and others; ticks are left out',
    COMMENT COLUMN IF EXISTS `body` 'the entry, JSON';

ALTER TABLE alerts
    COMMENT COLUMN IF EXISTS `sequence` 'position in the stream of alerts',
    COMMENT COLUMN IF EXISTS `stream_time` 'when it entered the stream',
    COMMENT COLUMN IF EXISTS `episode_id` 'identity of the episode',
    COMMENT COLUMN IF EXISTS `transition` 'firing, resolved',
    COMMENT COLUMN IF EXISTS `n` 'number of the transition within its episode',
    COMMENT COLUMN IF EXISTS `rule` 'name of the rule',
    COMMENT COLUMN IF EXISTS `scope` 'what the rule looked at',
    COMMENT COLUMN IF EXISTS `severity` 'of the rule; empty: none',
    COMMENT COLUMN IF EXISTS `started_at` 'the first breach',
    COMMENT COLUMN IF EXISTS `at` 'when the transition was decided',
    COMMENT COLUMN IF EXISTS `value` 'of the rule''s measure',
    COMMENT COLUMN IF EXISTS `threshold` 'that was breached',
    COMMENT COLUMN IF EXISTS `refused_accounts` 'accounts that began to be refused',
    COMMENT COLUMN IF EXISTS `active_accounts` 'accounts with calls',
    COMMENT COLUMN IF EXISTS `reason` 'of a resolve; empty: it fires',
    COMMENT COLUMN IF EXISTS `summary` 'for people',
    COMMENT COLUMN IF EXISTS `body` 'the whole transition, JSON';

ALTER TABLE v_alerts
    COMMENT COLUMN IF EXISTS `sequence` 'position in the stream of alerts',
    COMMENT COLUMN IF EXISTS `stream_time` 'when it entered the stream',
    COMMENT COLUMN IF EXISTS `episode_id` 'identity of the episode',
    COMMENT COLUMN IF EXISTS `transition` 'firing, resolved',
    COMMENT COLUMN IF EXISTS `n` 'number of the transition within its episode',
    COMMENT COLUMN IF EXISTS `rule` 'name of the rule',
    COMMENT COLUMN IF EXISTS `scope` 'what the rule looked at',
    COMMENT COLUMN IF EXISTS `severity` 'of the rule; empty: none',
    COMMENT COLUMN IF EXISTS `started_at` 'the first breach',
    COMMENT COLUMN IF EXISTS `at` 'when the transition was decided',
    COMMENT COLUMN IF EXISTS `value` 'of the rule''s measure',
    COMMENT COLUMN IF EXISTS `threshold` 'that was breached',
    COMMENT COLUMN IF EXISTS `refused_accounts` 'accounts that began to be refused',
    COMMENT COLUMN IF EXISTS `active_accounts` 'accounts with calls',
    COMMENT COLUMN IF EXISTS `reason` 'of a resolve; empty: it fires',
    COMMENT COLUMN IF EXISTS `summary` 'for people',
    COMMENT COLUMN IF EXISTS `body` 'the whole transition, JSON';

ALTER TABLE corrections
    COMMENT COLUMN IF EXISTS `sequence` 'position in the ledger',
    COMMENT COLUMN IF EXISTS `stream_time` 'the ledger''s time of the entry; never goes back',
    COMMENT COLUMN IF EXISTS `shard` 'shard of the ledger: that of the account''s root',
    COMMENT COLUMN IF EXISTS `id` 'identity of the act',
    COMMENT COLUMN IF EXISTS `author` 'who did it',
    COMMENT COLUMN IF EXISTS `created_at` 'when it was made, by the author''s clock',
    COMMENT COLUMN IF EXISTS `account` 'whose usage was corrected',
    COMMENT COLUMN IF EXISTS `time` 'of the corrected usage; not after stream_time',
    COMMENT COLUMN IF EXISTS `model` 'of the corrected usage; empty: none',
    COMMENT COLUMN IF EXISTS `route` 'of the corrected usage; empty: none',
    COMMENT COLUMN IF EXISTS `method` 'of the corrected usage; empty: none',
    COMMENT COLUMN IF EXISTS `custom` 'added to the user''s own meters, signed',
    COMMENT COLUMN IF EXISTS `reason` 'why, for people',
    COMMENT COLUMN IF EXISTS `reference` 'what was corrected, where that is known',
    COMMENT COLUMN IF EXISTS `calls` 'added, signed, calls; 0: not corrected',
    COMMENT COLUMN IF EXISTS `input_tokens` 'added, signed, tokens; 0: not corrected',
    COMMENT COLUMN IF EXISTS `output_tokens` 'added, signed, tokens; 0: not corrected',
    COMMENT COLUMN IF EXISTS `cached_input_tokens` 'added, signed, tokens; 0: not corrected',
    COMMENT COLUMN IF EXISTS `reasoning_tokens` 'added, signed, tokens; 0: not corrected',
    COMMENT COLUMN IF EXISTS `cost` 'added, signed, nano-units of the currency; 0: not corrected',
    COMMENT COLUMN IF EXISTS `bytes` 'added, signed, bytes; 0: not corrected';

ALTER TABLE v_corrections
    COMMENT COLUMN IF EXISTS `sequence` 'position in the ledger',
    COMMENT COLUMN IF EXISTS `stream_time` 'the ledger''s time of the entry; never goes back',
    COMMENT COLUMN IF EXISTS `shard` 'shard of the ledger: that of the account''s root',
    COMMENT COLUMN IF EXISTS `id` 'identity of the act',
    COMMENT COLUMN IF EXISTS `author` 'who did it',
    COMMENT COLUMN IF EXISTS `created_at` 'when it was made, by the author''s clock',
    COMMENT COLUMN IF EXISTS `account` 'whose usage was corrected',
    COMMENT COLUMN IF EXISTS `time` 'of the corrected usage; not after stream_time',
    COMMENT COLUMN IF EXISTS `model` 'of the corrected usage; empty: none',
    COMMENT COLUMN IF EXISTS `route` 'of the corrected usage; empty: none',
    COMMENT COLUMN IF EXISTS `method` 'of the corrected usage; empty: none',
    COMMENT COLUMN IF EXISTS `custom` 'added to the user''s own meters, signed',
    COMMENT COLUMN IF EXISTS `reason` 'why, for people',
    COMMENT COLUMN IF EXISTS `reference` 'what was corrected, where that is known',
    COMMENT COLUMN IF EXISTS `calls` 'added, signed, calls; 0: not corrected',
    COMMENT COLUMN IF EXISTS `input_tokens` 'added, signed, tokens; 0: not corrected',
    COMMENT COLUMN IF EXISTS `output_tokens` 'added, signed, tokens; 0: not corrected',
    COMMENT COLUMN IF EXISTS `cached_input_tokens` 'added, signed, tokens; 0: not corrected',
    COMMENT COLUMN IF EXISTS `reasoning_tokens` 'added, signed, tokens; 0: not corrected',
    COMMENT COLUMN IF EXISTS `cost` 'added, signed, nano-units of the currency; 0: not corrected',
    COMMENT COLUMN IF EXISTS `bytes` 'added, signed, bytes; 0: not corrected';

ALTER TABLE v_usage_hourly
    COMMENT COLUMN IF EXISTS `hour` 'hour of counted time: the earlier of event time and ledger time',
    COMMENT COLUMN IF EXISTS `account` 'who pays: the leaf of the path',
    COMMENT COLUMN IF EXISTS `model` 'model that was asked for; empty: none given',
    COMMENT COLUMN IF EXISTS `code` 'why it was refused; empty: admitted',
    COMMENT COLUMN IF EXISTS `attempts` 'calls, admitted and refused',
    COMMENT COLUMN IF EXISTS `refused` 'calls that were refused',
    COMMENT COLUMN IF EXISTS `admitted` 'calls that were admitted',
    COMMENT COLUMN IF EXISTS `duration_micros` 'sum of microseconds of all calls',
    COMMENT COLUMN IF EXISTS `calls` 'what was counted of the meter calls',
    COMMENT COLUMN IF EXISTS `input_tokens` 'sum over admitted calls that reported it, tokens; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `output_tokens` 'sum over admitted calls that reported it, tokens; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `cached_input_tokens` 'sum over admitted calls that reported it, tokens; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `reasoning_tokens` 'sum over admitted calls that reported it, tokens; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `cost` 'sum over admitted calls that reported it, nano-units of the currency; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `bytes` 'sum over admitted calls that reported it, bytes; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `adjusted_calls` 'added by corrections, signed, calls; 0: none',
    COMMENT COLUMN IF EXISTS `adjusted_input_tokens` 'added by corrections, signed, tokens; 0: none',
    COMMENT COLUMN IF EXISTS `adjusted_output_tokens` 'added by corrections, signed, tokens; 0: none',
    COMMENT COLUMN IF EXISTS `adjusted_cached_input_tokens` 'added by corrections, signed, tokens; 0: none',
    COMMENT COLUMN IF EXISTS `adjusted_reasoning_tokens` 'added by corrections, signed, tokens; 0: none',
    COMMENT COLUMN IF EXISTS `adjusted_cost` 'added by corrections, signed, nano-units of the currency; 0: none',
    COMMENT COLUMN IF EXISTS `adjusted_bytes` 'added by corrections, signed, bytes; 0: none',
    COMMENT COLUMN IF EXISTS `unknown_input_tokens` 'admitted calls that did not report input_tokens',
    COMMENT COLUMN IF EXISTS `unknown_output_tokens` 'admitted calls that did not report output_tokens',
    COMMENT COLUMN IF EXISTS `unknown_cached_input_tokens` 'admitted calls that did not report cached_input_tokens',
    COMMENT COLUMN IF EXISTS `unknown_reasoning_tokens` 'admitted calls that did not report reasoning_tokens',
    COMMENT COLUMN IF EXISTS `unknown_cost` 'admitted calls that did not report cost',
    COMMENT COLUMN IF EXISTS `unknown_bytes` 'admitted calls that did not report bytes';

ALTER TABLE v_usage_minute
    COMMENT COLUMN IF EXISTS `minute` 'minute of the event time',
    COMMENT COLUMN IF EXISTS `account` 'who pays: the leaf of the path',
    COMMENT COLUMN IF EXISTS `model` 'model that was asked for; empty: none given',
    COMMENT COLUMN IF EXISTS `code` 'why it was refused; empty: admitted',
    COMMENT COLUMN IF EXISTS `attempts` 'calls, admitted and refused',
    COMMENT COLUMN IF EXISTS `refused` 'calls that were refused',
    COMMENT COLUMN IF EXISTS `admitted` 'calls that were admitted',
    COMMENT COLUMN IF EXISTS `duration_micros` 'sum of microseconds of all calls',
    COMMENT COLUMN IF EXISTS `calls` 'what was counted of the meter calls',
    COMMENT COLUMN IF EXISTS `input_tokens` 'sum over admitted calls that reported it, tokens; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `output_tokens` 'sum over admitted calls that reported it, tokens; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `cached_input_tokens` 'sum over admitted calls that reported it, tokens; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `reasoning_tokens` 'sum over admitted calls that reported it, tokens; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `cost` 'sum over admitted calls that reported it, nano-units of the currency; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `bytes` 'sum over admitted calls that reported it, bytes; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `adjusted_calls` 'added by corrections, signed, calls; 0: none',
    COMMENT COLUMN IF EXISTS `adjusted_input_tokens` 'added by corrections, signed, tokens; 0: none',
    COMMENT COLUMN IF EXISTS `adjusted_output_tokens` 'added by corrections, signed, tokens; 0: none',
    COMMENT COLUMN IF EXISTS `adjusted_cached_input_tokens` 'added by corrections, signed, tokens; 0: none',
    COMMENT COLUMN IF EXISTS `adjusted_reasoning_tokens` 'added by corrections, signed, tokens; 0: none',
    COMMENT COLUMN IF EXISTS `adjusted_cost` 'added by corrections, signed, nano-units of the currency; 0: none',
    COMMENT COLUMN IF EXISTS `adjusted_bytes` 'added by corrections, signed, bytes; 0: none',
    COMMENT COLUMN IF EXISTS `unknown_input_tokens` 'admitted calls that did not report input_tokens',
    COMMENT COLUMN IF EXISTS `unknown_output_tokens` 'admitted calls that did not report output_tokens',
    COMMENT COLUMN IF EXISTS `unknown_cached_input_tokens` 'admitted calls that did not report cached_input_tokens',
    COMMENT COLUMN IF EXISTS `unknown_reasoning_tokens` 'admitted calls that did not report reasoning_tokens',
    COMMENT COLUMN IF EXISTS `unknown_cost` 'admitted calls that did not report cost',
    COMMENT COLUMN IF EXISTS `unknown_bytes` 'admitted calls that did not report bytes';

ALTER TABLE v_traffic_minute
    COMMENT COLUMN IF EXISTS `minute` 'minute of counted time: the earlier of event time and ledger time',
    COMMENT COLUMN IF EXISTS `model` 'model that was asked for; empty: none given',
    COMMENT COLUMN IF EXISTS `code` 'why it was refused; empty: admitted',
    COMMENT COLUMN IF EXISTS `attempts` 'calls, admitted and refused',
    COMMENT COLUMN IF EXISTS `refused` 'calls that were refused',
    COMMENT COLUMN IF EXISTS `admitted` 'calls that were admitted',
    COMMENT COLUMN IF EXISTS `duration_micros` 'sum of microseconds of all calls',
    COMMENT COLUMN IF EXISTS `calls` 'what was counted of the meter calls',
    COMMENT COLUMN IF EXISTS `input_tokens` 'sum over admitted calls that reported it, tokens; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `output_tokens` 'sum over admitted calls that reported it, tokens; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `cached_input_tokens` 'sum over admitted calls that reported it, tokens; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `reasoning_tokens` 'sum over admitted calls that reported it, tokens; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `cost` 'sum over admitted calls that reported it, nano-units of the currency; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `bytes` 'sum over admitted calls that reported it, bytes; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `adjusted_calls` 'added by corrections, signed, calls; 0: none',
    COMMENT COLUMN IF EXISTS `adjusted_input_tokens` 'added by corrections, signed, tokens; 0: none',
    COMMENT COLUMN IF EXISTS `adjusted_output_tokens` 'added by corrections, signed, tokens; 0: none',
    COMMENT COLUMN IF EXISTS `adjusted_cached_input_tokens` 'added by corrections, signed, tokens; 0: none',
    COMMENT COLUMN IF EXISTS `adjusted_reasoning_tokens` 'added by corrections, signed, tokens; 0: none',
    COMMENT COLUMN IF EXISTS `adjusted_cost` 'added by corrections, signed, nano-units of the currency; 0: none',
    COMMENT COLUMN IF EXISTS `adjusted_bytes` 'added by corrections, signed, bytes; 0: none',
    COMMENT COLUMN IF EXISTS `unknown_input_tokens` 'admitted calls that did not report input_tokens',
    COMMENT COLUMN IF EXISTS `unknown_output_tokens` 'admitted calls that did not report output_tokens',
    COMMENT COLUMN IF EXISTS `unknown_cached_input_tokens` 'admitted calls that did not report cached_input_tokens',
    COMMENT COLUMN IF EXISTS `unknown_reasoning_tokens` 'admitted calls that did not report reasoning_tokens',
    COMMENT COLUMN IF EXISTS `unknown_cost` 'admitted calls that did not report cost',
    COMMENT COLUMN IF EXISTS `unknown_bytes` 'admitted calls that did not report bytes';

ALTER TABLE v_refusals
    COMMENT COLUMN IF EXISTS `time` 'event time by the gateway''s clock, not clamped',
    COMMENT COLUMN IF EXISTS `stream_time` 'the ledger''s time of the entry; never goes back',
    COMMENT COLUMN IF EXISTS `sequence` 'position of the frame in the ledger',
    COMMENT COLUMN IF EXISTS `row` 'index of the call in its frame',
    COMMENT COLUMN IF EXISTS `shard` 'shard of the ledger: that of the account''s root',
    COMMENT COLUMN IF EXISTS `gateway` 'name of the gateway',
    COMMENT COLUMN IF EXISTS `account` 'who pays: the leaf of the path',
    COMMENT COLUMN IF EXISTS `key_id` 'id of the API key, never the key',
    COMMENT COLUMN IF EXISTS `request_id` 'request id; empty: none',
    COMMENT COLUMN IF EXISTS `method` 'HTTP method',
    COMMENT COLUMN IF EXISTS `route` 'route of the gateway''s configuration; empty: none',
    COMMENT COLUMN IF EXISTS `model` 'model that was asked for; empty: none given',
    COMMENT COLUMN IF EXISTS `region` 'region of the gateway; empty: none',
    COMMENT COLUMN IF EXISTS `status` 'HTTP status that was answered',
    COMMENT COLUMN IF EXISTS `code` 'why it was refused',
    COMMENT COLUMN IF EXISTS `decision_id` 'decision that refused it; empty: none',
    COMMENT COLUMN IF EXISTS `is_late` 'its minute had ended more than a minute before it entered the ledger';

ALTER TABLE v_conservation
    COMMENT COLUMN IF EXISTS `account` 'who pays: the leaf of the path',
    COMMENT COLUMN IF EXISTS `code` 'why it was refused; empty: admitted',
    COMMENT COLUMN IF EXISTS `attempts` 'calls, admitted and refused',
    COMMENT COLUMN IF EXISTS `refused` 'calls that were refused',
    COMMENT COLUMN IF EXISTS `admitted` 'calls that were admitted',
    COMMENT COLUMN IF EXISTS `calls` 'what was counted of the meter calls',
    COMMENT COLUMN IF EXISTS `input_tokens` 'sum over admitted calls that reported it, tokens; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `output_tokens` 'sum over admitted calls that reported it, tokens; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `cached_input_tokens` 'sum over admitted calls that reported it, tokens; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `reasoning_tokens` 'sum over admitted calls that reported it, tokens; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `cost` 'sum over admitted calls that reported it, nano-units of the currency; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `bytes` 'sum over admitted calls that reported it, bytes; NULL: none reported it',
    COMMENT COLUMN IF EXISTS `custom` 'sums of the user''s own meters that were reported',
    COMMENT COLUMN IF EXISTS `first_time` 'earliest event time',
    COMMENT COLUMN IF EXISTS `last_time` 'latest event time',
    COMMENT COLUMN IF EXISTS `unknown_input_tokens` 'admitted calls that did not report input_tokens',
    COMMENT COLUMN IF EXISTS `unknown_output_tokens` 'admitted calls that did not report output_tokens',
    COMMENT COLUMN IF EXISTS `unknown_cached_input_tokens` 'admitted calls that did not report cached_input_tokens',
    COMMENT COLUMN IF EXISTS `unknown_reasoning_tokens` 'admitted calls that did not report reasoning_tokens',
    COMMENT COLUMN IF EXISTS `unknown_cost` 'admitted calls that did not report cost',
    COMMENT COLUMN IF EXISTS `unknown_bytes` 'admitted calls that did not report bytes';

ALTER TABLE schema_migrations
    COMMENT COLUMN IF EXISTS `version` 'number of the migration',
    COMMENT COLUMN IF EXISTS `name` 'of its file',
    COMMENT COLUMN IF EXISTS `checksum` 'SHA-256 of its text',
    COMMENT COLUMN IF EXISTS `applied_at` 'when it was applied';
