// Numbers and times as people read them.

const units = ['', 'k', 'M', 'G', 'T', 'P', 'E']

/** compact writes a number with at most three digits and a unit: 12.3k, 4.56M. */
export function compact(n: number): string {
  if (!Number.isFinite(n)) return '–'
  let v = Math.abs(n)
  let u = 0
  while (u < units.length - 1 && v >= 999.5) {
    v /= 1000
    u++
  }
  const digits = v >= 99.95 || (u === 0 && Number.isInteger(v)) ? 0 : v >= 9.995 ? 1 : 2
  const text = v.toFixed(digits)
  return (n < 0 ? '−' : '') + (text.includes('.') ? text.replace(/\.?0+$/, '') : text) + units[u]
}

/** exact writes a number whole, in groups of three. */
export function exact(n: number): string {
  const text = new Intl.NumberFormat('en-US', { maximumFractionDigits: 2 }).format(n)
  // Beyond 2^53 not every whole number can be read here.
  return Number.isInteger(n) && !Number.isSafeInteger(n) ? `about ${text}` : text
}

/** rate writes a number a second: one decimal below ten. */
export function rate(n: number): string {
  if (n > 0 && n < 0.05) return '<0.1'
  return n < 10 ? String(Math.round(n * 10) / 10) : compact(n)
}

export function percent(part: number, whole: number): string {
  if (whole <= 0) return '0 %'
  const p = (100 * part) / whole
  if (p > 0 && p < 0.1) return '<0.1 %'
  if (p < 10) return `${Math.round(p * 10) / 10} %`
  return `${p >= 99.5 && part < whole ? 99 : Math.round(p)} %`
}

/** quantity writes a reading of a meter; cost is in nano-units. */
export function quantity(meter: string, n: number): string {
  return meter === 'cost' ? compact(n / 1e9) : compact(n)
}

/** unit names what a meter counts. */
export function unit(meter: string): string {
  switch (meter) {
    case 'calls':
      return 'calls'
    case 'input_tokens':
      return 'tokens in'
    case 'output_tokens':
      return 'tokens out'
    case 'cached_input_tokens':
      return 'cached tokens'
    case 'reasoning_tokens':
      return 'reasoning tokens'
    case 'cost':
      return 'spend'
    default:
      return meter.replaceAll('_', ' ')
  }
}

/** countdown writes how long until a moment, in the two largest units. */
export function countdown(seconds: number): string {
  const s = Math.max(0, Math.round(seconds))
  const two = (n: number) => String(n).padStart(2, '0')
  if (s < 60) return `${s} s`
  if (s < 3600) return `${Math.floor(s / 60)}:${two(s % 60)} min`
  if (s < 86400) return `${Math.floor(s / 3600)} h ${two(Math.floor((s % 3600) / 60))} min`
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`
}

/** ago writes how long since a moment, in one unit. */
export function ago(seconds: number): string {
  const s = Math.max(0, Math.floor(seconds))
  if (s < 2) return 'now'
  if (s < 60) return `${s} s ago`
  if (s < 3600) return `${Math.floor(s / 60)} min ago`
  if (s < 86400) return `${Math.floor(s / 3600)} h ago`
  return `${Math.floor(s / 86400)} d ago`
}

const two = (n: number) => String(n).padStart(2, '0')

/** clock writes a moment as local time of day. */
export function clock(unixSeconds: number, withSeconds = true): string {
  const d = new Date(unixSeconds * 1000)
  return `${two(d.getHours())}:${two(d.getMinutes())}${withSeconds ? `:${two(d.getSeconds())}` : ''}`
}

/** moment writes date and time of day, local, as long as both matter. */
export function moment(unixSeconds: number): string {
  const d = new Date(unixSeconds * 1000)
  return `${d.getFullYear()}-${two(d.getMonth() + 1)}-${two(d.getDate())} ${two(d.getHours())}:${two(d.getMinutes())}`
}

/** codeName makes a code readable: QUOTA_EXCEEDED → Quota exceeded. */
export function codeName(code: string): string {
  if (code === '') return 'Admitted'
  const words = code.toLowerCase().replaceAll('_', ' ')
  return words.charAt(0).toUpperCase() + words.slice(1)
}

/** shortID keeps both ends of an id. */
export function shortID(id: string): string {
  return id.length > 11 ? `${id.slice(0, 5)}…${id.slice(-4)}` : id
}
