// The conservation audit: four points, held against each other.

import { getAudit, type Audit, type Finding, type Pair, type State } from './api'
import { useAsked, useStaleness } from './asked'
import { ago, compact, exact } from './format'
import { Card, Mark, Nothing } from './parts'

const pairs: Record<Pair, string> = {
  'gateway-ledger': 'Sent by gateways, in the ledger',
  'ledger-counters': 'In the ledger, in the counters',
  'ledger-history': 'In the ledger, in ClickHouse',
}

const kinds: Record<Finding['kind'], string> = { gap: 'Missing', double: 'Doubled', sum: 'Changed' }

const every = 5

/** stateOf a pair: what was said of it while it can't be asked again is not known to hold. */
export function stateOf(p: Pick<Audit['points'][number], 'state'>, current: boolean): State {
  return current || p.state !== 'ok' ? p.state : 'unknown'
}

export function AuditCard() {
  const asked = useAsked<Audit>('audit', getAudit, { every })
  const a = asked.answer
  const stale = useStaleness(asked, (x) => x.freshness)
  const current = asked.error === ''
  const note = a && current && a.state === 'ok' ? `${compact(a.checked_cells)} accounts and minutes compared, all agree` : a && current && a.state === 'down' ? a.detail : undefined
  const now = (a?.at_unix_micros ?? 0) / 1e6
  return (
    <Card area="audit" title="Conservation" note={note} stale={stale}>
      <ul class="pairs" aria-label="Points that are compared">
        {(a?.points ?? []).map((p) => (
          <li key={p.pair} title={p.detail}>
            <Mark state={stateOf(p, current)} />
            <span>
              {pairs[p.pair] ?? p.pair}
              <span class="under">
                {p.open > 0 ? `${exact(p.open)} ${p.open === 1 ? 'finding' : 'findings'}` : p.state === 'ok' ? (current ? 'agree' : 'agreed then') : p.detail}
              </span>
            </span>
          </li>
        ))}
      </ul>
      {a && a.findings.length === 0 ? (
        <Nothing>{a.state === 'unknown' ? 'No auditor has said anything yet.' : current && a.state === 'ok' ? 'No call is missing, doubled or changed.' : 'Nothing was found to be missing, doubled or changed by then.'}</Nothing>
      ) : (
        <div class="scroll" tabIndex={0} role="region" aria-label="Findings of the conservation audit">
          <ul class="lines">
            {(a?.findings ?? []).map((f) => (
              <li key={f.id}>
                <span class={`tag ${f.resolved_at_unix_micros ? 'tag-ok' : 'tag-down'}`}>
                  <Mark state={f.resolved_at_unix_micros ? 'ok' : 'down'} />
                  {f.resolved_at_unix_micros ? 'Healed' : (kinds[f.kind] ?? f.kind)}
                </span>
                <span class="line-text">
                  {f.text}
                  <span class="under">
                    {pairs[f.pair] ?? f.pair}, found {ago(now - f.first_seen_unix_micros / 1e6)}
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
