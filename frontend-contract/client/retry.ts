/** Retries with backoff, timeouts and cancellation. */
import { retryAfter, TimedOut } from "./errors.ts";

export interface Patience {
  /** Maximum number of retries of a request. */
  retries: number;
  /** Milliseconds after which a request without a response counts as lost. */
  timeout: number;
  /** Maximum wait before a retry, in milliseconds. If Retry-After is longer, the response is returned at once. */
  longestWait: number;
}

export const RETRY_DEFAULTS: Patience = { retries: 3, timeout: 30_000, longestWait: 30_000 };

// A 409 with this code: the first attempt with the same key is still being processed.
const KEY_IN_USE = "idempotency_key_in_use";

/**
 * Sends a request until the response is final or the retries are used up, and returns the last response.
 *
 * once: sends the request and reads the whole response, unless it is a stream.
 * repeatable: whether repeating the request has no further effect.
 * Throws the error of the last attempt, or the abort reason of `signal`.
 */
export async function withRetries(
  once: (signal: AbortSignal) => Promise<Response>,
  { repeatable, signal, limits }: { repeatable: boolean; signal: AbortSignal | undefined; limits: Patience },
): Promise<Response> {
  for (let attempt = 0; ; attempt++) {
    const last = attempt >= limits.retries;
    let wait = backoff(attempt, 300, 5_000);
    try {
      const response = await within(once, limits.timeout, signal);
      if (last || !(await isTransient(response, repeatable))) return response;
      const seconds = retryAfter(response);
      if (seconds !== null) wait = seconds * 1000 + Math.random() * 250;
      if (wait > limits.longestWait) return response;
    } catch (error) {
      if (last || !repeatable || signal?.aborted) throw error;
    }
    await sleep(wait, signal);
  }
}

async function isTransient(response: Response, repeatable: boolean): Promise<boolean> {
  // A rate-limited request was not processed, so even one that is not repeatable can be sent again.
  if (response.status === 429) return true;
  if (!repeatable) return false;
  if (response.status === 409) return (await response.clone().text()).includes(`"${KEY_IN_USE}"`);
  return response.status === 502 || response.status === 503 || response.status === 504;
}

/** Reads the whole body, so that a connection lost within it fails here, where it can be retried. */
export async function buffered(response: Response): Promise<Response> {
  const body = await response.text();
  return new Response(body === "" ? null : body, response);
}

/** Exponential backoff with full jitter: a random wait up to `first * 2 ** attempt`, at most `most` milliseconds. */
export function backoff(attempt: number, first: number, most: number): number {
  return Math.random() * Math.min(most, first * 2 ** attempt);
}

/** Resolves after the given time. Rejects with the abort reason if `signal` is aborted. */
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

/** Returns the result of `work`. Rejects after a timeout (TimedOut) or an abort, and aborts the signal of `work`. */
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
    const timer = setTimeout(() => fail(new TimedOut(`no response within ${milliseconds / 1000} s`)), milliseconds);
    if (outer?.aborted) return abort();
    outer?.addEventListener("abort", abort);
    work(inner.signal).then((value) => {
      end();
      resolve(value);
    }, fail);
  });
}

// AbortSignal has no reason in React Native.
function reasonOf(signal: AbortSignal): unknown {
  return signal.reason ?? Object.assign(new Error("aborted"), { name: "AbortError" });
}
