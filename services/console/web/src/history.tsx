// The chart out of ClickHouse.

import { useEffect, useMemo, useState } from 'preact/hooks'
import { getHistory, type Group, type History } from './api'
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
  const [answer, setAnswer] = useState<History>()
  const [error, setError] = useState('')

  useEffect(() => {
    const abort = new AbortController()
    let timer: ReturnType<typeof setTimeout>
    const load = async () => {
      let pause: number = ranges[range].every
      try {
        const h = await getHistory(ranges[range].span, group, abort.signal)
        setAnswer(h)
        setError('')
      } catch (e) {
        if (abort.signal.aborted) return
        setError(e instanceof TypeError ? 'The console does not answer.' : e instanceof Error ? e.message : String(e))
        pause = Math.min(pause, 10)
      }
      timer = setTimeout(() => void load(), pause * 1000)
    }
    void load()
    return () => {
      abort.abort()
      clearTimeout(timer)
    }
  }, [range, group])

  const areas = useMemo(() => (answer ? areasOf(answer) : []), [answer])
  const times = useMemo(() => (answer ? Array.from({ length: answer.steps }, (_, i) => answer.from_unix_seconds + i * answer.step_seconds) : []), [answer])
  const sum = areas.reduce((n, a) => n + a.values.reduce((m, v) => m + v, 0), 0)
  const long = range === '7d'

  return (
    <Card
      area="history"
      title="History"
      note={answer && !error ? `${compact(sum)} calls, ${step(answer.step_seconds)} steps` : undefined}
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
        summary={`${compact(sum)} calls in the last ${ranges[range].name}, split by ${group}.`}
        note={error ? `No history: ${error}` : answer && sum === 0 ? 'No calls in this time.' : answer ? undefined : 'Asking ClickHouse…'}
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
