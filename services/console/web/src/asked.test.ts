import { expect, it } from 'vitest'
import type { Freshness } from './api'
import { asOf, staleness, told, unasked } from './asked'
import { clock } from './format'

it('never shows an answer under the label of another question', () => {
  let s = told(unasked<number>('15m'), '15m', { type: 'answer', key: '15m', answer: 1, at: 5 })
  expect(s.answer).toBe(1)
  // The range is changed; the answer to the old one comes late, also before anything else of the new one.
  s = told(s, '7d', { type: 'answer', key: '15m', answer: 2, at: 6 })
  expect(s).toEqual({ key: '7d', at: 0, error: '' })
  s = told(s, '7d', { type: 'answer', key: '7d', answer: 3, at: 7 })
  s = told(s, '7d', { type: 'error', key: '15m', error: 'late' })
  expect(s).toEqual({ key: '7d', answer: 3, at: 7, error: '' })
})

it('keeps the answer before and says its age while there is no new one', () => {
  const got = told(unasked<number>('a'), 'a', { type: 'answer', key: 'a', answer: 1, at: 1000 })
  const failed = told(got, 'a', { type: 'error', key: 'a', error: 'ClickHouse does not answer.' })
  expect(failed.answer).toBe(1)
  expect(staleness(failed, () => undefined, 31_000)).toBe(`ClickHouse does not answer. What you see is from ${clock(1)}, 30 s ago.`)
  expect(staleness(told(failed, 'a', { type: 'answer', key: 'a', answer: 2, at: 2000 }), () => undefined, 31_000)).toBe('')
  expect(staleness(told(unasked<number>('a'), 'a', { type: 'error', key: 'a', error: 'no' }), () => undefined, 0)).toBe('no')
})

it('says of when something is that is not current', () => {
  const f: Freshness = { current: false, as_of_unix_micros: 60e6, age_seconds: 20, reason: 'shard 3 is silent' }
  expect(asOf(f, 1000, 11_000)).toBe(`As of ${clock(60)}, 30 s ago: shard 3 is silent.`)
  expect(asOf({ ...f, as_of_unix_micros: 0, age_seconds: -1 }, 0, 0)).toBe('Not known: shard 3 is silent.')
  expect(asOf({ current: true, as_of_unix_micros: 1, age_seconds: 0 }, 0, 0)).toBe('')
  expect(asOf(undefined, 0, 0)).toBe('')
})
