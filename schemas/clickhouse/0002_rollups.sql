-- Coarse sums only: finer ones with sketches were slower than the rows
-- themselves. They are written by the historian with each block and not by a
-- materialized view: a view's part and its table's part are two commits, and
-- which of them a killed server kept cannot be told apart afterwards. Here each
-- is an insert of its own whose presence can be asked for (last_sequence), and
-- the sums cost the historian less than they would cost the server.
--
-- counted time = the earlier of event time and ledger time. Refused calls feed
-- no meter. `month` is that of the ledger's time, so that a block is one part.
CREATE TABLE IF NOT EXISTS usage_hourly
(
    month               UInt32                     CODEC(ZSTD(1)),
    hour                DateTime('UTC')            CODEC(Delta(4), ZSTD(1)),
    account             String                     CODEC(ZSTD(1)),
    model               LowCardinality(String)     CODEC(ZSTD(1)),
    code                LowCardinality(String)     CODEC(ZSTD(1)),
    attempts            SimpleAggregateFunction(sum, UInt64) CODEC(T64, ZSTD(1)),
    refused             SimpleAggregateFunction(sum, UInt64) CODEC(T64, ZSTD(1)),
    duration_micros     SimpleAggregateFunction(sum, UInt64) CODEC(T64, ZSTD(1)),
    calls               SimpleAggregateFunction(sum, Int64) CODEC(T64, ZSTD(1)),
    input_tokens        SimpleAggregateFunction(sum, Int64) CODEC(T64, ZSTD(1)),
    output_tokens       SimpleAggregateFunction(sum, Int64) CODEC(T64, ZSTD(1)),
    cached_input_tokens SimpleAggregateFunction(sum, Int64) CODEC(T64, ZSTD(1)),
    reasoning_tokens    SimpleAggregateFunction(sum, Int64) CODEC(T64, ZSTD(1)),
    cost                SimpleAggregateFunction(sum, Int64) CODEC(T64, ZSTD(1)),
    bytes               SimpleAggregateFunction(sum, Int64) CODEC(T64, ZSTD(1)),
    custom              SimpleAggregateFunction(sumMap, Map(String, Int64)) CODEC(ZSTD(1)),
    last_sequence       SimpleAggregateFunction(max, UInt64) CODEC(Delta(8), ZSTD(1))
)
ENGINE = AggregatingMergeTree
PARTITION BY month
ORDER BY (account, hour, model, code)
SETTINGS non_replicated_deduplication_window = 10000;

CREATE TABLE IF NOT EXISTS traffic_minute
(
    month               UInt32                     CODEC(ZSTD(1)),
    minute              DateTime('UTC')            CODEC(Delta(4), ZSTD(1)),
    model               LowCardinality(String)     CODEC(ZSTD(1)),
    code                LowCardinality(String)     CODEC(ZSTD(1)),
    attempts            SimpleAggregateFunction(sum, UInt64) CODEC(T64, ZSTD(1)),
    refused             SimpleAggregateFunction(sum, UInt64) CODEC(T64, ZSTD(1)),
    duration_micros     SimpleAggregateFunction(sum, UInt64) CODEC(T64, ZSTD(1)),
    calls               SimpleAggregateFunction(sum, Int64) CODEC(T64, ZSTD(1)),
    input_tokens        SimpleAggregateFunction(sum, Int64) CODEC(T64, ZSTD(1)),
    output_tokens       SimpleAggregateFunction(sum, Int64) CODEC(T64, ZSTD(1)),
    cached_input_tokens SimpleAggregateFunction(sum, Int64) CODEC(T64, ZSTD(1)),
    reasoning_tokens    SimpleAggregateFunction(sum, Int64) CODEC(T64, ZSTD(1)),
    cost                SimpleAggregateFunction(sum, Int64) CODEC(T64, ZSTD(1)),
    bytes               SimpleAggregateFunction(sum, Int64) CODEC(T64, ZSTD(1)),
    custom              SimpleAggregateFunction(sumMap, Map(String, Int64)) CODEC(ZSTD(1)),
    last_sequence       SimpleAggregateFunction(max, UInt64) CODEC(Delta(8), ZSTD(1))
)
ENGINE = AggregatingMergeTree
PARTITION BY month
ORDER BY (minute, code, model)
SETTINGS non_replicated_deduplication_window = 10000;
