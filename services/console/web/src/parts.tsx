// Small things that are used in several places.

import type { ComponentChildren } from 'preact'
import { useId, useState } from 'preact/hooks'
import type { AccountStatus, State, Verdict } from './api'
import { shortID } from './format'
import { strokes, type Look } from './palette'

/** Swatch shows colour and pattern of a look. */
export function Swatch({ look }: { look: Look }) {
  const id = useId()
  return (
    <svg class="swatch" viewBox="0 0 16 16" width="14" height="14" aria-hidden="true">
      <defs>
        <pattern id={id} width="8" height="8" patternUnits="userSpaceOnUse">
          <rect width="8" height="8" fill={look.color} />
          {strokes(look.pattern).map(([x1, y1, x2, y2]) => (
            <line x1={x1} y1={y1} x2={x2} y2={y2} stroke="rgba(0,0,0,.45)" stroke-width={look.pattern === 'dots' ? 1.8 : 1.2} stroke-linecap="round" />
          ))}
        </pattern>
      </defs>
      <rect x="1" y="1" width="14" height="14" rx="3" fill={`url(#${id})`} />
    </svg>
  )
}

/** Mark tells states apart by shape as well as by colour. */
export function Mark({ state }: { state: State }) {
  return (
    <svg class={`mark mark-${state}`} viewBox="0 0 12 12" width="12" height="12" aria-hidden="true">
      {state === 'ok' && <circle cx="6" cy="6" r="4.5" />}
      {state === 'waiting' && <path d="M6 1.2 11.2 10.6H.8Z" />}
      {state === 'down' && <path d="M2.2 2.2l7.6 7.6M9.8 2.2 2.2 9.8" class="mark-line" />}
      {state === 'unknown' && <circle cx="6" cy="6" r="4" class="mark-ring" />}
    </svg>
  )
}

const verdicts: Record<Verdict, { word: string; state: State }> = {
  allow: { word: 'Open', state: 'ok' },
  warn: { word: 'Near limit', state: 'waiting' },
  deny: { word: 'Blocked', state: 'down' },
}

/** VerdictTag is a verdict in words and shape; an account that was removed has none. */
export function VerdictTag({ verdict, status = 'open' }: { verdict: Verdict; status?: AccountStatus }) {
  const v = status === 'removed' ? { word: 'Removed', state: 'down' as State } : (verdicts[verdict] ?? { word: verdict, state: 'unknown' as State })
  return (
    <span class={`tag tag-${v.state}`}>
      <Mark state={v.state} />
      {v.word}
    </span>
  )
}

/** Card is a titled section of the page; stale says why and since when what it shows is not of now. */
export function Card({ title, note, stale, actions, children, area }: { title: string; note?: ComponentChildren; stale?: string; actions?: ComponentChildren; children: ComponentChildren; area: string }) {
  const id = useId()
  return (
    <section class={`card area-${area}${stale ? ' card-stale' : ''}`} aria-labelledby={id}>
      <header>
        <h2 id={id}>{title}</h2>
        {note && <span class="card-note">{note}</span>}
        {actions && <div class="card-actions">{actions}</div>}
      </header>
      {stale && (
        <p class="card-age" role="status">
          <Mark state="waiting" />
          {stale}
        </p>
      )}
      {children}
    </section>
  )
}

/** Nothing is what a list without entries says. */
export function Nothing({ children }: { children: ComponentChildren }) {
  return <p class="nothing">{children}</p>
}

/** CopyID shows an id short and copies it whole. */
export function CopyID({ id, what }: { id: string; what: string }) {
  const [copied, setCopied] = useState(false)
  const copy = () => {
    void navigator.clipboard?.writeText(id).then(() => {
      setCopied(true)
      setTimeout(() => setCopied(false), 1500)
    })
  }
  return (
    <button type="button" class="copy" title={`${id} – copy`} aria-label={`Copy ${what} ${id}`} onClick={copy}>
      {copied ? 'copied' : shortID(id)}
    </button>
  )
}

/** Choice is one of a few, as a row of buttons. */
export function Choice<T extends string>({ label, value, options, onChange }: { label: string; value: T; options: { value: T; name: string }[]; onChange: (v: T) => void }) {
  const name = useId()
  return (
    <fieldset class="choice">
      <legend class="sr">{label}</legend>
      {options.map((o) => (
        <label key={o.value} class={o.value === value ? 'on' : ''}>
          <input type="radio" name={name} value={o.value} checked={o.value === value} onChange={() => onChange(o.value)} />
          {o.name}
        </label>
      ))}
    </fieldset>
  )
}
