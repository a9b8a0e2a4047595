"use client";
/** The current time and time zone. The server does not know the user's time zone, so the first render uses UTC. */
import { createContext, useContext, useSyncExternalStore } from "react";

export interface Clock {
  /** Milliseconds since 1970, rounded down to the minute. */
  now: number;
  timeZone: string;
}

const MINUTE = 60_000;

/** Time at which the server rendered the page, in milliseconds. */
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
