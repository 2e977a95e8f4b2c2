import { expect, it } from 'vitest'
import { ago, codeName, compact, countdown, exact, percent, quantity, rate, shortID, unit } from './format'

it('writes numbers with at most three digits', () => {
  const cases: [number, string][] = [
    [0, '0'], [7, '7'], [999, '999'], [999.6, '1k'], [1000, '1k'], [1234, '1.23k'], [12345, '12.3k'], [123456, '123k'],
    [999_499, '999k'], [999_500, '1M'], [4_560_000, '4.56M'], [2_500_000_000, '2.5G'], [-1500, '−1.5k'], [0.25, '0.25'], [NaN, '–'],
  ]
  for (const [n, want] of cases) expect(compact(n), String(n)).toBe(want)
})

it('writes rates', () => {
  expect([0, 0.01, 0.24, 9.96, 12.4, 1234].map(rate)).toEqual(['0', '<0.1', '0.2', '10', '12.4', '1.23k'])
})

it('never rounds a part up to the whole', () => {
  expect(percent(0, 0)).toBe('0 %')
  expect(percent(1, 3)).toBe('33 %')
  expect(percent(1, 100_000)).toBe('<0.1 %')
  expect(percent(9999, 10_000)).toBe('99 %')
  expect(percent(5, 5)).toBe('100 %')
  expect(percent(15, 1000)).toBe('1.5 %')
})

it('writes what is left of a period', () => {
  expect([-3, 0, 59.4, 60, 3599, 3600, 90_000, 30 * 86_400].map(countdown)).toEqual(['0 s', '0 s', '59 s', '1:00 min', '59:59 min', '1 h 00 min', '1 d 1 h', '30 d 0 h'])
  expect([0, 5, 61, 7300, 200_000].map(ago)).toEqual(['now', '5 s ago', '1 min ago', '2 h ago', '2 d ago'])
})

it('knows that cost is in nano-units', () => {
  expect(quantity('cost', 2_500_000_000)).toBe('2.5')
  expect(quantity('calls', 2_500)).toBe('2.5k')
  expect(unit('my_meter')).toBe('my meter')
})

it('makes codes and ids readable', () => {
  expect(codeName('QUOTA_EXCEEDED')).toBe('Quota exceeded')
  expect(codeName('')).toBe('Admitted')
  expect(shortID('3MMmeNvEl8rcosW4m2OkkLIOGFB')).toBe('3MMme…OGFB')
  expect(shortID('short')).toBe('short')
  expect(exact(1234567)).toBe('1,234,567')
  // 2^63-1 can't be read to the last digit by a browser, and is not told as if it were.
  expect(exact(9223372036854775807)).toMatch(/^about 9,223,/)
  expect(compact(9223372036854775807)).toBe('9.22E')
})
