// What is asked for again and again, under a key: an answer is shown under the key it
// was asked for and no other, with its age when it is not of now.

import { useEffect, useState } from 'preact/hooks'
import type { Freshness } from './api'
import { ago, clock } from './format'

/** Asked is what is known under a key. */
export interface Asked<T> {
  key: string
  answer?: T
  /** When the answer came, ms, local clock. */
  at: number
  /** Why the newest question has no answer. */
  error: string
}

export type AskedAction<T> = { type: 'answer'; key: string; answer: T; at: number } | { type: 'error'; key: string; error: string }

export const unasked = <T,>(key: string): Asked<T> => ({ key, at: 0, error: '' })

/** told takes note of an answer, or that there is none; of another key than is asked for now it says nothing. */
export function told<T>(a: Asked<T>, key: string, x: AskedAction<T>): Asked<T> {
  const now = a.key === key ? a : unasked<T>(key)
  if (x.key !== key) return now
  // The answer before is kept, and its age is told.
  return x.type === 'answer' ? { key, answer: x.answer, at: x.at, error: '' } : { ...now, error: x.error }
}

export function reasonOf(e: unknown): string {
  return e instanceof TypeError ? 'The console does not answer.' : e instanceof Error ? e.message : String(e)
}

/** soon is when it is asked again after an answer that was not of now, or none; seconds. */
const soon = 3

/** Rules of asking, seconds. */
export interface Rules {
  every: number
  /** Before the first question: who types is waited for. */
  first?: number
}

/** useAsked asks for what key names, at once and then every so often; nothing while key is empty. */
export function useAsked<T extends { freshness: Freshness }>(key: string, load: (signal: AbortSignal) => Promise<T>, rules: Rules): Asked<T> {
  const [state, setState] = useState<Asked<T>>(unasked(key))
  useEffect(() => {
    if (!key) return
    const abort = new AbortController()
    let timer: ReturnType<typeof setTimeout>
    const hear = (x: AskedAction<T>) => {
      // An answer that comes late must not stand under the label of the next question.
      if (!abort.signal.aborted) setState((s) => told(s, key, x))
    }
    const ask = async () => {
      let pause = rules.every
      try {
        const answer = await load(abort.signal)
        hear({ type: 'answer', key, answer, at: Date.now() })
        if (!answer.freshness.current) pause = Math.min(pause, soon)
      } catch (e) {
        hear({ type: 'error', key, error: reasonOf(e) })
        pause = Math.min(pause, soon)
      }
      if (!abort.signal.aborted) timer = setTimeout(() => void ask(), pause * 1000)
    }
    timer = setTimeout(() => void ask(), (rules.first ?? 0) * 1000)
    return () => {
      abort.abort()
      clearTimeout(timer)
    }
  }, [key])
  // Before the effect of a new key has run, the state is still that of the old one.
  return state.key === key ? state : unasked(key)
}

const since = (ms: number): string => (ms < 2000 ? 'just now' : ago(ms / 1000))

/** asOf says of when something is that is not of now; at is when that was said, ms, local clock. */
export function asOf(f: Freshness | undefined, at: number, now: number): string {
  if (!f || f.current) return ''
  const reason = f.reason ?? 'it is not known why'
  if (f.age_seconds < 0) return `Not known: ${reason}.`
  return `As of ${clock(f.as_of_unix_micros / 1e6)}, ${since(f.age_seconds * 1000 + Math.max(0, now - at))}: ${reason}.`
}

/** staleness of an answer: why it is not of now; empty when it is. */
export function staleness<T>(a: Asked<T>, freshness: (answer: T) => Freshness | undefined, now: number): string {
  if (a.answer === undefined) return a.error
  if (a.error) return `${a.error} What you see is from ${clock(a.at / 1000)}, ${since(now - a.at)}.`
  return asOf(freshness(a.answer), a.at, now)
}

/** useNow is the local clock, ms, each second while something ages. */
export function useNow(ages: boolean): number {
  const [now, setNow] = useState(Date.now())
  useEffect(() => {
    if (!ages) return
    setNow(Date.now())
    const t = setInterval(() => setNow(Date.now()), 1000)
    return () => clearInterval(t)
  }, [ages])
  return ages ? Math.max(now, 0) : Date.now()
}

/** useStaleness is staleness, with an age that goes on. */
export function useStaleness<T>(a: Asked<T>, freshness: (answer: T) => Freshness | undefined): string {
  const ages = a.answer !== undefined && (a.error !== '' || freshness(a.answer)?.current === false)
  return staleness(a, freshness, useNow(ages))
}
