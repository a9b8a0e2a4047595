import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";
import { AnotherPerson, ApiError, type Change, changes, type LiveOptions, SignedOut, tokenSource } from "../../client.ts";
import { EventStream, type StreamEvent } from "../event-stream.ts";
import { client, inTurn, json, jwt, lost, problem, type Script, type Scripted, task } from "./scripted.ts";

const FAST = "retry: 5\n\n";
const event = (id: string, title: string) => `event: task\nid: ${id}\ndata: ${JSON.stringify(task({ title }))}\n\n`;

/** A connection that says these things and then ends, or stays open. */
const saying = (text: string, stay = false): Script => (_, response) => {
  response.writeHead(200, { "Content-Type": "text/event-stream" });
  response.write(text);
  if (!stay) response.end();
};
const open = (text: string) => saying(text, true);

/** What happens, in short, until as many things have. */
async function heard(t: TestContext, api: Scripted, count: number, options: LiveOptions = {}): Promise<string[]> {
  const stop = new AbortController();
  t.after(() => stop.abort());
  const said: string[] = [];
  for await (const change of changes(api, { signal: stop.signal, ...options })) {
    said.push(short(change));
    if (said.length === count) break;
  }
  return said;
}
const short = (change: Change) => (change.type === "task" ? `${change.task.title}@${change.token}` : "resync");
const resumed = (api: Scripted) => api.calls().map(({ headers }) => headers["last-event-id"]);

test("what is open is told first, then every change", async (t) => {
  const api = await client(t, open(FAST + event("a", "1") + ": still here\n\n" + event("b", "2")));
  assert.deepEqual(await heard(t, api, 3), ["resync", "1@a", "2@b"]);
  assert.equal(api.calls()[0]!.headers.accept, "text/event-stream");
  await api.calls()[0]!.gone;
});

test("a stream that ends is taken up where it ended", async (t) => {
  const api = await client(t, inTurn(
    saying(FAST + event("a", "1")),
    lost,
    (_, response) => problem(response, 503, "unavailable", { "Retry-After": "0" }),
    saying(FAST + "id: quiet\n\n"),
    open(event("b", "2")),
  ));
  assert.deepEqual(await heard(t, api, 2, { since: "start" }), ["1@a", "2@b"]);
  assert.deepEqual(resumed(api), ["start", "a", "a", "a", "quiet"]);
});

test("an event that was cut off is no event", async (t) => {
  const whole = event("b", "2");
  const api = await client(t, inTurn(saying(FAST + event("a", "1") + whole.slice(0, -20)), open(whole)));
  assert.deepEqual(await heard(t, api, 2, { since: "start" }), ["1@a", "2@b"]);
  assert.deepEqual(resumed(api), ["start", "a"]);
});

test("what nobody can tell any more has to be read anew", async (t) => {
  const gone: Script = (_, response) => problem(response, 410, "sync_token_expired");
  const unknown: Script = (_, response) => problem(response, 422, "invalid_sync_token");
  for (const refusal of [gone, unknown]) {
    const api = await client(t, inTurn(refusal, open(event("n", "new"))));
    assert.deepEqual(await heard(t, api, 2, { since: "old" }), ["resync", "new@n"]);
    assert.deepEqual(resumed(api), ["old", undefined]);
  }
});

test("a stream that broke before it said where it stood is read anew", async (t) => {
  const api = await client(t, inTurn(saying(FAST), open(event("a", "1"))));
  assert.deepEqual(await heard(t, api, 3), ["resync", "resync", "1@a"]);
});

test("silence is a lost connection", async (t) => {
  const api = await client(t, inTurn(open(FAST + event("a", "1")), open(event("b", "2"))));
  assert.deepEqual(await heard(t, api, 2, { since: "start", silence: 50 }), ["1@a", "2@b"]);
  await api.calls()[0]!.gone;
});

test("a refusal for good is thrown, and so is the end of the session", async (t) => {
  const suspended = await client(t, (_, response) => problem(response, 403, "account_suspended"));
  await assert.rejects(heard(t, suspended, 1), (error) => error instanceof ApiError && error.code === "account_suspended");
  const invalid = await client(t, (_, response) => problem(response, 422, "invalid"));
  await assert.rejects(heard(t, invalid, 1), (error) => error instanceof ApiError && error.status === 422);
  const nobody = { token: async () => Promise.reject(new SignedOut()), clear() {} };
  await assert.rejects(heard(t, await client(t, lost, { token: nobody }), 1), SignedOut);
});

test("another person's token ends it, and no connection is opened with it", async (t) => {
  const refused: Script = (_, response) => problem(response, 401, "invalid_token");
  const page: Script = (_, response) => json(response, 200, { items: [task({ title: "1" })], next: "a", more: true });
  for (const [options, first] of [[{}, saying(FAST + event("a", "1"))], [{ streaming: false }, page]] as const) {
    const people = ["alice", "bob"];
    const api = await client(t, inTurn(first, refused), { token: tokenSource(async () => jwt({ sub: people.shift() })) });
    await assert.rejects(heard(t, api, 2, { since: "start", ...options }), AnotherPerson);
    assert.deepEqual([api.calls().length, people.length], [2, 0]);
  }
});

test("a 401 is asked about a few times more: the next token may be a better one", async (t) => {
  t.mock.method(Math, "random", () => 0);
  const refused: Script = (_, response) => problem(response, 401, "invalid_token");
  const api = await client(t, inTurn(...Array<Script>(6).fill(refused), open(event("a", "1"))));
  assert.deepEqual(await heard(t, api, 2), ["resync", "1@a"]);
  const never = await client(t, refused);
  await assert.rejects(heard(t, never, 1), (error) => error instanceof ApiError && error.status === 401);
  assert.equal(never.calls().length, 8);
});

test("an abort ends it, wherever it is", async (t) => {
  for (const script of [open(FAST), lost, () => {}] as Script[]) {
    const stop = new AbortController();
    const api = await client(t, async (request, response) => {
      await script(request, response);
      setTimeout(() => stop.abort(), 20);
    });
    for await (const change of changes(api, { signal: stop.signal })) assert.equal(change.type, "resync");
  }
});

/** The change feed of an API whose tokens count what happened. */
const feed = (titles: string[], floor = 0): Script => ({ url }, response) => {
  const { searchParams, pathname } = new URL(url, "http://x");
  assert.equal(pathname, "/api/v1/tasks/changes");
  const since = Number(searchParams.get("since") ?? floor);
  if (since < floor) return problem(response, 410, "sync_token_expired");
  const items = titles.slice(since, since + 2).map((title) => task({ title }));
  json(response, 200, { items, next: `${since + items.length}`, more: since + items.length < titles.length });
};

test("without streams it asks again and again, from now on", async (t) => {
  const titles = ["1", "2", "3"];
  const api = await client(t, feed(titles));
  const poll = { streaming: false, pollEvery: 5 };
  const stop = new AbortController();
  const said: string[] = [];
  for await (const change of changes(api, { ...poll, signal: stop.signal })) {
    said.push(short(change));
    if (said.length === 1) titles.push("4", "5", "6");
    if (said.length === 4) break;
  }
  // Whoever stops after "4" gets it again rather than lose "5".
  assert.deepEqual(said, ["resync", "4@3", "5@5", "6@6"]);
});

test("without streams it goes on where it was, or says that it cannot", async (t) => {
  const poll = { streaming: false, pollEvery: 5 };
  assert.deepEqual(await heard(t, await client(t, feed(["1", "2", "3"])), 2, { ...poll, since: "1" }), ["2@1", "3@3"]);
  const purged = await client(t, feed(["1", "2", "3"], 2));
  assert.deepEqual(await heard(t, purged, 1, { ...poll, since: "1" }), ["resync"]);
});

test("a fetch that gives no streams is found out", async (t) => {
  const body = Object.getOwnPropertyDescriptor(Response.prototype, "body")!;
  delete (Response.prototype as { body?: unknown }).body;
  t.after(() => Object.defineProperty(Response.prototype, "body", body));
  assert.deepEqual(await heard(t, await client(t, feed(["1"])), 1, { since: "0" }), ["1@1"]);
});

function parsed(text: string, size = Infinity, lastEventId = "") {
  const events: StreamEvent[] = [];
  const stream = new EventStream((event) => events.push(event), lastEventId);
  const bytes = new TextEncoder().encode(text);
  for (let at = 0; at < bytes.length; at += size) stream.push(bytes.slice(at, at + size));
  return { events, stream };
}

test("a stream is read as the standard says, in whatever pieces it comes", () => {
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

test("an id counts with the event it came with, and an event has to end", () => {
  assert.equal(parsed("id: b\ndata: x\n", Infinity, "a").stream.lastEventId, "a");
  assert.throws(() => parsed("data: x\n".repeat(1024 * 1024 + 1), 64 * 1024), RangeError);
  assert.throws(() => parsed("d".repeat(1024 * 1024 + 1), 64 * 1024), RangeError);
  assert.equal(parsed(`${`data: ${"x".repeat(1000)}\n\n`.repeat(2000)}`, 64 * 1024).events.length, 2000);
});
