// How limits stand: those that gateways share among the busiest accounts, or all
// that bind one account.

import { useState } from 'preact/hooks'
import { getLimits, type AccountLimits, type LiveMessage, type TopLimit } from './api'
import { asOf, useAsked, useStaleness } from './asked'
import { compact, countdown, exact, quantity, unit } from './format'
import { Card, Nothing, VerdictTag } from './parts'

const every = 2

/** shared are the exact and leased limits of the busiest accounts, each once, nearest to its end first. */
export function shared(live: Pick<LiveMessage, 'top'> | undefined): TopLimit[] {
  const all = new Map<string, TopLimit>()
  for (const a of live?.top ?? []) for (const l of a.limits) if (l.tier !== 'eventual') all.set(`${l.account} ${l.limit_id}`, l)
  return [...all.values()].sort((a, b) => shareOf(b) - shareOf(a) || a.account.localeCompare(b.account))
}

export interface Parts {
  used: number
  held: number
  dead: number
  free: number
}

/** partsOf an allowance: who has what of it. */
export function partsOf(l: Pick<TopLimit, 'amount' | 'used' | 'remaining' | 'lease'>): Parts {
  const s = l.lease
  if (!s) return { used: l.used, held: 0, dead: 0, free: l.remaining }
  return { used: l.used, held: Math.max(0, s.outstanding - s.dead), dead: s.dead, free: s.free }
}

/** shareOf a limit that is used; 0 where that can't be said. */
export function shareOf(l: Pick<TopLimit, 'amount' | 'used'>): number {
  return l.amount > 0 ? l.used / l.amount : l.used > 0 ? 1 : 0
}

/** ShareBar draws them; what is with gateways is hatched, what is dead is dotted. */
export function ShareBar({ l }: { l: TopLimit }) {
  const p = partsOf(l)
  const whole = Math.max(l.amount, p.used + p.held + p.dead, 1)
  const width = (n: number) => ({ width: `${(100 * n) / whole}%` })
  const held = l.lease ? `, ${exact(p.held)} with gateways, ${exact(p.dead)} dead` : ''
  return (
    <span class={`bar bar-${l.verdict}`} role="meter" aria-valuemin={0} aria-valuemax={l.amount} aria-valuenow={Math.min(p.used, l.amount)} aria-valuetext={`used ${exact(p.used)} of ${exact(l.amount)}${held}`} aria-label={`${l.account}, ${l.limit_id}`}>
      <i style={width(p.used)} />
      <i class="bar-held" style={width(p.held)} />
      <i class="bar-dead" style={width(p.dead)} />
    </span>
  )
}

export function LimitsCard({ live }: { live?: LiveMessage }) {
  const [account, setAccount] = useState('')
  const wanted = account.trim()
  const asked = useAsked<AccountLimits>(wanted, (signal) => getLimits(wanted, signal), { every, first: 0.3 })
  const stale = useStaleness(asked, (a) => a.freshness)
  const rows = wanted ? asked.answer?.limits : live && shared(live)
  const age = wanted ? stale : live && asOf(live.freshness.counters, Date.now(), Date.now())
  const now = (live?.at_unix_micros ?? Date.now() * 1000) / 1e6
  const search = <input type="search" class="filter" placeholder="Account" aria-label="All limits of this account" value={account} onInput={(e) => setAccount(e.currentTarget.value)} />
  return (
    <Card area="limits" title={wanted ? 'Limits' : 'Exact and leased limits'} note={wanted ? 'all that bind this account' : 'of the busiest accounts'} stale={age} actions={search}>
      {rows && rows.length === 0 ? (
        <Nothing>{age ? 'No limit is known.' : wanted ? (asked.answer?.status === 'removed' ? 'The account was removed: its keys are refused.' : 'No limit binds this account.') : 'No busy account has a limit of the tier exact or leased.'}</Nothing>
      ) : rows ? (
        <div class="scroll" tabIndex={0} role="region" aria-label="Limits">
          <table class="limits">
            <thead>
              <tr>
                <th scope="col">Account and limit</th>
                <th scope="col">State</th>
                <th scope="col">Used, with gateways, dead</th>
                <th scope="col" class="num" title="Handed out to gateways that may use it">
                  With gateways
                </th>
                <th scope="col" class="num" title="In leases that ended without their gateway's word: counts as spent until it speaks, or the window ends">
                  Dead
                </th>
                <th scope="col" class="num" title="Can be handed out">
                  Free
                </th>
                <th scope="col" class="num" title="Handed out again although a silent gateway may have used it (tier leased)">
                  Exposure
                </th>
                <th scope="col" class="num" title="Denied although what other gateways held would have sufficed">
                  Denied early
                </th>
              </tr>
            </thead>
            <tbody>
              {rows.map((l) => (
                <LimitRow key={`${l.account} ${l.limit_id}`} l={l} now={now} />
              ))}
            </tbody>
          </table>
        </div>
      ) : null}
    </Card>
  )
}

function LimitRow({ l, now }: { l: TopLimit; now: number }) {
  const p = partsOf(l)
  const s = l.lease
  const q = (n: number) => quantity(l.meter, n)
  const cell = (name: string, n: number | undefined, text = n === undefined ? '–' : q(n)) => (
    <td class="num" data-name={name} title={n === undefined ? '' : exact(n)}>
      {text}
    </td>
  )
  return (
    <tr>
      <th scope="row">
        <span class="account" title={l.account}>
          {l.account}
        </span>
        <span class="under" title={l.limit_id}>
          {l.limit_id}, {l.tier}
        </span>
      </th>
      <td>
        <VerdictTag verdict={l.verdict} />
      </td>
      <td class="use">
        <ShareBar l={l} />
        <span class="under" title={`${exact(p.used)} of ${exact(l.amount)}`}>
          {q(p.used)} of {q(l.amount)} {unit(l.meter)}, {l.window}
          {l.period_end_unix_micros > 0 && `, resets in ${countdown(l.period_end_unix_micros / 1e6 - now)}`}
          {l.verdict === 'deny' && (l.room ?? 0) > 0 && `; calls of up to ${q(l.room!)} may pass`}
        </span>
      </td>
      <td class="num" data-name="with gateways" title={s ? `${exact(p.held)}; ${exact(s.gateways)} ${s.gateways === 1 ? 'gateway has' : 'gateways have'} a lease, ${exact(s.waiting)} wait for units` : ''}>
        {s ? q(p.held) : '–'}
      </td>
      {cell('dead', s?.dead)}
      {cell('free', p.free)}
      {cell('exposure', l.tier === 'leased' ? s?.exposure : undefined)}
      {cell('denied early', s?.denied_early, s && compact(s.denied_early))}
    </tr>
  )
}
