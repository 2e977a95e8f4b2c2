// Follows /v1/live: server-sent events over fetch, because EventSource can't
// send a token and doesn't say why it failed.

import { headers, problemOf, type LiveMessage } from './api'
import { backoff, type Action } from './model'

/** After this long without a message, which come every second, the stream is taken for dead. */
const silence = 6000

/** Parser cuts a byte stream into events; what is incomplete waits. */
export class Parser {
  private rest = ''

  feed(text: string): string[] {
    const out: string[] = []
    const blocks = (this.rest + text).split('\n\n')
    this.rest = blocks.pop() ?? ''
    for (const block of blocks) {
      const data = block
        .split('\n')
        .filter((line) => line.startsWith('data:'))
        .map((line) => line.slice(5).trimStart())
        .join('\n')
      if (data) out.push(data)
    }
    return out
  }
}

/** follow tells dispatch of every message and every change of the connection until stopped. */
export function follow(dispatch: (a: Action) => void): { stop: () => void; now: () => void } {
  let stopped = false
  let tries = 0
  let abort = new AbortController()
  let timer: ReturnType<typeof setTimeout> | undefined

  const connect = async () => {
    abort = new AbortController()
    dispatch({ type: 'connecting' })
    let watchdog: ReturnType<typeof setTimeout> | undefined
    let quiet = false
    const heard = () => {
      clearTimeout(watchdog)
      watchdog = setTimeout(() => {
        quiet = true
        abort.abort()
      }, silence)
    }
    let reason = 'The stream ended.'
    try {
      heard()
      const res = await fetch('/v1/live', { headers: headers(), signal: abort.signal, cache: 'no-store' })
      if (res.status === 401) {
        dispatch({ type: 'locked' })
        return
      }
      if (!res.ok || !res.body) throw await problemOf(res)
      const reader = res.body.pipeThrough(new TextDecoderStream()).getReader()
      const parser = new Parser()
      for (;;) {
        const { done, value } = await reader.read()
        if (done) break
        for (const data of parser.feed(value)) {
          heard()
          tries = 0
          dispatch({ type: 'message', message: JSON.parse(data) as LiveMessage, at: Date.now() })
        }
      }
    } catch (e) {
      if (quiet) reason = 'Nothing was heard for six seconds.'
      else if (e instanceof TypeError) reason = 'The console does not answer.'
      else if (e instanceof Error) reason = e.message
    } finally {
      clearTimeout(watchdog)
    }
    if (stopped) return
    const pause = backoff(tries++, Math.random())
    dispatch({ type: 'broken', reason, retryAt: Date.now() + pause })
    timer = setTimeout(() => void connect(), pause)
  }

  void connect()
  return {
    stop: () => {
      stopped = true
      clearTimeout(timer)
      abort.abort()
    },
    now: () => {
      clearTimeout(timer)
      tries = 0
      void connect()
    },
  }
}
