import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";
import { AnotherPerson, ApiError, type Change, changes, type LiveOptions, SignedOut, tokenSource } from "../../client.ts";
import { EventStream, type StreamEvent } from "../event-stream.ts";
import { client, inTurn, json, jwt, lost, problem, type Script, type Scripted, task } from "./scripted.ts";

const FAST = "retry: 5\n\n";
const event = (id: string, title: string) => `event: task\nid: ${id}\ndata: ${JSON.stringify(task({ title }))}\n\n`;

/** Sends a text, then closes the connection, or keeps it open. */
const sending = (text: string, stay = false): Script => (_, response) => {
  response.writeHead(200, { "Content-Type": "text/event-stream" });
  response.write(text);
  if (!stay) response.end();
};
const open = (text: string) => sending(text, true);

/** The first `count` changes, abbreviated. */
async function received(t: TestContext, api: Scripted, count: number, options: LiveOptions = {}): Promise<string[]> {
  const stop = new AbortController();
  t.after(() => stop.abort());
  const changed: string[] = [];
  for await (const change of changes(api, { signal: stop.signal, ...options })) {
    changed.push(short(change));
    if (changed.length === count) break;
  }
  return changed;
}
const short = (change: Change) => (change.type === "task" ? `${change.task.title}@${change.token}` : "resync");
const lastEventIds = (api: Scripted) => api.calls().map(({ headers }) => headers["last-event-id"]);

test("a stream starts with a resync, then yields every change", async (t) => {
  const api = await client(t, open(FAST + event("a", "1") + ": still here\n\n" + event("b", "2")));
  assert.deepEqual(await received(t, api, 3), ["resync", "1@a", "2@b"]);
  assert.equal(api.calls()[0]!.headers.accept, "text/event-stream");
  await api.calls()[0]!.closed;
});

test("a lost stream is resumed after the last event", async (t) => {
  const api = await client(t, inTurn(
    sending(FAST + event("a", "1")),
    lost,
    (_, response) => problem(response, 503, "unavailable", { "Retry-After": "0" }),
    sending(FAST + "id: quiet\n\n"),
    open(event("b", "2")),
  ));
  assert.deepEqual(await received(t, api, 2, { since: "start" }), ["1@a", "2@b"]);
  assert.deepEqual(lastEventIds(api), ["start", "a", "a", "a", "quiet"]);
});

test("an incomplete event is ignored", async (t) => {
  const whole = event("b", "2");
  const api = await client(t, inTurn(sending(FAST + event("a", "1") + whole.slice(0, -20)), open(whole)));
  assert.deepEqual(await received(t, api, 2, { since: "start" }), ["1@a", "2@b"]);
  assert.deepEqual(lastEventIds(api), ["start", "a"]);
});

test("a rejected token causes a resync", async (t) => {
  const gone: Script = (_, response) => problem(response, 410, "sync_token_expired");
  const unknown: Script = (_, response) => problem(response, 422, "invalid_sync_token");
  for (const refusal of [gone, unknown]) {
    const api = await client(t, inTurn(refusal, open(event("n", "new"))));
    assert.deepEqual(await received(t, api, 2, { since: "old" }), ["resync", "new@n"]);
    assert.deepEqual(lastEventIds(api), ["old", undefined]);
  }
});

test("a stream lost before its first event id causes another resync", async (t) => {
  const api = await client(t, inTurn(sending(FAST), open(event("a", "1"))));
  assert.deepEqual(await received(t, api, 3), ["resync", "resync", "1@a"]);
});

test("a connection without data is replaced", async (t) => {
  const api = await client(t, inTurn(open(FAST + event("a", "1")), open(event("b", "2"))));
  assert.deepEqual(await received(t, api, 2, { since: "start", silence: 50 }), ["1@a", "2@b"]);
  await api.calls()[0]!.closed;
});

test("permanent errors and SignedOut are thrown", async (t) => {
  const suspended = await client(t, (_, response) => problem(response, 403, "account_suspended"));
  await assert.rejects(received(t, suspended, 1), (error) => error instanceof ApiError && error.code === "account_suspended");
  const invalid = await client(t, (_, response) => problem(response, 422, "invalid"));
  await assert.rejects(received(t, invalid, 1), (error) => error instanceof ApiError && error.status === 422);
  const signedOut = { token: async () => Promise.reject(new SignedOut()), clear() {} };
  await assert.rejects(received(t, await client(t, lost, { token: signedOut }), 1), SignedOut);
});

test("another user's token throws AnotherPerson and opens no connection", async (t) => {
  const refused: Script = (_, response) => problem(response, 401, "invalid_token");
  const page: Script = (_, response) => json(response, 200, { items: [task({ title: "1" })], next: "a", more: true });
  for (const [options, first] of [[{}, sending(FAST + event("a", "1"))], [{ streaming: false }, page]] as const) {
    const people = ["alice", "bob"];
    const api = await client(t, inTurn(first, refused), { token: tokenSource(async () => jwt({ sub: people.shift() })) });
    await assert.rejects(received(t, api, 2, { since: "start", ...options }), AnotherPerson);
    assert.deepEqual([api.calls().length, people.length], [2, 0]);
  }
});

test("a 401 is retried with new tokens, a limited number of times", async (t) => {
  t.mock.method(Math, "random", () => 0);
  const refused: Script = (_, response) => problem(response, 401, "invalid_token");
  const api = await client(t, inTurn(...Array<Script>(6).fill(refused), open(event("a", "1"))));
  assert.deepEqual(await received(t, api, 2), ["resync", "1@a"]);
  const revoked = await client(t, refused);
  await assert.rejects(received(t, revoked, 1), (error) => error instanceof ApiError && error.status === 401);
  assert.equal(revoked.calls().length, 8);
});

test("an abort ends the iteration in every phase", async (t) => {
  for (const script of [open(FAST), lost, () => {}] as Script[]) {
    const stop = new AbortController();
    const api = await client(t, async (request, response) => {
      await script(request, response);
      setTimeout(() => stop.abort(), 20);
    });
    for await (const change of changes(api, { signal: stop.signal })) assert.equal(change.type, "resync");
  }
});

/** A change feed whose tokens are the number of changes before them. */
const feed = (titles: string[], floor = 0): Script => ({ url }, response) => {
  const { searchParams, pathname } = new URL(url, "http://x");
  assert.equal(pathname, "/api/v1/tasks/changes");
  const since = Number(searchParams.get("since") ?? floor);
  if (since < floor) return problem(response, 410, "sync_token_expired");
  const items = titles.slice(since, since + 2).map((title) => task({ title }));
  json(response, 200, { items, next: `${since + items.length}`, more: since + items.length < titles.length });
};

test("polling starts from now", async (t) => {
  const titles = ["1", "2", "3"];
  const api = await client(t, feed(titles));
  const poll = { streaming: false, pollEvery: 5 };
  const stop = new AbortController();
  const changed: string[] = [];
  for await (const change of changes(api, { ...poll, signal: stop.signal })) {
    changed.push(short(change));
    if (changed.length === 1) titles.push("4", "5", "6");
    if (changed.length === 4) break;
  }
  // The token of "4" is still "3": resuming repeats "4" instead of losing "5".
  assert.deepEqual(changed, ["resync", "4@3", "5@5", "6@6"]);
});

test("polling resumes after its token, or causes a resync if the token is rejected", async (t) => {
  const poll = { streaming: false, pollEvery: 5 };
  assert.deepEqual(await received(t, await client(t, feed(["1", "2", "3"])), 2, { ...poll, since: "1" }), ["2@1", "3@3"]);
  const purged = await client(t, feed(["1", "2", "3"], 2));
  assert.deepEqual(await received(t, purged, 1, { ...poll, since: "1" }), ["resync"]);
});

test("a fetch without streaming is detected", async (t) => {
  const body = Object.getOwnPropertyDescriptor(Response.prototype, "body")!;
  delete (Response.prototype as { body?: unknown }).body;
  t.after(() => Object.defineProperty(Response.prototype, "body", body));
  assert.deepEqual(await received(t, await client(t, feed(["1"])), 1, { since: "0" }), ["1@1"]);
});

function parsed(text: string, size = Infinity, lastEventId = "") {
  const events: StreamEvent[] = [];
  const stream = new EventStream((event) => events.push(event), lastEventId);
  const bytes = new TextEncoder().encode(text);
  for (let at = 0; at < bytes.length; at += size) stream.push(bytes.slice(at, at + size));
  return { events, stream };
}

test("the parser follows the standard for any chunk size", () => {
  const text =
    "\ufeff:comment\r\nevent: task\rdata:a\r\ndata: b\r\n\r\ndata\n\nid: 1\u0000\nid: ä\nretry: 12\nretry: x\nnonsense: y\n\ndata:  two spaces\n\n";
  for (const size of [1, 2, 3, 7, Infinity]) {
    const { events, stream } = parsed(text, size);
    assert.deepEqual(events, [
      { type: "task", data: "a\nb" },
      { type: "message", data: "" },
      { type: "message", data: " two spaces" },
    ]);
    assert.deepEqual([stream.lastEventId, stream.retry], ["ä", 12]);
  }
});

test("an id applies when its event is complete, and too long events are rejected", () => {
  assert.equal(parsed("id: b\ndata: x\n", Infinity, "a").stream.lastEventId, "a");
  assert.throws(() => parsed("data: x\n".repeat(1024 * 1024 + 1), 64 * 1024), RangeError);
  assert.throws(() => parsed("d".repeat(1024 * 1024 + 1), 64 * 1024), RangeError);
  assert.equal(parsed(`${`data: ${"x".repeat(1000)}\n\n`.repeat(2000)}`, 64 * 1024).events.length, 2000);
});
