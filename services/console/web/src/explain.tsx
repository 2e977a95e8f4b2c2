// Why a call was refused: what led to a decision, and whether the ledger gives it again.

import { useRef, useState } from 'preact/hooks'
import { getExplanation, type Explanation } from './api'
import { clock, exact, moment, unit } from './format'
import { Card, Mark, Nothing, VerdictTag } from './parts'

/** howItEnded names a call that broke off, and usage that is an estimate. */
function howItEnded(c: { ending?: string; estimated?: boolean }): string {
  const ended = c.ending === 'client_left' ? 'client left' : c.ending === 'upstream_failed' ? 'upstream failed' : ''
  const said = [ended, c.estimated ? 'estimate' : ''].filter((s) => s !== '').join(', ')
  return said === '' ? '' : ` (${said})`
}

/** factsOf an explanation, in words. */
export function factsOf(e: Explanation): [string, string][] {
  const d = e.decision
  const facts: [string, string][] = [
    ['Limit', `${exact(e.limit.amount)} ${unit(e.limit.meter)}, ${e.limit.window}, tier ${e.limit.tier}, of plans version ${e.limit.plan_version}`],
    ['Decided', `${moment(d.decided_at_unix_micros / 1e6)}, at ${exact(d.used)} of ${exact(d.amount)}`],
    ['Ledger', `shard ${e.entry.shard}, entry ${e.entry.sequence} (${e.entry.kind})`],
    ['Counter', `${exact(e.counter.before)} before that entry, ${exact(e.counter.after)} after it; fed by ${exact(e.fed.calls)} calls${e.fed.adjusted ? `, corrected by ${exact(e.fed.adjusted)}` : ''}`],
  ]
  const a = e.allowance
  if (a) facts.push(['Leases', `${exact(a.settled)} used, ${exact(a.outstanding)} with gateways, ${exact(a.dead)} of it dead, ${exact(a.exposure)} exposed`])
  return facts
}

export function ExplainCard() {
  const [id, setID] = useState('')
  const [found, setFound] = useState<Explanation>()
  const [note, setNote] = useState('')
  const asked = useRef(0)
  const submit = async (event: Event) => {
    event.preventDefault()
    const wanted = id.trim()
    if (!wanted) return
    const mine = ++asked.current
    setFound(undefined)
    setNote('Replaying the ledger…')
    try {
      const e = await getExplanation(wanted)
      if (mine !== asked.current) return // another was asked for since
      setFound(e)
      setNote('')
    } catch (e) {
      if (mine !== asked.current) return
      setNote(e instanceof TypeError ? 'The console does not answer.' : e instanceof Error ? e.message : String(e))
    }
  }
  const form = (
    <form class="explain-form" onSubmit={(e) => void submit(e)}>
      <input type="search" class="filter" placeholder="Decision id" aria-label="Decision id of a refusal" value={id} onInput={(e) => setID(e.currentTarget.value)} />
      <button type="submit">Explain</button>
    </form>
  )
  return (
    <Card area="explain" title="Why was it refused?" note={note || undefined} actions={form}>
      {found ? (
        <div aria-live="polite">
          <p class="explain-reason">
            <VerdictTag verdict={found.decision.verdict} /> <b>{found.decision.limit_id}</b> of <span class="account">{found.decision.account}</span>: {found.reason.text}
          </p>
          <dl class="facts">
            {factsOf(found).map(([name, text]) => (
              <div key={name}>
                <dt>{name}</dt>
                <dd>{text}</dd>
              </div>
            ))}
            {found.calls.length > 0 && (
              <div>
                <dt>Last calls</dt>
                <dd>
                  {found.calls
                    .slice(0, 5)
                    .map((c) => `${clock(c.time_unix_micros / 1e6)} ${c.account} +${exact(c.adds)} → ${exact(c.used_after)}${howItEnded(c)}`)
                    .join('; ')}
                </dd>
              </div>
            )}
          </dl>
          <p class="explain-replay">
            <Mark state={found.replay.same ? 'ok' : 'down'} /> {found.replay.text} ({exact(found.replay.entries)} entries)
          </p>
        </div>
      ) : (
        !note && <Nothing>Paste the decision_id of a 402, its request_id, or that of a recent refusal above.</Nothing>
      )}
    </Card>
  )
}
