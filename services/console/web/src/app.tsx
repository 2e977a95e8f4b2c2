import { useEffect, useReducer, useRef, useState } from 'preact/hooks'
import { setToken, type Part, type State } from './api'
import { AuditCard } from './audit'
import { AccountsCard, AlertsCard, CodesCard, DeadLettersCard, Figures, LiveCard, RefusalsCard } from './cards'
import { CorrectionsCard } from './corrections'
import { ExplainCard } from './explain'
import { clock } from './format'
import { HistoryCard } from './history'
import { LimitsCard } from './limits'
import { empty, reduce, type Connection } from './model'
import { Mark } from './parts'
import { follow } from './stream'

const partNames: Record<string, string> = {
  gateway: 'Gateway',
  aggregator: 'Aggregator',
  historian: 'Historian',
  alerter: 'Alerter',
  auditor: 'Auditor',
  nats: 'NATS',
  clickhouse: 'ClickHouse',
}

const stateWords: Record<State, string> = { ok: 'well', waiting: 'late', down: 'down', unknown: 'not known' }

export function App() {
  const [m, dispatch] = useReducer(reduce, empty)
  const stream = useRef<ReturnType<typeof follow> | undefined>(undefined)
  useEffect(() => {
    const s = follow(dispatch)
    stream.current = s
    return s.stop
  }, [])
  const stale = m.connection.kind === 'broken' || m.connection.kind === 'locked'
  return (
    <>
      <header class="top">
        <h1>
          <img src="/favicon.svg" alt="" width="26" height="26" />
          Tollkeeper
        </h1>
        <Strip parts={m.live?.health ?? []} stale={stale || m.live?.freshness.health.current === false} />
        <Status connection={m.connection} />
      </header>
      <Notice connection={m.connection} heardAt={m.heardAt} retry={() => stream.current?.now()} />
      <main class={stale && m.live ? 'stale' : ''} data-ready={m.live ? 'yes' : 'no'}>
        <Figures seconds={m.seconds} live={m.live} />
        <LiveCard seconds={m.seconds} live={m.live} />
        <CodesCard seconds={m.seconds} live={m.live} />
        <AccountsCard live={m.live} />
        <RefusalsCard live={m.live} />
        <LimitsCard live={m.live} />
        <ExplainCard />
        <HistoryCard />
        <AlertsCard live={m.live} />
        <DeadLettersCard live={m.live} />
        <AuditCard />
        <CorrectionsCard />
      </main>
    </>
  )
}

/** Strip shows how every part is; details by pointing, focus or for a reader. */
function Strip({ parts, stale }: { parts: Part[]; stale: boolean }) {
  const known = new Map(parts.map((p) => [p.name, p]))
  return (
    <ul class="strip" aria-label="Health">
      {Object.entries(partNames).map(([key, name]) => {
        const p = stale ? undefined : known.get(key)
        const state: State = p?.state ?? 'unknown'
        return (
          <li key={key}>
            <button type="button" class={`part part-${state}`} aria-label={`${name}: ${stateWords[state]}. ${p?.detail ?? ''}`}>
              <Mark state={state} />
              {name}
              <span class="tip" role="tooltip">
                <b>{stateWords[state]}</b> {p?.detail ?? 'nothing was heard yet'}
              </span>
            </button>
          </li>
        )
      })}
    </ul>
  )
}

function Status({ connection }: { connection: Connection }) {
  const [state, word] = {
    connecting: ['waiting', 'Connecting'] as const,
    live: ['ok', 'Live'] as const,
    broken: ['down', 'Disconnected'] as const,
    locked: ['waiting', 'Locked'] as const,
  }[connection.kind]
  return (
    <p class={`status status-${connection.kind}`} role="status">
      <Mark state={state} />
      {word}
    </p>
  )
}

/** Notice says what is wrong with the connection and what to do; its place is kept, so that nothing moves. */
function Notice({ connection, heardAt, retry }: { connection: Connection; heardAt: number; retry: () => void }) {
  const [now, setNow] = useState(Date.now())
  const shown = connection.kind === 'broken' || connection.kind === 'locked'
  useEffect(() => {
    if (!shown) return
    setNow(Date.now())
    const t = setInterval(() => setNow(Date.now()), 500)
    return () => clearInterval(t)
  }, [shown])
  if (connection.kind === 'locked') return <Unlock retry={retry} />
  if (connection.kind !== 'broken') return null
  const wait = Math.max(0, Math.ceil((connection.retryAt - now) / 1000))
  return (
    <div class="notice" role="alert">
      <Mark state="down" />
      <span>
        {connection.reason} {heardAt > 0 && `What you see is from ${clock(heardAt / 1000)}. `}
        {wait > 0 ? `Trying again in ${wait} s.` : 'Trying again…'}
      </span>
      <button type="button" onClick={retry}>
        Try now
      </button>
    </div>
  )
}

function Unlock({ retry }: { retry: () => void }) {
  const field = useRef<HTMLInputElement>(null)
  const submit = (e: Event) => {
    e.preventDefault()
    setToken(field.current?.value ?? '')
    retry()
  }
  return (
    <form class="notice" onSubmit={submit}>
      <Mark state="waiting" />
      <label>
        This console needs its token
        <input ref={field} type="password" autocomplete="off" required />
      </label>
      <button type="submit">Open</button>
    </form>
  )
}
