// What was corrected: by whom, when, why, and what it changed.

import { useState } from 'preact/hooks'
import { getCorrections, type Correction, type Corrections } from './api'
import { useAsked, useStaleness } from './asked'
import { exact, moment, quantity, unit } from './format'
import { Card, CopyID, Nothing } from './parts'

const every = 15

/** effectOf says what a correction changes: "−3 calls, +1.2k tokens out". */
export function effectOf(c: Pick<Correction, 'adjustments'>): string {
  return Object.entries(c.adjustments)
    .map(([meter, n]) => `${n < 0 ? '−' : '+'}${quantity(meter, Math.abs(n))} ${unit(meter)}`)
    .join(', ')
}

export function CorrectionsCard() {
  const [account, setAccount] = useState('')
  const wanted = account.trim()
  const asked = useAsked<Corrections>(`of ${wanted}`, (signal) => getCorrections(wanted, signal), { every, first: wanted ? 0.3 : 0 })
  const list = asked.answer?.corrections
  const stale = useStaleness(asked, (c) => c.freshness)
  const search = <input type="search" class="filter" placeholder="Account" aria-label="Only of this account" value={account} onInput={(e) => setAccount(e.currentTarget.value)} />
  return (
    <Card area="corrections" title="Corrections" stale={stale} actions={search}>
      {list && list.length === 0 ? (
        <Nothing>{wanted ? 'No usage of this account was corrected.' : 'No usage was corrected.'}</Nothing>
      ) : (
        <div class="scroll" tabIndex={0} role="region" aria-label="Corrections">
          <ul class="lines">
            {(list ?? []).map((c) => (
              <li key={c.id}>
                <span class="line-text">
                  <span title={Object.entries(c.adjustments).map(([m, n]) => `${m} ${exact(n)}`).join(', ')}>
                    <b>{effectOf(c)}</b> of <span class="account">{c.account}</span>: {c.reason}
                  </span>
                  <span class="under">
                    {c.author}, {moment(c.stream_time_unix_micros / 1e6)}, for usage of {moment(c.time_unix_micros / 1e6)}
                    {c.reference && `, ${c.reference}`}
                  </span>
                </span>
                <CopyID id={c.id} what="correction id" />
              </li>
            ))}
          </ul>
        </div>
      )}
    </Card>
  )
}
