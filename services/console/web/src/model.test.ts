import { describe, expect, it } from 'vitest'
import type { LiveMessage, Second } from './api'
import { backoff, byCode, empty, merge, rates, reduce, stack, windowSeconds } from './model'

const second = (t: number, admitted = 0, refused: Record<string, number> = {}): Second => ({ t, admitted, refused, input_tokens: admitted * 10, output_tokens: admitted })

const fresh = { current: true, as_of_unix_micros: 1, age_seconds: 0 }

const message = (reset: boolean, seconds: Second[]): LiveMessage => ({
  at_unix_micros: 1,
  ledger_sequence: 1,
  reset,
  seconds,
  top: [],
  refusals: [],
  alerts: [],
  dead_letters: { total: 0, by_reason: [], newest: [] },
  decisions: { deny: 0, warn: 0, all: 0 },
  lag: { tail_entries: 0, skipped_entries: 0, counted_seconds: 0, counted_known: true, history_entries: 0, history_known: true },
  health: [],
  state: 'ok',
  freshness: { calls: fresh, decisions: fresh, counters: fresh, alerts: fresh, dead_letters: fresh, health: fresh },
})

describe('the stream', () => {
  it('begins with everything and goes on with what is new', () => {
    let m = reduce(empty, { type: 'message', message: message(true, [second(1, 5), second(2, 6)]), at: 10 })
    m = reduce(m, { type: 'message', message: message(false, [second(2, 7), second(3, 1)]), at: 20 })
    expect(m.seconds.map((s) => [s.t, s.admitted])).toEqual([[1, 5], [2, 7], [3, 1]])
    expect(m.connection).toEqual({ kind: 'live' })
    expect(m.heardAt).toBe(20)
  })

  it('keeps what it had when the connection breaks', () => {
    let m = reduce(empty, { type: 'message', message: message(true, [second(1, 5)]), at: 10 })
    m = reduce(m, { type: 'broken', reason: 'gone', retryAt: 99 })
    expect(m.connection).toEqual({ kind: 'broken', reason: 'gone', retryAt: 99 })
    expect(m.seconds).toHaveLength(1)
    expect(reduce(m, { type: 'connecting' }).connection.kind).toBe('broken')
    expect(reduce(m, { type: 'message', message: message(true, []), at: 11 }).connection.kind).toBe('live')
  })

  it('asks for a token when it needs one', () => {
    expect(reduce(empty, { type: 'locked' }).connection.kind).toBe('locked')
  })
})

describe('merge', () => {
  it('keeps five minutes', () => {
    const old = Array.from({ length: 400 }, (_, i) => second(i))
    const got = merge(old, [second(400, 1)])
    expect(got).toHaveLength(windowSeconds)
    expect(got.at(-1)?.admitted).toBe(1)
  })

  it('fills a hole with silence', () => {
    const got = merge([second(1, 9)], [second(5, 9)])
    expect(got.map((s) => [s.t, s.admitted])).toEqual([[1, 9], [2, 0], [3, 0], [4, 0], [5, 9]])
  })

  it('leaves everything as it is when nothing comes', () => {
    const old = [second(1)]
    expect(merge(old, [])).toBe(old)
  })
})

describe('sums', () => {
  it('averages the newest seconds', () => {
    const s = [second(0, 1000), second(1, 8, { A: 2 }), second(2, 8, { A: 1, B: 1 })]
    expect(rates(s, 2)).toEqual({ calls: 10, refused: 2, tokens: 88 })
    expect(rates([])).toEqual({ calls: 0, refused: 0, tokens: 0 })
  })

  it('puts the most frequent code first', () => {
    expect(byCode([second(1, 0, { B: 1, A: 1 }), second(2, 0, { C: 5, B: 1 })])).toEqual([
      { code: 'C', count: 5 },
      { code: 'B', count: 2 },
      { code: 'A', count: 1 },
    ])
  })

  it('stacks from the bottom up', () => {
    expect(stack([[1, 2], [10, 20], [100, 200]])).toEqual([[1, 2], [11, 22], [111, 222]])
    expect(stack([])).toEqual([])
  })
})

it('waits longer each time, but not for ever', () => {
  expect([0, 1, 2, 3, 4, 5, 50].map((n) => backoff(n, 1))).toEqual([500, 1000, 2000, 4000, 8000, 8000, 8000])
  expect(backoff(0, 0)).toBe(250)
})
