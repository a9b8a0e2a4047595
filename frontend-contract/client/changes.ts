/** Live changes of a user's tasks: over server-sent events, or by polling where `fetch` cannot stream. */
import type { Client } from "../client.ts";
import { AnotherPerson, ApiError, IssuerError, SignedOut, type Task } from "./errors.ts";
import { EventStream } from "./event-stream.ts";
import { backoff, sleep, within } from "./retry.ts";

/**
 * `task`: the current version of a changed task; `deleted_at` is set when it is in the trash. Pass `token` as `since` to
 * resume after this change.
 *
 * `resync`: reload all displayed data; later changes follow. Sent first if there is no `since`, and whenever the server
 * cannot determine the missed changes.
 */
export type Change = { type: "task"; task: Task; token: string } | { type: "resync" };

export interface LiveOptions {
  /** The token of the last processed change, or of the last page of `/tasks/changes`. Without it, starts with a resync. */
  since?: string;
  /** Ends the iteration. */
  signal?: AbortSignal;
  /** Whether `fetch` can stream response bodies. Detected by default. */
  streaming?: boolean;
  /** Milliseconds between two requests when polling. */
  pollEvery?: number;
  /** Milliseconds without data after which a connection counts as lost. The server sends a heartbeat every 15 s. */
  silence?: number;
}

const EVENTS = "/api/v1/tasks/events";

/**
 * Yields every change from now on, or since `since`. Reconnects after lost connections, restarts and expired tokens.
 *
 * Ends when `signal` is aborted. Throws SignedOut, AnotherPerson, and ApiError or IssuerError for errors that a retry
 * cannot fix.
 */
export async function* changes(client: Client, options: LiveOptions = {}): AsyncGenerator<Change, void, undefined> {
  const { signal } = options;
  const position: Position = { token: options.since ?? null };
  const follow = options.streaming ?? canStream() ? stream : poll;
  for (let failures = 0; !signal?.aborted; ) {
    try {
      for await (const change of follow(client, position, options)) {
        failures = 0;
        yield change;
      }
      failures = 0;
    } catch (error) {
      if (signal?.aborted) return;
      if (isTokenLost(error) && position.token !== null) {
        position.token = null;
        continue;
      }
      if (isFinal(error, failures)) throw error;
      failures++;
    }
    const pause = position.retry ?? 1_000;
    await sleep(failures === 0 ? pause * (0.5 + Math.random()) : backoff(failures, pause, 30_000), signal).catch(() => {});
  }
}

interface Position {
  /** Null: start from now, with a resync. */
  token: string | null;
  retry?: number;
}

// The token is too old (410), or is not a token of this feed (422).
const LOST_TOKEN_CODES = ["sync_token_expired", "invalid_sync_token"];
const isTokenLost = (error: unknown): boolean => error instanceof ApiError && LOST_TOKEN_CODES.includes(error.code);

// A token issued within the second of a revocation is rejected with the older ones; the next token is accepted.
const MAX_UNAUTHORIZED = 3;

function isFinal(error: unknown, failures: number): boolean {
  if (error instanceof SignedOut || error instanceof AnotherPerson) return true;
  if (!(error instanceof ApiError || error instanceof IssuerError)) return false;
  if (error instanceof ApiError && error.status === 401) return failures >= MAX_UNAUTHORIZED;
  return error.status < 500 && error.status !== 429 && error.status !== 408;
}

/** Yields the changes of one connection. */
async function* stream(client: Client, position: Position, options: LiveOptions): AsyncGenerator<Change, void, undefined> {
  const { signal, silence = 45_000 } = options;
  const since = position.token;
  const response = await client.fetch(EVENTS, {
    headers: { Accept: "text/event-stream", ...(since !== null && { "Last-Event-ID": since }) },
    stream: true,
    signal,
  });
  if (!response.body) throw new TypeError("fetch returned no response body");
  if (since === null) yield { type: "resync" };
  const arrived: Change[] = [];
  const events = new EventStream(({ type, data }) => {
    if (type === "task") arrived.push({ type, task: JSON.parse(data) as Task, token: events.lastEventId });
  }, since ?? "");
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await within(() => reader.read(), silence, signal);
      if (done) return;
      events.push(value);
      if (events.retry !== null) position.retry = events.retry;
      yield* arrived.splice(0);
      position.token = events.lastEventId || position.token;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Yields the changes of repeated requests, until one fails. */
async function* poll(client: Client, position: Position, options: LiveOptions): AsyncGenerator<Change, void, undefined> {
  const { signal, pollEvery = 15_000 } = options;
  if (position.token === null) {
    let token: string | null = null;
    for (let more = true; more; ) ({ next: token, more } = await fetchChanges(client, token, signal));
    position.token = token;
    yield { type: "resync" };
  }
  while (position.token !== null) {
    const { items, next, more } = await fetchChanges(client, position.token, signal);
    // The API gives one token per page: a consumer that stops within a page gets that page again.
    const before = position.token;
    for (const [i, task] of items.entries()) yield { type: "task", task, token: i === items.length - 1 ? next : before };
    position.token = next;
    if (!more) await sleep(pollEvery * (0.75 + Math.random() / 2), signal);
  }
}

async function fetchChanges(client: Client, since: string | null, signal: AbortSignal | undefined) {
  const params = { query: since === null ? {} : { since } };
  return (await client.GET("/api/v1/tasks/changes", { params, ...(signal && { signal }) })).data;
}

// React Native's fetch waits for the whole body, which never ends for an event stream.
function canStream(): boolean {
  return typeof ReadableStream === "function" && typeof Response === "function" && "body" in Response.prototype;
}
