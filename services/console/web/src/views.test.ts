import { describe, expect, it } from 'vitest'
import type { Explanation, History, LiveMessage, TopLimit } from './api'
import { stateOf } from './audit'
import { tightest } from './cards'
import { effectOf } from './corrections'
import { factsOf } from './explain'
import { areasOf } from './history'
import { partsOf, shareOf, shared } from './limits'
import { lookOfCode, lookOfSeries } from './palette'
import { Parser } from './stream'

describe('the parser of the stream', () => {
  it('puts events together from any pieces', () => {
    const p = new Parser()
    const text = 'id: 1\nevent: live\ndata: {"a":1}\n\n: comment\n\nid: 2\ndata: {"b":\ndata: 2}\n\n'
    const got: string[] = []
    for (const c of text) got.push(...p.feed(c))
    expect(got).toEqual(['{"a":1}', '{"b":\n2}'])
    expect(p.feed(text)).toEqual(got)
  })
})

it('shows the limit that is nearest to its end', () => {
  const l = (limit_id: string, used: number, amount: number) => ({ limit_id, used, amount }) as TopLimit
  expect(tightest([l('a', 1, 10), l('b', 900, 1000), l('c', 50, 1000)])?.limit_id).toBe('b')
  expect(tightest([])).toBeUndefined()
})

const lease = { settled: 60, outstanding: 30, dead: 12, free: 10, exposure: 0, overdraft: 0, gateways: 3, waiting: 0, grants: 9, recalls: 0, denied_early: 0, denied_final: 0 }

it('shows who has what of a shared allowance', () => {
  expect(partsOf({ amount: 100, used: 60, remaining: 28, lease })).toEqual({ used: 60, held: 18, dead: 12, free: 10 })
  expect(partsOf({ amount: 100, used: 58, remaining: 42 })).toEqual({ used: 58, held: 0, dead: 0, free: 42 })
  expect([shareOf({ amount: 0, used: 0 }), shareOf({ amount: 0, used: 3 }), shareOf({ amount: 4, used: 1 })]).toEqual([0, 1, 0.25])
})

it('lists the shared limits of the busiest accounts once, nearest to their end first', () => {
  const l = (account: string, tier: string, used: number) => ({ account, limit_id: 'p/l', tier, used, amount: 100 }) as TopLimit
  const top = [{ limits: [l('a/b', 'exact', 5), l('a', 'leased', 50)] }, { limits: [l('a/c', 'eventual', 99), l('a', 'leased', 50)] }] as LiveMessage['top']
  expect(shared({ top }).map((x) => x.account)).toEqual(['a', 'a/b'])
  expect(shared(undefined)).toEqual([])
})

it('tells what led to a decision', () => {
  const e = {
    decision: { used: 50, amount: 50, decided_at_unix_micros: 0 }, limit: { meter: 'calls', window: 'day', amount: 50, tier: 'exact', plan_version: 'v1' },
    counter: { before: 49, after: 49 }, entry: { shard: 6, sequence: 2282, kind: 'lease' }, fed: { calls: 49, adjusted: -5 }, allowance: { settled: 50, outstanding: 0, dead: 0, exposure: 0 },
  } as Explanation
  expect(Object.fromEntries(factsOf(e))).toMatchObject({ Limit: '50 calls, day, tier exact, of plans version v1', Counter: '49 before that entry, 49 after it; fed by 49 calls, corrected by -5', Leases: '50 used, 0 with gateways, 0 of it dead, 0 exposed' })
  expect(factsOf({ ...e, allowance: undefined }).map(([name]) => name)).not.toContain('Leases')
})

it('draws refused calls of a group together with admitted ones', () => {
  const h: History = {
    from_unix_seconds: 0, step_seconds: 60, steps: 2, group: 'model', freshness: { current: true, as_of_unix_micros: 1, age_seconds: 0 },
    series: [
      { name: 'large', other: false, admitted: [1, 2], refused: [1, 0], input_tokens: [0, 0], output_tokens: [0, 0] },
      { name: '', other: false, admitted: [1, 0], refused: [0, 0], input_tokens: [0, 0], output_tokens: [0, 0] },
      { name: '', other: true, admitted: [5, 5], refused: [0, 0], input_tokens: [0, 0], output_tokens: [0, 0] },
    ],
  }
  expect(areasOf(h).map((a) => [a.name, a.values])).toEqual([['large', [2, 2]], ['none given', [1, 0]], ['All others', [5, 5]]])
  expect(areasOf({ ...h, group: 'code' }).map((a) => a.name)).toEqual(['large', 'Admitted', 'All others'].map((n) => (n === 'large' ? 'Large' : n)))
})

it('is not green about what was said by an auditor that cannot be asked now', () => {
  expect(stateOf({ state: 'ok' }, true)).toBe('ok')
  expect(stateOf({ state: 'ok' }, false)).toBe('unknown')
  expect(stateOf({ state: 'waiting' }, true)).toBe('waiting')
  expect(stateOf({ state: 'down' }, false)).toBe('down')
})

it('says what a correction changes, with its sign', () => {
  expect(effectOf({ adjustments: { calls: -3, output_tokens: 1200 } })).toBe('−3 calls, +1.2k tokens out')
})

it('tells everything apart by more than colour', () => {
  const codes = ['', 'QUOTA_EXCEEDED', 'RATE_LIMITED', 'SPEND_CAP_REACHED', 'CREDITS_DEPLETED', 'CREDITS_INSUFFICIENT', 'SUBSCRIPTION_EXPIRED', 'TRIAL_ENDED', 'PAYMENT_FAILED', 'PLAN_REQUIRED', 'COST_EXCEEDS_LIMIT', 'BILLING_STATE_UNKNOWN']
  const seen = new Set(codes.map((c) => JSON.stringify(lookOfCode(c))))
  expect(seen.size).toBe(codes.length)
  const series = new Set(Array.from({ length: 10 }, (_, i) => JSON.stringify(lookOfSeries(i, false))))
  expect(series.size).toBe(10)
})
