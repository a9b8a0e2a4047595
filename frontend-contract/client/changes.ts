/** What happens to a person's tasks, as it happens: over a stream, or by asking where streams are missing. */
import type { Client } from "../client.ts";
import { AnotherPerson, ApiError, IssuerError, SignedOut, type Task } from "./errors.ts";
import { EventStream } from "./event-stream.ts";
import { backoff, sleep, within } from "./retry.ts";

/**
 * `task`: as it is now; `deleted_at` says that it went into the bin. `token` is where to go on, as `since`, another time.
 *
 * `resync`: read anew what you show; every later change follows. It comes first where nobody said `since`, and whenever
 * the server can no longer tell what was missed.
 */
export type Change = { type: "task"; task: Task; token: string } | { type: "resync" };

export interface LiveOptions {
  /** The token of the last change that was seen, or of the last page of `/tasks/changes`. */
  since?: string;
  /** Ends the iteration. */
  signal?: AbortSignal;
  /** Whether `fetch` gives a body while it arrives; found out unless given. */
  streaming?: boolean;
  /** Milliseconds between two questions where it does not. */
  pollEvery?: number;
  /** Milliseconds without a sign of life until a connection is given up. The server sends one every 15 s. */
  silence?: number;
}

const EVENTS = "/api/v1/tasks/events";

/**
 * Every change from now on, or since `since`, through lost connections, restarts and expired tokens.
 *
 * Ends when `signal` is aborted. Throws SignedOut, AnotherPerson, and ApiError when the API refuses for good.
 */
export async function* changes(client: Client, options: LiveOptions = {}): AsyncGenerator<Change, void, undefined> {
  const { signal } = options;
  const position: Position = { token: options.since ?? null };
  const round = options.streaming ?? canStream() ? stream : poll;
  for (let failures = 0; !signal?.aborted; ) {
    try {
      for await (const change of round(client, position, options)) {
        failures = 0;
        yield change;
      }
      failures = 0;
    } catch (error) {
      if (signal?.aborted) return;
      if (lost(error) && position.token !== null) {
        position.token = null;
        continue;
      }
      if (final(error, failures)) throw error;
      failures++;
    }
    const pause = position.retry ?? 1_000;
    await sleep(failures === 0 ? pause * (0.5 + Math.random()) : backoff(failures, pause, 30_000), signal).catch(() => {});
  }
}

interface Position {
  /** Null: from now on, and whatever came before is unknown. */
  token: string | null;
  retry?: number;
}

// The token is too old (410), or is no token of this feed's (422).
const LOST = ["sync_token_expired", "invalid_sync_token"];
const lost = (error: unknown): boolean => error instanceof ApiError && LOST.includes(error.code);

// A token of the very second of a revocation is refused with the old ones; the next is not.
const REFUSALS = 3;

function final(error: unknown, failures: number): boolean {
  if (error instanceof SignedOut || error instanceof AnotherPerson) return true;
  if (!(error instanceof ApiError || error instanceof IssuerError)) return false;
  if (error instanceof ApiError && error.status === 401) return failures >= REFUSALS;
  return error.status < 500 && error.status !== 429 && error.status !== 408;
}

/** One connection: from its opening to its end. */
async function* stream(client: Client, position: Position, options: LiveOptions): AsyncGenerator<Change, void, undefined> {
  const { signal, silence = 45_000 } = options;
  const since = position.token;
  const response = await client.fetch(EVENTS, {
    headers: { Accept: "text/event-stream", ...(since !== null && { "Last-Event-ID": since }) },
    stream: true,
    signal,
  });
  if (!response.body) throw new TypeError("this fetch gives no streams");
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

/** Question after question: from the first to the first that fails. */
async function* poll(client: Client, position: Position, options: LiveOptions): AsyncGenerator<Change, void, undefined> {
  const { signal, pollEvery = 15_000 } = options;
  if (position.token === null) {
    let token: string | null = null;
    for (let more = true; more; ) ({ next: token, more } = await ask(client, token, signal));
    position.token = token;
    yield { type: "resync" };
  }
  while (position.token !== null) {
    const { items, next, more } = await ask(client, position.token, signal);
    // Between two items of a page there is no token: who stops there gets the page again.
    const before = position.token;
    for (const [i, task] of items.entries()) yield { type: "task", task, token: i === items.length - 1 ? next : before };
    position.token = next;
    if (!more) await sleep(pollEvery * (0.75 + Math.random() / 2), signal);
  }
}

async function ask(client: Client, since: string | null, signal: AbortSignal | undefined) {
  const params = { query: since === null ? {} : { since } };
  return (await client.GET("/api/v1/tasks/changes", { params, ...(signal && { signal }) })).data;
}

// React Native's own fetch collects the whole body first, and a stream of events has no end.
function canStream(): boolean {
  return typeof ReadableStream === "function" && typeof Response === "function" && "body" in Response.prototype;
}
