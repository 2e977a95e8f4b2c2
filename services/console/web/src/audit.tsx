// The conservation audit: four points, held against each other.

import { useEffect, useState } from 'preact/hooks'
import { getAudit, type Audit, type Finding, type Pair, type State } from './api'
import { ago, compact, exact } from './format'
import { Card, Mark, Nothing } from './parts'

const pairs: Record<Pair, string> = {
  'gateway-ledger': 'Sent by gateways, in the ledger',
  'ledger-counters': 'In the ledger, in the counters',
  'ledger-history': 'In the ledger, in ClickHouse',
}

const kinds: Record<Finding['kind'], string> = { gap: 'Missing', double: 'Doubled', sum: 'Changed' }

const every = 5

/** stateOf a pair: what holds is worse than what can't be asked. */
export function stateOf(p: Audit['points'][number]): State {
  return p.open > 0 ? 'down' : p.ok ? 'ok' : 'waiting'
}

export function AuditCard() {
  const [a, setAudit] = useState<Audit>()
  const [error, setError] = useState('')
  useEffect(() => {
    const abort = new AbortController()
    let timer: ReturnType<typeof setTimeout>
    const load = async () => {
      try {
        setAudit(await getAudit(abort.signal))
        setError('')
      } catch (e) {
        if (abort.signal.aborted) return
        setError(e instanceof TypeError ? 'The console does not answer.' : e instanceof Error ? e.message : String(e))
      }
      timer = setTimeout(() => void load(), every * 1000)
    }
    void load()
    return () => {
      abort.abort()
      clearTimeout(timer)
    }
  }, [])
  const note = error || (a ? (a.state === 'ok' ? `${compact(a.checked_cells)} accounts and minutes compared, all agree` : a.detail) : undefined)
  const now = (a?.at_unix_micros ?? 0) / 1e6
  return (
    <Card area="audit" title="Conservation" note={note}>
      <ul class="pairs" aria-label="Points that are compared">
        {(a?.points ?? []).map((p) => (
          <li key={p.pair} title={p.detail}>
            <Mark state={stateOf(p)} />
            <span>
              {pairs[p.pair]}
              <span class="under">{p.open > 0 ? `${exact(p.open)} ${p.open === 1 ? 'finding' : 'findings'}` : p.ok ? 'agree' : p.detail}</span>
            </span>
          </li>
        ))}
      </ul>
      {a && a.findings.length === 0 ? (
        <Nothing>{a.state === 'unknown' ? 'No auditor has said anything yet.' : 'No call is missing, doubled or changed.'}</Nothing>
      ) : (
        <div class="scroll" tabIndex={0} role="region" aria-label="Findings of the conservation audit">
          <ul class="lines">
            {(a?.findings ?? []).map((f) => (
              <li key={f.id}>
                <span class={`tag ${f.resolved_at_unix_micros ? 'tag-ok' : 'tag-down'}`}>
                  <Mark state={f.resolved_at_unix_micros ? 'ok' : 'down'} />
                  {f.resolved_at_unix_micros ? 'Healed' : kinds[f.kind]}
                </span>
                <span class="line-text">
                  {f.text}
                  <span class="under">
                    {pairs[f.pair]}, found {ago(now - f.first_seen_unix_micros / 1e6)}
                  </span>
                </span>
              </li>
            ))}
          </ul>
        </div>
      )}
    </Card>
  )
}
