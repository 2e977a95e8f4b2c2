// A stacked area chart over time: uPlot draws, this frames it, makes it reachable
// by keyboard and gives it a table.

import { useEffect, useId, useRef, useState } from 'preact/hooks'
import uPlot from 'uplot'
import 'uplot/dist/uPlot.min.css'
import { compact, exact } from './format'
import { stack } from './model'
import { fill, type Look } from './palette'
import { Swatch } from './parts'

export interface Area {
  key: string
  name: string
  look: Look
  values: number[]
}

interface Props {
  title: string
  /** Unix seconds, one a step. */
  times: number[]
  areas: Area[]
  height: number
  /** How a moment is written in legend and table. */
  moment: (t: number) => string
  /** What one value is, as in "calls/s". */
  unit: string
  /** Summary for who can't see the chart. */
  summary: string
  /** What stands over an empty chart. */
  note?: string
  /** What the legend says while nothing is pointed at. */
  rest: string
  /** The value of an area while nothing is pointed at: its last, or the sum of all. */
  restValue: 'last' | 'sum'
}

function color(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim()
}

export function Chart(p: Props) {
  const box = useRef<HTMLDivElement>(null)
  const plot = useRef<uPlot | undefined>(undefined)
  const shown = useRef(p)
  shown.current = p
  const [at, setAt] = useState<number | null>(null)
  const legend = useId()
  const keys = p.areas.map((a) => a.key).join('\n')

  // Made anew when the areas change, and when the colours do.
  const [scheme, setScheme] = useState(0)
  useEffect(() => {
    const dark = matchMedia('(prefers-color-scheme: dark)')
    const turn = () => setScheme((n) => n + 1)
    dark.addEventListener('change', turn)
    return () => dark.removeEventListener('change', turn)
  }, [])

  useEffect(() => {
    const el = box.current
    if (!el) return
    const areas = shown.current.areas
    const axis = color('--faint-text')
    const grid = color('--line')
    const font = `11px ${getComputedStyle(document.body).fontFamily}`
    const u = new uPlot(
      {
        width: el.clientWidth || 300,
        height: shown.current.height,
        padding: [8, 4, 0, 0],
        legend: { show: false },
        cursor: { y: false, drag: { x: false, y: false }, points: { show: false } },
        scales: { x: { time: true }, y: { range: (_u, _min, max) => [0, Math.max(max * 1.08, 1)] } },
        axes: [
          { stroke: axis, font, grid: { show: false }, ticks: { show: false }, size: 26, space: 58, values: (_u, ticks) => ticks.map((t) => shown.current.moment(t)) },
          { stroke: axis, font, grid: { stroke: grid, width: 1 }, ticks: { show: false }, size: 44, gap: 4, values: (_u, ticks) => ticks.map((v) => compact(v)) },
        ],
        // Drawn from the top of the stack down, each area over the one before,
        // so that a fill needs no lower edge.
        series: [
          {},
          ...[...areas].reverse().map((a) => ({
            label: a.name,
            stroke: a.look.color,
            width: 1,
            fill: (self: uPlot) => fill(self.ctx, a.look),
            points: { show: false },
            paths: uPlot.paths.stepped!({ align: 1 }),
          })),
        ],
        hooks: { setCursor: [(self) => setAt(self.cursor.idx ?? null)] },
      },
      data(shown.current),
      el,
    )
    plot.current = u
    const watch = new ResizeObserver(() => {
      if (el.clientWidth > 0 && el.clientWidth !== u.width) u.setSize({ width: el.clientWidth, height: shown.current.height })
    })
    watch.observe(el)
    return () => {
      watch.disconnect()
      u.destroy()
      plot.current = undefined
    }
  }, [keys, scheme])

  useEffect(() => {
    plot.current?.setData(data(p))
  }, [p.times, p.areas])

  const index = at !== null && at < p.times.length ? at : null
  const valueOf = (a: Area) =>
    index !== null ? (a.values[index] ?? 0) : p.restValue === 'last' ? (a.values.at(-1) ?? 0) : a.values.reduce((n, v) => n + v, 0)

  const onKey = (e: KeyboardEvent) => {
    const last = p.times.length - 1
    if (last < 0) return
    const now = index ?? last
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last }[e.key]
    if (e.key === 'Escape') return setAt(null)
    if (to === undefined) return
    e.preventDefault()
    const i = Math.min(last, Math.max(0, to))
    setAt(i)
    const u = plot.current
    if (u) u.setCursor({ left: u.valToPos(p.times[i]!, 'x'), top: 10 }, false)
  }

  return (
    <div class="chart">
      <div
        class="chart-box"
        style={{ height: `${p.height}px` }}
        ref={box}
        tabIndex={0}
        role="group"
        aria-roledescription="chart"
        aria-label={`${p.title}. ${p.summary} Arrow keys read single values.`}
        aria-describedby={legend}
        onKeyDown={onKey}
        onBlur={() => setAt(null)}
      >
        {p.note && <p class="chart-note">{p.note}</p>}
      </div>
      <div class="legend" id={legend} aria-live="off">
        <span class="legend-when">{index !== null ? p.moment(p.times[index]!) : p.rest}</span>
        <ul>
          {p.areas.map((a) => (
            <li key={a.key}>
              <Swatch look={a.look} />
              <span class="legend-name">{a.name}</span>
              <b title={exact(valueOf(a))}>{compact(valueOf(a))}</b>
            </li>
          ))}
        </ul>
      </div>
      <Table {...p} />
    </div>
  )
}

function data(p: Props): uPlot.AlignedData {
  const tops = stack(p.areas.map((a) => a.values))
  return [p.times, ...tops.reverse()]
}

const tableRows = 60

/** Table is the chart in words; only made when it is opened. */
function Table(p: Props) {
  const [open, setOpen] = useState(false)
  const rows = p.times.map((t, i) => ({ t, i })).filter(({ i }) => p.areas.some((a) => (a.values[i] ?? 0) > 0))
  return (
    <details class="as-table" onToggle={(e) => setOpen((e.currentTarget as HTMLDetailsElement).open)}>
      <summary>Show as a table</summary>
      {open && (
        <div class="table-scroll" tabIndex={0} role="region" aria-label={`${p.title} as a table`}>
          <table>
            <caption>
              {p.title}, {p.unit}; newest first, steps without calls left out
            </caption>
            <thead>
              <tr>
                <th scope="col">Time</th>
                {p.areas.map((a) => (
                  <th scope="col" class="num" key={a.key}>
                    {a.name}
                  </th>
                ))}
              </tr>
            </thead>
            <tbody>
              {rows
                .reverse()
                .slice(0, tableRows)
                .map(({ t, i }) => (
                  <tr key={t}>
                    <th scope="row">{p.moment(t)}</th>
                    {p.areas.map((a) => (
                      <td class="num" key={a.key}>
                        {exact(a.values[i] ?? 0)}
                      </td>
                    ))}
                  </tr>
                ))}
            </tbody>
          </table>
        </div>
      )}
    </details>
  )
}
