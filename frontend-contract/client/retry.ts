/** Asks again when that can help and does nothing twice, for a bounded time, until the caller no longer wants it. */
import { retryAfter, TimedOut } from "./errors.ts";

export interface Patience {
  /** How often a request is sent again at most. */
  retries: number;
  /** Milliseconds until a request without an answer counts as lost. */
  timeout: number;
  /** Milliseconds: who is told to wait for longer is told so at once. */
  longestWait: number;
}

export const PATIENCE: Patience = { retries: 3, timeout: 30_000, longestWait: 30_000 };

// 429: refused before it was looked at. 409 with this code: our own first attempt is still at work.
const KEY_IN_USE = "idempotency_key_in_use";

/**
 * The first answer that is final, or else the last one.
 *
 * once: sends the request, and reads the whole answer unless it is a stream.
 * again: whether sending it twice does no more than sending it once.
 * Throws what the last attempt threw, or what `signal` was aborted with.
 */
export async function persist(
  once: (signal: AbortSignal) => Promise<Response>,
  { again, signal, patience }: { again: boolean; signal: AbortSignal | undefined; patience: Patience },
): Promise<Response> {
  for (let attempt = 0; ; attempt++) {
    const last = attempt >= patience.retries;
    let wait = backoff(attempt, 300, 5_000);
    try {
      const response = await within(once, patience.timeout, signal);
      if (last || !(await passing(response, again))) return response;
      const told = retryAfter(response);
      if (told !== null) wait = told * 1000 + Math.random() * 250;
      if (wait > patience.longestWait) return response;
    } catch (error) {
      if (last || !again || signal?.aborted) throw error;
    }
    await sleep(wait, signal);
  }
}

async function passing(response: Response, again: boolean): Promise<boolean> {
  if (response.status === 429) return true;
  if (!again) return false;
  if (response.status === 409) return (await response.clone().text()).includes(`"${KEY_IN_USE}"`);
  return response.status === 502 || response.status === 503 || response.status === 504;
}

/** The answer with its whole body at hand: a connection that breaks in the middle of it fails here and not later. */
export async function buffered(response: Response): Promise<Response> {
  const body = await response.text();
  return new Response(body === "" ? null : body, response);
}

/** Milliseconds: exponential, with full jitter, so that many clients do not come back at once. */
export function backoff(attempt: number, first: number, most: number): number {
  return Math.random() * Math.min(most, first * 2 ** attempt);
}

export function sleep(milliseconds: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const end = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", end);
      if (signal?.aborted) reject(reasonOf(signal));
      else resolve();
    };
    const timer = setTimeout(end, milliseconds);
    signal?.addEventListener("abort", end);
    if (signal?.aborted) end();
  });
}

/** What `work` comes to, unless the caller aborts or the time is over: then `work` is told, and not waited for. */
export function within<T>(work: (signal: AbortSignal) => Promise<T>, milliseconds: number, outer?: AbortSignal): Promise<T> {
  return new Promise((resolve, reject) => {
    const inner = new AbortController();
    const end = () => {
      clearTimeout(timer);
      outer?.removeEventListener("abort", abort);
    };
    const fail = (error: unknown) => {
      end();
      reject(error);
      inner.abort(error);
    };
    const abort = () => fail(reasonOf(outer!));
    const timer = setTimeout(() => fail(new TimedOut(`no answer within ${milliseconds / 1000} s`)), milliseconds);
    if (outer?.aborted) return abort();
    outer?.addEventListener("abort", abort);
    work(inner.signal).then((value) => {
      end();
      resolve(value);
    }, fail);
  });
}

// React Native's signals carry no reason.
function reasonOf(signal: AbortSignal): unknown {
  return signal.reason ?? Object.assign(new Error("aborted"), { name: "AbortError" });
}
