-- How a call ended: an answer that broke off has the status of a whole one.
ALTER TABLE calls
    ADD COLUMN IF NOT EXISTS ending UInt8 COMMENT 'of an admitted call: 0 not told, 1 finished, 2 the client left before it had the whole answer, 3 the upstream did not answer or broke off' CODEC(ZSTD(1));

ALTER TABLE calls
    COMMENT COLUMN IF EXISTS flags 'bits: 1 admitted while unknown, 2 some quantities are estimates, 4 event time ahead of the ledger, 8 units taken from leases';

CREATE OR REPLACE VIEW v_calls
(
    time                DateTime64(6, 'UTC')   COMMENT 'event time by the gateway''s clock, not clamped',
    stream_time         DateTime('UTC')        COMMENT 'the ledger''s time of the frame; never goes back',
    sequence            UInt64                 COMMENT 'position of the frame in the ledger',
    row                 UInt16                 COMMENT 'index of the call in its frame',
    shard               UInt16                 COMMENT 'of the ledger: that of the root account',
    producer            LowCardinality(String) COMMENT 'ksuid of the gateway''s run; all zeros: an event of another producer',
    frame               UInt64                 COMMENT 'number of the frame, per producer and shard',
    gateway             LowCardinality(String) COMMENT 'name of the gateway',
    account             String                 COMMENT 'who pays: the leaf of the path',
    key_id              LowCardinality(String) COMMENT 'public id of the API key',
    request_id          String                 COMMENT 'id of the request, as in X-Request-Id',
    trace_id_hex        String                 COMMENT 'W3C trace id in hex; all zeros: none',
    span_id_hex         String                 COMMENT 'W3C span id in hex; all zeros: none',
    method              LowCardinality(String) COMMENT 'HTTP method',
    route               LowCardinality(String) COMMENT 'route of the gateway',
    model               LowCardinality(String) COMMENT 'model that was asked for; empty: none',
    region              LowCardinality(String) COMMENT 'region of the gateway; empty: none',
    status              UInt16                 COMMENT 'HTTP status that the client got; 499: it left before there was one',
    code                LowCardinality(String) COMMENT 'why it was refused; empty: admitted',
    admitted            Bool                   COMMENT 'it was let through',
    decision_id         String                 COMMENT 'decision that refused it; empty: none',
    duration_micros     UInt64                 COMMENT 'from the request''s first byte to the answer''s last, microseconds',
    flags               UInt32                 COMMENT 'bits: 1 admitted while unknown, 2 some quantities are estimates, 4 event time ahead of the ledger, 8 units taken from leases',
    is_late             Bool                   COMMENT 'its minute had ended more than a minute before it entered the ledger',
    source              LowCardinality(String) COMMENT 'CloudEvents source of an event of another producer',
    event_id            String                 COMMENT 'CloudEvents id, with its source the event''s identity',
    price_version       LowCardinality(String) COMMENT 'price list that the cost was rated with',
    currency            LowCardinality(String) COMMENT 'of the cost, ISO 4217',
    counted_calls       Int64                  COMMENT 'what it adds to the meter calls: 0 when refused',
    input_tokens        Nullable(Int64)        COMMENT 'tokens of all input; NULL: unknown',
    output_tokens       Nullable(Int64)        COMMENT 'tokens of all output, reasoning included; NULL: unknown',
    cached_input_tokens Nullable(Int64)        COMMENT 'the part of the input that came from a cache; NULL: unknown',
    reasoning_tokens    Nullable(Int64)        COMMENT 'the part of the output that was reasoning; NULL: unknown',
    cost                Nullable(Int64)        COMMENT 'nano-units of the currency; NULL: unknown',
    bytes               Nullable(Int64)        COMMENT 'of the answer''s body; NULL: unknown',
    custom              Map(LowCardinality(String), Int64) COMMENT 'readings of the user''s own meters',
    ending              LowCardinality(String) COMMENT 'how an admitted call ended: finished; client_left, before it had the whole answer; upstream_failed, did not answer or broke off; empty: refused, or not told',
    estimated           Bool                   COMMENT 'some of its quantities are estimates: its answer did not tell them'
) AS
SELECT
    time, stream_time, sequence, row, shard, producer, frame, gateway,
    account, key_id, request_id, lower(hex(trace_id)) AS trace_id_hex, lower(hex(span_id)) AS span_id_hex,
    method, route, model, region, status, code, CAST(code = '', 'Bool') AS admitted, decision_id,
    duration_micros, flags, CAST(late, 'Bool') AS is_late, source, event_id, price_version, currency,
    if(code != '', 0, if(bitTest(c.known, 0), c.calls, 1)) AS counted_calls,
    if(bitTest(c.known, 1), c.input_tokens, NULL) AS input_tokens,
    if(bitTest(c.known, 2), c.output_tokens, NULL) AS output_tokens,
    if(bitTest(c.known, 3), c.cached_input_tokens, NULL) AS cached_input_tokens,
    if(bitTest(c.known, 4), c.reasoning_tokens, NULL) AS reasoning_tokens,
    if(bitTest(c.known, 5), c.cost, NULL) AS cost,
    if(bitTest(c.known, 6), c.bytes, NULL) AS bytes,
    custom,
    transform(c.ending, [1, 2, 3], ['finished', 'client_left', 'upstream_failed'], '') AS ending,
    CAST(bitTest(c.flags, 1), 'Bool') AS estimated
FROM calls AS c;
