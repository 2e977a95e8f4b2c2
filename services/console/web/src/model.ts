// What the page knows, as a fold of the stream's messages. Pure.

import type { LiveMessage, Second } from './api'

export const windowSeconds = 300

export type Connection =
  | { kind: 'connecting' }
  | { kind: 'live' }
  | { kind: 'broken'; reason: string; retryAt: number } // retryAt: ms, local clock
  | { kind: 'locked' } // a token is needed

export interface Model {
  connection: Connection
  /** Newest message; undefined before the first. */
  live?: LiveMessage
  /** The last five minutes, oldest first, one entry a second. */
  seconds: Second[]
  /** Local time of the newest message, ms. */
  heardAt: number
}

export type Action =
  | { type: 'message'; message: LiveMessage; at: number }
  | { type: 'connecting' }
  | { type: 'broken'; reason: string; retryAt: number }
  | { type: 'locked' }

export const empty: Model = { connection: { kind: 'connecting' }, seconds: [], heardAt: 0 }

export function reduce(m: Model, a: Action): Model {
  switch (a.type) {
    case 'message':
      return {
        connection: { kind: 'live' },
        live: a.message,
        seconds: a.message.reset ? a.message.seconds.slice(-windowSeconds) : merge(m.seconds, a.message.seconds),
        heardAt: a.at,
      }
    case 'connecting':
      // What was broken stays broken until a message comes: no flicker.
      return m.connection.kind === 'broken' ? m : { ...m, connection: { kind: 'connecting' } }
    case 'broken':
      return { ...m, connection: { kind: 'broken', reason: a.reason, retryAt: a.retryAt } }
    case 'locked':
      return { ...m, connection: { kind: 'locked' } }
  }
}

/** merge replaces seconds that are told again and keeps the last five minutes. */
export function merge(old: Second[], fresh: Second[]): Second[] {
  const first = fresh[0]
  if (!first) return old
  const kept = old.filter((s) => s.t < first.t)
  const before = kept.at(-1)
  // A hole would draw a line between its ends: fill it with silence.
  if (before) for (let t = before.t + 1; t < first.t && t > first.t - windowSeconds; t++) kept.push({ t, admitted: 0, refused: {}, input_tokens: 0, output_tokens: 0 })
  return [...kept, ...fresh].slice(-windowSeconds)
}

export interface Rates {
  calls: number
  refused: number
  tokens: number
}

/** rates averages the newest whole seconds. */
export function rates(seconds: Second[], over = 5): Rates {
  const part = seconds.slice(-over)
  if (part.length === 0) return { calls: 0, refused: 0, tokens: 0 }
  let calls = 0
  let refused = 0
  let tokens = 0
  for (const s of part) {
    const r = refusedIn(s)
    calls += s.admitted + r
    refused += r
    tokens += s.input_tokens + s.output_tokens
  }
  return { calls: calls / part.length, refused: refused / part.length, tokens: tokens / part.length }
}

export function refusedIn(s: Second): number {
  let n = 0
  for (const v of Object.values(s.refused)) n += v
  return n
}

export interface CodeCount {
  code: string
  count: number
}

/** byCode sums refusals by code, most first. */
export function byCode(seconds: Second[]): CodeCount[] {
  const sums = new Map<string, number>()
  for (const s of seconds) for (const [code, n] of Object.entries(s.refused)) sums.set(code, (sums.get(code) ?? 0) + n)
  return [...sums].map(([code, count]) => ({ code, count })).sort((a, b) => b.count - a.count || a.code.localeCompare(b.code))
}

/** stack sums series from the bottom up, for a stacked chart. */
export function stack(rows: number[][]): number[][] {
  const out: number[][] = []
  let below: number[] | undefined
  for (const row of rows) {
    const top: number[] = row.map((v, i) => v + (below?.[i] ?? 0))
    out.push(top)
    below = top
  }
  return out
}

/** backoff is the pause before the next try, ms: doubling, jittered, bounded. */
export function backoff(tries: number, random: number): number {
  const full = Math.min(8000, 500 * 2 ** Math.min(tries, 10))
  return Math.round(full * (0.5 + random / 2))
}
