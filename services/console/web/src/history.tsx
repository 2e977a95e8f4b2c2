// The chart out of ClickHouse.

import { useMemo, useState } from 'preact/hooks'
import { getHistory, type Group, type History } from './api'
import { useAsked, useStaleness } from './asked'
import { Chart, type Area } from './chart'
import { clock, codeName, compact, moment } from './format'
import { lookOfCode, lookOfSeries } from './palette'
import { Card, Choice } from './parts'

const ranges = {
  '15m': { name: '15 min', span: 15 * 60, every: 10 },
  '6h': { name: '6 h', span: 6 * 3600, every: 30 },
  '7d': { name: '7 d', span: 7 * 86400, every: 120 },
} as const

type Range = keyof typeof ranges

/** areasOf turns an answer into areas: calls, admitted and refused together unless told apart by code. */
export function areasOf(h: History): Area[] {
  return h.series.map((s, n) => ({
    key: `${s.other ? 'other' : 'is'} ${s.name}`,
    name: s.other ? 'All others' : h.group === 'code' ? codeName(s.name) : s.name || 'none given',
    look: h.group === 'code' && !s.other ? lookOfCode(s.name) : lookOfSeries(n, s.other),
    values: s.admitted.map((v, i) => v + (s.refused[i] ?? 0)),
  }))
}

export function HistoryCard() {
  const [range, setRange] = useState<Range>('15m')
  const [group, setGroup] = useState<Group>('code')
  const asked = useAsked<History>(`${range} ${group}`, (signal) => getHistory(ranges[range].span, group, signal), ranges[range])
  const { answer, error } = asked
  const stale = useStaleness(asked, (h) => h.freshness)

  const areas = useMemo(() => (answer ? areasOf(answer) : []), [answer])
  const times = useMemo(() => (answer ? Array.from({ length: answer.steps }, (_, i) => answer.from_unix_seconds + i * answer.step_seconds) : []), [answer])
  const sum = areas.reduce((n, a) => n + a.values.reduce((m, v) => m + v, 0), 0)
  const long = range === '7d'

  return (
    <Card
      area="history"
      title="History"
      note={answer ? `${compact(sum)} calls, ${step(answer.step_seconds)} steps` : undefined}
      stale={answer ? stale : undefined}
      actions={
        <>
          <Choice label="Split by" value={group} options={[{ value: 'code', name: 'Code' }, { value: 'model', name: 'Model' }, { value: 'account', name: 'Account' }]} onChange={setGroup} />
          <Choice label="Range" value={range} options={(Object.keys(ranges) as Range[]).map((r) => ({ value: r, name: ranges[r].name }))} onChange={setRange} />
        </>
      }
    >
      <Chart
        title="Calls over time"
        times={times}
        areas={areas}
        height={288}
        moment={long ? moment : (t) => clock(t, (answer?.step_seconds ?? 60) < 60)}
        unit={`calls in ${step(answer?.step_seconds ?? 0)}`}
        summary={answer ? `${compact(sum)} calls in the last ${ranges[range].name}, split by ${group}. ${stale}` : 'Not known yet.'}
        note={!answer && error ? `No history: ${error}` : answer && sum === 0 ? 'No calls in this time.' : answer ? undefined : 'Asking ClickHouse…'}
        rest={`last ${ranges[range].name}`}
        restValue="sum"
      />
    </Card>
  )
}

function step(seconds: number): string {
  if (seconds < 60) return `${seconds} s`
  if (seconds < 3600) return `${seconds / 60} min`
  if (seconds < 86400) return `${seconds / 3600} h`
  return `${seconds / 86400} d`
}
