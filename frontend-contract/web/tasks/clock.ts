"use client";
/** What time it is, and where: on the server nobody knows, so that the first paint says UTC and the second is right. */
import { createContext, useContext, useSyncExternalStore } from "react";

export interface Clock {
  /** Milliseconds, to the minute. */
  now: number;
  timeZone: string;
}

const MINUTE = 60_000;

/** When the server rendered the page. */
export const Rendered = createContext(0);

export function useClock(): Clock {
  const rendered = useContext(Rendered);
  const now = useSyncExternalStore(everyMinute, () => Math.floor(Date.now() / MINUTE) * MINUTE, () => rendered);
  const timeZone = useSyncExternalStore(never, () => Intl.DateTimeFormat().resolvedOptions().timeZone, () => "UTC");
  return { now, timeZone };
}

function everyMinute(tick: () => void): () => void {
  const timer = setInterval(tick, MINUTE);
  return () => clearInterval(timer);
}

const never = () => () => {};
