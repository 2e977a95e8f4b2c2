// What the console's API says; schemas/openapi.yaml is the contract.

export type Verdict = 'allow' | 'warn' | 'deny'
export type State = 'ok' | 'waiting' | 'down' | 'unknown'

/** Freshness is how current an answer is, or a part of one. */
export interface Freshness {
  current: boolean
  /** 0: it never was complete, and age_seconds is -1. */
  as_of_unix_micros: number
  age_seconds: number
  reason?: string
}

export interface Second {
  t: number
  admitted: number
  refused: Record<string, number>
  input_tokens: number
  output_tokens: number
}

export interface LimitUsage {
  limit_id: string
  meter: string
  window: string
  amount: number
  used: number
  remaining: number
  /** With the verdict deny: what a smaller call could still get. */
  room?: number
  period_start_unix_micros: number
  period_end_unix_micros: number
  verdict: Verdict
  tier: Tier
  lease?: LeaseUsage
}

export type Tier = 'eventual' | 'exact' | 'leased'

/** LeaseUsage is how an allowance is shared among gateways; units of its meter, and counts. */
export interface LeaseUsage {
  settled: number
  outstanding: number
  dead: number
  free: number
  exposure: number
  overdraft: number
  gateways: number
  waiting: number
  grants: number
  recalls: number
  denied_early: number
  denied_final: number
}

export interface TopLimit extends LimitUsage {
  /** The account that carries it: the account itself or one above it. */
  account: string
}

export interface TopAccount {
  id: string
  parent?: string
  plan?: string
  recent_admitted: number
  recent_refused: number
  status: AccountStatus
  verdict: Verdict
  limits: TopLimit[]
  freshness: Freshness
}

export type AccountStatus = 'open' | 'removed' | 'unnamed'

export interface Refusal {
  time_unix_micros: number
  account: string
  key_id?: string
  code: string
  status: number
  decision_id?: string
  method?: string
  route?: string
  model?: string
  request_id?: string
  gateway?: string
  ledger_sequence: number
  count: number
}

export interface Alert {
  episode_id: string
  transition: 'firing' | 'resolved'
  n: number
  rule: string
  scope: string
  severity?: string
  started_at_unix_micros?: number
  at_unix_micros: number
  value: number
  threshold: number
  summary: string
}

export interface Part {
  name: string
  state: State
  detail: string
}

export interface DeadLetter {
  sequence: number
  time: string
  reason: string
  detail: string
  origin: string
  bytes: number
}

export interface LiveMessage {
  at_unix_micros: number
  ledger_sequence: number
  reset: boolean
  seconds: Second[]
  top: TopAccount[]
  refusals: Refusal[]
  alerts: Alert[]
  dead_letters: { total: number; by_reason: { reason: string; count: number }[]; newest: DeadLetter[] }
  decisions: { deny: number; warn: number; all: number }
  lag: { tail_entries: number; skipped_entries: number; counted_seconds: number; counted_known: boolean; history_entries: number; history_known: boolean }
  health: Part[]
  state: State
  freshness: Record<'calls' | 'decisions' | 'counters' | 'alerts' | 'dead_letters' | 'health', Freshness>
}

export interface Series {
  name: string
  other: boolean
  admitted: number[]
  refused: number[]
  input_tokens: number[]
  output_tokens: number[]
}

export type Group = 'code' | 'model' | 'account'

export interface History {
  from_unix_seconds: number
  step_seconds: number
  steps: number
  group: Group
  series: Series[]
  freshness: Freshness
}

export type Pair = 'gateway-ledger' | 'ledger-counters' | 'ledger-history'

export interface Finding {
  id: string
  pair: Pair
  kind: 'gap' | 'double' | 'sum'
  minute: string
  account: string
  text: string
  first_seen_unix_micros: number
  resolved_at_unix_micros?: number
}

export interface Audit {
  state: State
  detail: string
  at_unix_micros: number
  calls: number
  unclaimed_calls: number
  checked_cells: number
  freshness: Freshness
  points: { pair: Pair; state: State; ok: boolean; lag_seconds: number; detail: string; open: number }[]
  open: number
  findings: Finding[]
}

export async function getAudit(signal: AbortSignal): Promise<Audit> {
  const res = await fetch('/v1/audit?limit=20', { headers: headers(), signal })
  if (!res.ok) throw await problemOf(res)
  return (await res.json()) as Audit
}

export interface Correction {
  ledger_sequence: number
  stream_time_unix_micros: number
  id: string
  author: string
  account: string
  time_unix_micros: number
  model?: string
  adjustments: Record<string, number>
  reason: string
  reference?: string
}

export interface Corrections {
  corrections: Correction[]
  freshness: Freshness
}

export async function getCorrections(account: string, signal: AbortSignal): Promise<Corrections> {
  const res = await fetch(`/v1/corrections?limit=20${account ? `&account=${encodeURIComponent(account)}` : ''}`, { headers: headers(), signal })
  if (!res.ok) throw await problemOf(res)
  return (await res.json()) as Corrections
}

/** Problem is an answer that is not the one asked for. */
export class Problem extends Error {
  readonly status: number
  readonly code: string
  constructor(status: number, code: string, detail: string) {
    super(detail)
    this.status = status
    this.code = code
  }
}

/** Explanation is the part of /v1/decisions/{id}/explain that is shown. */
export interface Explanation {
  decision: { id: string; account: string; limit_id: string; verdict: Verdict; used: number; amount: number; decided_at_unix_micros: number }
  replay: { same: boolean; text: string; entries: number }
  limit: { meter: string; window: string; amount: number; tier: Tier; plan_version: string }
  counter: { before: number; after: number }
  reason: { text: string }
  entry: { shard: number; sequence: number; kind: string }
  fed: { calls: number; adjusted: number }
  allowance?: { settled: number; outstanding: number; dead: number; exposure: number }
  calls: { time_unix_micros: number; account: string; adds: number; used_after: number; ending?: string; estimated?: boolean }[]
}

export async function getExplanation(id: string): Promise<Explanation> {
  const res = await fetch(`/v1/decisions/${encodeURIComponent(id)}/explain`, { headers: headers() })
  if (!res.ok) throw await problemOf(res)
  return (await res.json()) as Explanation
}

/** getLimits are the limits that bind an account: its own, and those of the accounts above it. */
export interface AccountLimits {
  status: AccountStatus
  limits: TopLimit[]
  freshness: Freshness
}

export async function getLimits(account: string, signal: AbortSignal): Promise<AccountLimits> {
  const path = account.split('/').map(encodeURIComponent).join('/')
  const of = await fetch(`/v1/accounts/${path}`, { headers: headers(), signal })
  if (!of.ok) throw await problemOf(of)
  const { path: steps, status } = (await of.json()) as { path: string[]; status: AccountStatus }
  const query = new URLSearchParams(steps.map((s) => ['account', s]))
  const res = await fetch(`/v1/usage?${query}`, { headers: headers(), signal })
  if (!res.ok) throw await problemOf(res)
  const usage = (await res.json()) as { accounts: { id: string; limits: LimitUsage[] }[]; freshness: Freshness; shards: { ok: boolean }[] }
  const limits = steps.flatMap((step) => (usage.accounts.find((a) => a.id === step)?.limits ?? []).map((l) => ({ ...l, account: step })))
  return { status, limits, freshness: usage.freshness }
}

const tokenKey = 'tollkeeper-token'

/** The token lives as long as the tab. */
export function setToken(token: string): void {
  sessionStorage.setItem(tokenKey, token)
}

export function headers(): Record<string, string> {
  const token = sessionStorage.getItem(tokenKey)
  return token ? { Authorization: `Bearer ${token}` } : {}
}

/** problemOf reads why an answer is not the one asked for. */
export async function problemOf(res: Response): Promise<Problem> {
  try {
    const body = (await res.json()) as { code?: string; detail?: string }
    return new Problem(res.status, body.code ?? '', body.detail ?? res.statusText)
  } catch {
    return new Problem(res.status, '', `the console answered ${res.status} ${res.statusText}`)
  }
}

export async function getHistory(spanSeconds: number, group: Group, signal: AbortSignal): Promise<History> {
  const now = Date.now()
  const query = new URLSearchParams({
    from: new Date(now - spanSeconds * 1000).toISOString(),
    to: new Date(now).toISOString(),
    group,
  })
  const res = await fetch(`/v1/history/calls?${query}`, { headers: headers(), signal })
  if (!res.ok) throw await problemOf(res)
  return (await res.json()) as History
}
