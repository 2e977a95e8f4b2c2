// The cards that the live stream feeds.

import { useMemo } from 'preact/hooks'
import type { Alert, LiveMessage, Refusal, Second, TopAccount, TopLimit } from './api'
import { asOf } from './asked'
import { Chart, type Area } from './chart'
import { ago, clock, codeName, compact, countdown, exact, percent, quantity, rate, unit } from './format'
import { ShareBar, shareOf } from './limits'
import { byCode, rates, refusedIn } from './model'
import { lookOfCode } from './palette'
import { Card, CopyID, Mark, Nothing, Swatch, VerdictTag } from './parts'

/** age of a part of the live message, which is of now itself. */
function ageOf(live: LiveMessage | undefined, part: keyof LiveMessage['freshness']): string {
  return live ? asOf(live.freshness[part], 0, 0) : ''
}

export function Figures({ seconds, live }: { seconds: Second[]; live?: LiveMessage }) {
  const r = rates(seconds)
  const figure = (name: string, value: string, note: string, kind = '') => (
    <div class={`figure ${kind}`}>
      <dt>{name}</dt>
      <dd>
        <b>{value}</b>
        <span>{note}</span>
      </dd>
    </div>
  )
  const lag = live?.lag
  const calls = live?.freshness.calls.current
  const unknown = 'not known now'
  return (
    <dl class="figures" aria-label="Right now">
      {figure('Calls a second', calls ? rate(r.calls) : '–', live && !calls ? unknown : 'mean of 5 s')}
      {figure('Refused a second', calls ? rate(r.refused) : '–', calls ? `${percent(r.refused, r.calls)} of calls` : live ? unknown : ' ', calls && r.refused > 0 ? 'is-refused' : '')}
      {figure('Tokens a second', calls ? rate(r.tokens) : '–', live && !calls ? unknown : 'in and out')}
      {figure('Limits used up', live?.freshness.decisions.current ? exact(live.decisions.deny) : '–', live ? (live.freshness.decisions.current ? `${exact(live.decisions.warn)} near their limit` : unknown) : ' ')}
      {figure('Counted behind', lag?.counted_known ? (lag.counted_seconds < 0.05 ? '0 s' : `${lag.counted_seconds.toFixed(1)} s`) : '–', lag ? (lag.history_known ? lag.history_entries === 0 ? 'history up to date' : `history ${compact(lag.history_entries)} behind` : 'history unknown') : ' ')}
    </dl>
  )
}

export function LiveCard({ seconds, live }: { seconds: Second[]; live?: LiveMessage }) {
  const { times, areas } = useMemo(() => {
    const codes = byCode(seconds).map((c) => c.code)
    // A fixed order, so that areas don't change places.
    codes.sort()
    const areas: Area[] = [
      { key: 'admitted', name: 'Admitted', look: lookOfCode(''), values: seconds.map((s) => s.admitted) },
      ...codes.map((c) => ({ key: c, name: codeName(c), look: lookOfCode(c), values: seconds.map((s) => s.refused[c] ?? 0) })),
    ]
    return { times: seconds.map((s) => s.t), areas }
  }, [seconds])
  const r = rates(seconds)
  const age = ageOf(live, 'calls')
  const quiet = seconds.length > 0 && seconds.every((s) => s.admitted === 0 && refusedIn(s) === 0)
  return (
    <Card area="live" title="Live calls" note="a second, last 5 minutes" stale={age}>
      <Chart
        title="Live calls"
        times={times}
        areas={areas}
        height={232}
        moment={(t) => clock(t)}
        unit="calls a second"
        summary={age || `${rate(r.calls)} calls a second now, ${rate(r.refused)} of them refused.`}
        note={seconds.length === 0 ? 'Waiting for the ledger…' : quiet && !age ? 'No calls in the last 5 minutes.' : undefined}
        rest="last second"
        restValue="last"
      />
    </Card>
  )
}

export function CodesCard({ seconds, live }: { seconds: Second[]; live?: LiveMessage }) {
  const age = ageOf(live, 'calls')
  const five = byCode(seconds)
  const minute = new Map(byCode(seconds.slice(-60)).map((c) => [c.code, c.count]))
  const most = five[0]?.count ?? 0
  const all = five.reduce((n, c) => n + c.count, 0)
  return (
    <Card area="codes" title="Refused by code" note="last 5 minutes" stale={age}>
      {five.length === 0 ? (
        seconds.length > 0 && !age && <Nothing>Nothing was refused.</Nothing>
      ) : (
        <table class="codes">
          <thead>
            <tr>
              <th scope="col">Code</th>
              <th scope="col" class="num">
                1 min
              </th>
              <th scope="col" class="num">
                5 min
              </th>
              <th scope="col" class="num">
                Share
              </th>
            </tr>
          </thead>
          <tbody>
            {five.slice(0, 7).map((c) => (
              <tr key={c.code}>
                <th scope="row">
                  <span class="code-name">
                    <Swatch look={lookOfCode(c.code)} />
                    <span title={c.code}>{codeName(c.code)}</span>
                  </span>
                  <span class="code-bar" aria-hidden="true">
                    <i style={{ width: `${(100 * c.count) / most}%`, background: lookOfCode(c.code).color }} />
                  </span>
                </th>
                <td class="num" title={exact(minute.get(c.code) ?? 0)}>
                  {compact(minute.get(c.code) ?? 0)}
                </td>
                <td class="num" title={exact(c.count)}>
                  {compact(c.count)}
                </td>
                <td class="num">{percent(c.count, all)}</td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
    </Card>
  )
}

/** tightest is the limit that is nearest to its end. */
export function tightest(limits: TopLimit[]): TopLimit | undefined {
  return [...limits].sort((a, b) => shareOf(b) - shareOf(a))[0]
}

export function AccountsCard({ live }: { live?: LiveMessage }) {
  const rows = live?.top ?? []
  return (
    <Card area="accounts" title="Busiest accounts" note="each with the tightest limit that binds it" stale={ageOf(live, 'counters')}>
      {live && rows.length === 0 ? (
        <Nothing>No account has made a call yet.</Nothing>
      ) : (
        <table class="accounts">
          <thead>
            <tr>
              <th scope="col">Account</th>
              <th scope="col">State</th>
              <th scope="col">Used of its limit</th>
              <th scope="col" class="num">
                Left
              </th>
              <th scope="col" class="num">
                Resets in
              </th>
            </tr>
          </thead>
          <tbody>
            {rows.map((a) => (
              <AccountRow key={a.id} a={a} now={live!.at_unix_micros / 1e6} />
            ))}
          </tbody>
        </table>
      )}
    </Card>
  )
}

function AccountRow({ a, now }: { a: TopAccount; now: number }) {
  const l = tightest(a.limits)
  const end = l && l.period_end_unix_micros > 0 ? l.period_end_unix_micros / 1e6 - now : undefined
  const unknown = l ? '' : asOf(a.freshness, 0, 0)
  return (
    <tr>
      <th scope="row">
        <span class="account" title={a.id}>
          {a.id}
        </span>
        <span class="under">{a.status === 'removed' ? 'its keys are refused' : l && l.account !== a.id ? `shares ${l.account}’s limit` : a.plan ? `plan ${a.plan}` : 'no plan'}</span>
      </th>
      <td>
        <VerdictTag verdict={a.verdict} status={a.status} />
      </td>
      <td class="use">
        {l ? (
          <>
            <ShareBar l={l} />
            <span class="under" title={`${l.account}, ${l.limit_id}: ${exact(l.used)} of ${exact(l.amount)}`}>
              {quantity(l.meter, l.used)} of {quantity(l.meter, l.amount)} {unit(l.meter)}, {l.window}
              {l.tier !== 'eventual' && `, ${l.tier}`}
            </span>
          </>
        ) : (
          <span class="under" title={unknown}>
            {unknown ? 'limits not known' : 'no limit'}
          </span>
        )}
      </td>
      <td class="num left" data-name="left" title={l ? exact(l.remaining) : ''}>
        {l ? quantity(l.meter, l.remaining) : '–'}
      </td>
      <td class="num" data-name="resets in">
        {end === undefined ? '–' : countdown(end)}
      </td>
    </tr>
  )
}

export function RefusalsCard({ live }: { live?: LiveMessage }) {
  const rows: Refusal[] = live?.refusals ?? []
  return (
    <Card area="refusals" title="Recent refusals" stale={ageOf(live, 'calls')}>
      {live && rows.length === 0 && live.freshness.calls.current ? (
        <Nothing>No call was refused lately.</Nothing>
      ) : (
        <div class="scroll" tabIndex={0} role="region" aria-label="Recent refusals">
          <table class="refusals">
            <thead>
              <tr>
                <th scope="col">Time</th>
                <th scope="col">Account</th>
                <th scope="col">Why</th>
                <th scope="col">Decision</th>
              </tr>
            </thead>
            <tbody>
              {rows.map((r) => (
                <tr key={`${r.ledger_sequence} ${r.account} ${r.code} ${r.time_unix_micros}`}>
                  <td class="num when">{clock(r.time_unix_micros / 1e6)}</td>
                  <td>
                    <span class="account" title={r.account}>
                      {r.account}
                    </span>
                    {r.count > 1 && <span class="times">×{compact(r.count)}</span>}
                  </td>
                  <td>
                    <span class="code-name">
                      <Swatch look={lookOfCode(r.code)} />
                      <span title={`${r.status} ${r.code}`}>{codeName(r.code)}</span>
                    </span>
                  </td>
                  <td>{r.decision_id ? <CopyID id={r.decision_id} what="decision id" /> : <span class="under">none</span>}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
    </Card>
  )
}

export function AlertsCard({ live }: { live?: LiveMessage }) {
  const rows: Alert[] = live?.alerts ?? []
  const firing = rows.filter((a) => a.transition === 'firing').length
  const now = (live?.at_unix_micros ?? 0) / 1e6
  return (
    <Card area="alerts" title="Alerts" note={live && live.freshness.alerts.current ? (firing > 0 ? `${firing} firing` : 'none firing') : undefined} stale={ageOf(live, 'alerts')}>
      {live && rows.length === 0 && live.freshness.alerts.current ? (
        <Nothing>No alert so far.</Nothing>
      ) : (
        <ul class="lines">
          {rows.slice(0, 5).map((a) => (
            <li key={a.episode_id}>
              <span class={`tag ${a.transition === 'firing' ? 'tag-down' : 'tag-ok'}`}>
                <Mark state={a.transition === 'firing' ? 'down' : 'ok'} />
                {a.transition === 'firing' ? 'Firing' : 'Resolved'}
              </span>
              <span class="line-text">
                {a.summary}
                <span class="under">
                  {a.rule}, {a.scope}, {ago(now - a.at_unix_micros / 1e6)}
                </span>
              </span>
            </li>
          ))}
        </ul>
      )}
    </Card>
  )
}

export function DeadLettersCard({ live }: { live?: LiveMessage }) {
  const dead = live?.dead_letters
  return (
    <Card area="dead" title="Dead letters" note={dead ? (dead.total === 0 ? 'none' : `${exact(dead.total)} kept`) : undefined} stale={ageOf(live, 'dead_letters')}>
      {dead && live.freshness.dead_letters.current && dead.total === 0 && dead.newest.length === 0 ? (
        <Nothing>Everything that arrived could be counted.</Nothing>
      ) : (
        <>
          <ul class="reasons">
            {(dead?.by_reason ?? []).slice(0, 4).map((r) => (
              <li key={r.reason}>
                {r.reason} <b>{compact(r.count)}</b>
              </li>
            ))}
          </ul>
          <ul class="lines">
            {(dead?.newest ?? []).slice(0, 3).map((d) => (
              <li key={d.sequence}>
                <span class="line-text">
                  <span class="clip" title={d.detail}>
                    {d.detail || d.reason}
                  </span>
                  <span class="under">
                    {clock(Date.parse(d.time) / 1000)}, from {d.origin || 'unknown'}
                  </span>
                </span>
              </li>
            ))}
          </ul>
        </>
      )}
    </Card>
  )
}
