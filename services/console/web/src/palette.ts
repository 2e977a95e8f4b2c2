// Okabe and Ito's colours, told apart by most people with a colour vision
// deficiency; a pattern beside each, so that colour is never the only sign.

export type Pattern = 'plain' | 'rise' | 'fall' | 'dots' | 'lines' | 'bars' | 'cross'

export interface Look {
  color: string
  pattern: Pattern
}

const blue = '#0072b2'
const sky = '#56b4e9'
const green = '#009e73'
const orange = '#e69f00'
const vermillion = '#d55e00'
const purple = '#cc79a7'
const yellow = '#f0e442'
const grey = '#8a8f98'

const codes: Record<string, Look> = {
  '': { color: blue, pattern: 'plain' },
  QUOTA_EXCEEDED: { color: vermillion, pattern: 'rise' },
  RATE_LIMITED: { color: orange, pattern: 'dots' },
  SPEND_CAP_REACHED: { color: purple, pattern: 'fall' },
  CREDITS_DEPLETED: { color: yellow, pattern: 'lines' },
  CREDITS_INSUFFICIENT: { color: yellow, pattern: 'bars' },
  SUBSCRIPTION_EXPIRED: { color: green, pattern: 'cross' },
  TRIAL_ENDED: { color: green, pattern: 'dots' },
  PAYMENT_FAILED: { color: sky, pattern: 'rise' },
  PLAN_REQUIRED: { color: sky, pattern: 'lines' },
  COST_EXCEEDS_LIMIT: { color: purple, pattern: 'cross' },
  BILLING_STATE_UNKNOWN: { color: grey, pattern: 'cross' },
}

const other: Look = { color: grey, pattern: 'rise' }

/** lookOfCode is the look of a refusal code; the empty code is admitted. */
export function lookOfCode(code: string): Look {
  return codes[code] ?? other
}

const series: Look[] = [
  { color: blue, pattern: 'plain' },
  { color: orange, pattern: 'rise' },
  { color: green, pattern: 'dots' },
  { color: purple, pattern: 'fall' },
  { color: sky, pattern: 'lines' },
  { color: vermillion, pattern: 'bars' },
  { color: yellow, pattern: 'cross' },
  { color: green, pattern: 'rise' },
  { color: blue, pattern: 'dots' },
  { color: orange, pattern: 'lines' },
]

/** lookOfSeries is the look of the n-th group of a chart. */
export function lookOfSeries(n: number, isOther: boolean): Look {
  return isOther ? other : series[n % series.length]!
}

/** strokes are the lines of a pattern on an 8 x 8 tile. */
export function strokes(p: Pattern): [number, number, number, number][] {
  switch (p) {
    case 'plain':
      return []
    case 'rise':
      return [[-2, 10, 10, -2], [-2, 2, 2, -2], [6, 10, 10, 6]]
    case 'fall':
      return [[-2, -2, 10, 10], [6, -2, 10, 2], [-2, 6, 2, 10]]
    case 'dots':
      return [[1.5, 2, 2.5, 2], [5.5, 6, 6.5, 6]]
    case 'lines':
      return [[0, 2, 8, 2], [0, 6, 8, 6]]
    case 'bars':
      return [[2, 0, 2, 8], [6, 0, 6, 8]]
    case 'cross':
      return [[0, 4, 8, 4], [4, 0, 4, 8]]
  }
}

const tiles = new Map<string, CanvasPattern | string>()

/** fill is a canvas fill of a look. */
export function fill(ctx: CanvasRenderingContext2D, look: Look): CanvasPattern | string {
  const scale = window.devicePixelRatio || 1
  const key = `${look.color} ${look.pattern} ${scale}`
  const known = tiles.get(key)
  if (known) return known
  if (look.pattern === 'plain') return look.color
  const tile = document.createElement('canvas')
  const size = Math.round(8 * scale)
  tile.width = tile.height = size
  const c = tile.getContext('2d')
  if (!c) return look.color
  c.scale(size / 8, size / 8)
  c.fillStyle = look.color
  c.fillRect(0, 0, 8, 8)
  c.strokeStyle = 'rgba(0, 0, 0, 0.42)'
  c.lineWidth = look.pattern === 'dots' ? 1.8 : 1.2
  c.lineCap = 'round'
  for (const [x1, y1, x2, y2] of strokes(look.pattern)) {
    c.beginPath()
    c.moveTo(x1, y1)
    c.lineTo(x2, y2)
    c.stroke()
  }
  const made = ctx.createPattern(tile, 'repeat') ?? look.color
  tiles.set(key, made)
  return made
}
