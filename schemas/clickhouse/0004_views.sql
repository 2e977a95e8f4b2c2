-- What dashboards, the console and analysts may read. The tables behind them
-- may change, these do not: a newer migration replaces a view with one that has
-- at least its columns.
--
-- A quantity that is unknown is NULL in v_calls. Sums leave it out.
-- A refused call feeds no meter; an admitted one is 1 call unless it says else.
-- Counted time is the earlier of event time and ledger time.

CREATE VIEW IF NOT EXISTS v_calls AS
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
    custom
FROM calls AS c;

CREATE VIEW IF NOT EXISTS v_usage_hourly AS
SELECT
    hour, account, model, code,
    sum(u.attempts) AS attempts, sum(u.refused) AS refused, sum(u.attempts) - sum(u.refused) AS admitted,
    sum(u.duration_micros) AS duration_micros, sum(u.calls) AS calls,
    sum(u.input_tokens) AS input_tokens, sum(u.output_tokens) AS output_tokens,
    sum(u.cached_input_tokens) AS cached_input_tokens, sum(u.reasoning_tokens) AS reasoning_tokens,
    sum(u.cost) AS cost, sum(u.bytes) AS bytes
FROM usage_hourly AS u
GROUP BY hour, account, model, code;

-- By minute of the event time and account, out of the calls: ask it for one account or
-- a short time. For all accounts there is v_traffic_minute.
CREATE VIEW IF NOT EXISTS v_usage_minute AS
SELECT
    toStartOfMinute(c.time) AS minute, account, model, code,
    count() AS attempts, countIf(c.code != '') AS refused, countIf(c.code = '') AS admitted,
    sum(c.duration_micros) AS duration_micros,
    sumIf(if(bitTest(c.known, 0), c.calls, 1), c.code = '') AS calls,
    sumIf(c.input_tokens, c.code = '') AS input_tokens, sumIf(c.output_tokens, c.code = '') AS output_tokens,
    sumIf(c.cached_input_tokens, c.code = '') AS cached_input_tokens, sumIf(c.reasoning_tokens, c.code = '') AS reasoning_tokens,
    sumIf(c.cost, c.code = '') AS cost, sumIf(c.bytes, c.code = '') AS bytes
FROM calls AS c
GROUP BY minute, account, model, code;

CREATE VIEW IF NOT EXISTS v_traffic_minute AS
SELECT
    minute, model, code,
    sum(u.attempts) AS attempts, sum(u.refused) AS refused, sum(u.attempts) - sum(u.refused) AS admitted,
    sum(u.duration_micros) AS duration_micros, sum(u.calls) AS calls,
    sum(u.input_tokens) AS input_tokens, sum(u.output_tokens) AS output_tokens,
    sum(u.cached_input_tokens) AS cached_input_tokens, sum(u.reasoning_tokens) AS reasoning_tokens,
    sum(u.cost) AS cost, sum(u.bytes) AS bytes
FROM traffic_minute AS u
GROUP BY minute, model, code;

CREATE VIEW IF NOT EXISTS v_refusals AS
SELECT
    time, stream_time, sequence, row, shard, gateway, account, key_id, request_id,
    method, route, model, region, status, code, decision_id, CAST(late, 'Bool') AS is_late
FROM calls
WHERE code != '';

CREATE VIEW IF NOT EXISTS v_decisions AS
SELECT
    sequence, stream_time, id, account, limit_id, meter, verdict, code, revision, shard, epoch, used, amount,
    window, period_start, period_end, plan_version, decided_at, cause,
    if(toUnixTimestamp64Micro(cause) > 0, dateDiff('microsecond', cause, stream_time), NULL) AS latency_micros
FROM decisions;

CREATE VIEW IF NOT EXISTS v_control AS
SELECT sequence, stream_time, shard, id, author, created_at, kind, body
FROM control;

CREATE VIEW IF NOT EXISTS v_alerts AS
SELECT
    sequence, stream_time, episode_id, transition, n, rule, scope, severity, started_at, at, value, threshold,
    refused_accounts, active_accounts, reason, summary, body
FROM alerts;

-- Per account and code, out of the calls themselves: one of the four points of
-- the conservation check. Rows of code '' are what was admitted.
CREATE VIEW IF NOT EXISTS v_conservation AS
SELECT
    account, code,
    count() AS attempts, countIf(c.code != '') AS refused, countIf(c.code = '') AS admitted,
    sumIf(if(bitTest(c.known, 0), c.calls, 1), c.code = '') AS calls,
    sumIf(c.input_tokens, c.code = '') AS input_tokens, sumIf(c.output_tokens, c.code = '') AS output_tokens,
    sumIf(c.cached_input_tokens, c.code = '') AS cached_input_tokens, sumIf(c.reasoning_tokens, c.code = '') AS reasoning_tokens,
    sumIf(c.cost, c.code = '') AS cost, sumIf(c.bytes, c.code = '') AS bytes,
    sumMapIf(c.custom, c.code = '') AS custom,
    min(c.time) AS first_time, max(c.time) AS last_time
FROM calls AS c
GROUP BY account, code;
