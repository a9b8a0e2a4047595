/** Due times as relative dates: today, tomorrow, Friday, 3 Dec. */
import type { Clock } from "./clock.ts";

const DAY = 86_400_000;

/** The date of a time in a time zone, in days since 1970. */
function dayOf(moment: number, timeZone: string): number {
  const parts = new Intl.DateTimeFormat("en-CA", { timeZone, year: "numeric", month: "2-digit", day: "2-digit" }).format(moment);
  return Date.parse(`${parts}T00:00:00Z`) / DAY;
}

export function dueText(due: string, { now, timeZone }: Clock): string {
  const moment = Date.parse(due);
  const days = dayOf(moment, timeZone) - dayOf(now, timeZone);
  if (days === 0) return `Today ${time(moment, timeZone)}`;
  if (days === 1) return "Tomorrow";
  if (days === -1) return "Yesterday";
  if (days > 1 && days < 7) return new Intl.DateTimeFormat("en", { timeZone, weekday: "long" }).format(moment);
  const year = new Date(moment).getUTCFullYear() === new Date(now).getUTCFullYear() ? {} : { year: "numeric" as const };
  return new Intl.DateTimeFormat("en", { timeZone, day: "numeric", month: "short", ...year }).format(moment);
}

const time = (moment: number, timeZone: string): string =>
  new Intl.DateTimeFormat("en", { timeZone, hour: "numeric", minute: "2-digit" }).format(moment);

/** The value for an `<input type="datetime-local">`, in the browser's time zone. */
export function toInput(due: string | null): string {
  if (!due) return "";
  const date = new Date(due);
  return new Date(date.getTime() - date.getTimezoneOffset() * 60_000).toISOString().slice(0, 16);
}

export const fromInput = (text: string): string | null => (text ? new Date(text).toISOString() : null);

/** 18:00 local time, `days` from today. */
export function evening(days: number): string {
  const date = new Date();
  date.setDate(date.getDate() + days);
  date.setHours(18, 0, 0, 0);
  return date.toISOString();
}
