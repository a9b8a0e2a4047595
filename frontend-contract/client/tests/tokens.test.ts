import assert from "node:assert/strict";
import { test, type TestContext } from "node:test";
import { AnotherPerson, ApiError, bearerSession, cookieSession, createClient, IssuerError, SignedOut, type TokenSource, tokenSource, uuid } from "../../client.ts";
import { client, empty, inTurn, json, jwt, lost, problem, type Script, serve } from "./scripted.ts";

/** Controls both clocks. pass: seconds that elapse. set: seconds by which the wall clock is adjusted. */
function clocks(t: TestContext) {
  let [passed, set] = [0, 0];
  const [monotonic, wall] = [performance.now(), Date.now()];
  t.mock.method(performance, "now", () => monotonic + passed * 1000);
  t.mock.method(Date, "now", () => wall + (passed + set) * 1000);
  return {
    pass: (seconds: number) => void (passed += seconds),
    set: (seconds: number) => void (set += seconds),
  };
}

const sourceOf = (life: number, ahead = 0) => tokenSource(async () => jwt({ life, ahead }));

test("concurrent callers share one token request", async (t) => {
  const api = await client(t, empty);
  await Promise.all(Array.from({ length: 50 }, () => api.GET("/api/v1/tasks")));
  assert.equal(api.exchanges(), 1);
  assert.equal(new Set(api.calls().map(({ headers }) => headers.authorization)).size, 1);
});

test("a token is renewed a minute before it expires, even if the clocks differ", async (t) => {
  for (const ahead of [0, -86_400, 86_400]) {
    const time = clocks(t);
    const source = sourceOf(900, ahead);
    const first = await source.token();
    time.pass(839);
    assert.equal(await source.token(), first);
    time.pass(2);
    const second = await source.token();
    assert.notEqual(second, first);
    t.mock.restoreAll();
  }
});

test("adjusting the clock causes at most one extra renewal, and no expired token is used", async (t) => {
  const time = clocks(t);
  const source = sourceOf(900);
  const first = await source.token();
  time.set(-3600);
  const second = await source.token();
  assert.notEqual(second, first);
  assert.equal(await source.token(), second);
  time.pass(845);
  assert.notEqual(await source.token(), second);
});

test("a short-lived token is used for half its lifetime, a token of unknown lifetime once", async (t) => {
  const time = clocks(t);
  const short = sourceOf(20);
  const first = await short.token();
  time.pass(9);
  assert.equal(await short.token(), first);
  time.pass(2);
  assert.notEqual(await short.token(), first);
  let requested = 0;
  const opaque = tokenSource(async () => `opaque-${++requested}`);
  assert.equal(await opaque.token(), "opaque-1");
  assert.equal(await opaque.token(), "opaque-2");
});

test("if renewal fails, the old token is used until it expires", async (t) => {
  const time = clocks(t);
  let up = true;
  const source = tokenSource(async () => {
    if (!up) throw new TypeError("fetch failed");
    return jwt({ life: 900 });
  });
  const first = await source.token();
  up = false;
  time.pass(870);
  assert.equal(await source.token(), first);
  await assert.rejects(source.token({ refused: first }), TypeError);
  time.pass(31);
  await assert.rejects(source.token(), TypeError);
});

test("after a 401, requests are retried once and share one new token", async (t) => {
  const refused = new Set<string>();
  const api = await client(t, ({ headers }, response) => {
    const token = headers.authorization!;
    if (refused.size === 0 || refused.has(token)) {
      refused.add(token);
      problem(response, 401, "invalid_token");
    } else json(response, 200, { items: [], next_cursor: null });
  });
  await Promise.all(Array.from({ length: 20 }, () => api.GET("/api/v1/tasks")));
  assert.equal(refused.size, 1);
  assert.equal(api.exchanges(), 2);
});

test("a second 401 is thrown", async (t) => {
  const api = await client(t, (_, response) => problem(response, 401, "invalid_token"));
  await assert.rejects(api.GET("/api/v1/tasks"), (error) => error instanceof ApiError && error.code === "invalid_token");
  assert.deepEqual([api.calls().length, api.exchanges()], [2, 2]);
});

test("without a session, SignedOut is thrown and nothing is sent to the API", async (t) => {
  const { url, requests } = await serve(t, (_, response) => json(response, 401, { code: "UNAUTHORIZED" }));
  const byCookie = createClient({ baseUrl: url, token: cookieSession({ authUrl: `${url}/api/auth/` }) });
  await assert.rejects(byCookie.GET("/api/v1/tasks"), SignedOut);
  const byBearer = createClient({ baseUrl: url, token: bearerSession({ authUrl: url, sessionToken: () => null }) });
  await assert.rejects(byBearer.GET("/api/v1/tasks"), SignedOut);
  assert.deepEqual(requests.map((request) => request.url), ["/api/auth/token"]);
});

test("SignedOut during a renewal also discards the old token", async (t) => {
  const time = clocks(t);
  const answers = [async () => jwt(), async () => Promise.reject(new SignedOut()), async () => Promise.reject(new TypeError())];
  const source = tokenSource(() => answers.shift()!());
  await source.token();
  time.pass(850);
  await assert.rejects(source.token(), SignedOut);
  await assert.rejects(source.token(), TypeError);
});

test("a token requested before clear is not cached after it", async () => {
  const waiting: ((token: string) => void)[] = [];
  const source = tokenSource(() => new Promise((resolve) => waiting.push(resolve)));
  const early = source.token();
  source.clear();
  const late = source.token();
  const [old, fresh] = [jwt(), jwt()];
  waiting[1]!(fresh);
  assert.equal(await late, fresh);
  waiting[0]!(old);
  assert.equal(await early, old);
  assert.equal(await source.token(), fresh);
});

test("an aborted caller does not cancel the token request of others", async () => {
  let give: (token: string) => void = () => {};
  const source = tokenSource(() => new Promise((resolve) => (give = resolve)));
  const abort = new AbortController();
  const first = source.token({ signal: abort.signal });
  const second = source.token();
  abort.abort(new Error("cancelled"));
  await assert.rejects(first, /cancelled/);
  const token = jwt();
  give(token);
  assert.equal(await second, token);
});

test("the cookie and the session token are sent to the issuer", async (t) => {
  const { url, requests } = await serve(t, (_, response) => json(response, 200, { token: jwt() }));
  await cookieSession({ authUrl: url, cookie: "better-auth.session_token=s.h" }).token();
  await bearerSession({ authUrl: url, sessionToken: async () => "s.h" }).token();
  assert.equal(requests[0]!.headers.cookie, "better-auth.session_token=s.h");
  assert.equal(requests[1]!.headers.authorization, "Bearer s.h");
});

test("transient errors of the issuer are retried, others throw IssuerError", async (t) => {
  const { url } = await serve(t, inTurn(
    lost,
    (_, response) => void response.writeHead(429, { "X-Retry-After": "0" }).end(),
    (_, response) => json(response, 200, { token: jwt() }),
    (_, response) => void response.writeHead(404).end(),
    (_, response) => void response.writeHead(500).end(),
    (_, response) => void response.writeHead(200).end("<html>"),
  ));
  const source = cookieSession({ authUrl: url });
  await source.token();
  source.clear();
  await assert.rejects(source.token(), (error) => error instanceof IssuerError && /jwt plugin/.test(error.message));
  await assert.rejects(source.token(), (error) => error instanceof IssuerError && error.status === 500);
  await assert.rejects(source.token(), (error) => error instanceof IssuerError && error.status === 200);
});

/** A client whose issuer returns tokens of `person.now`: simulates a cookie that another tab can replace. */
async function shared(t: TestContext, script: Script) {
  const person = { now: "alice" };
  const { url, requests } = await serve(t, (request, response) => {
    if (request.url === "/api/auth/token") json(response, 200, { token: jwt({ sub: person.now }) });
    else return script(request, response);
  });
  const token = cookieSession({ authUrl: `${url}/api/auth` });
  const senders = () => requests.flatMap(({ headers }) => headers.authorization?.split(" ")[1] ?? []).map(subject);
  return { person, token, api: createClient({ baseUrl: url, token, retries: 0 }), senders };
}

const subject = (token: string) => (JSON.parse(Buffer.from(token.split(".")[1]!, "base64url").toString()) as { sub: string }).sub;

test("another user's token throws AnotherPerson until a token of the first user is returned", async (t) => {
  const time = clocks(t);
  const people = ["alice", "bob", "bob", "alice", "alice"];
  const source = tokenSource(async () => jwt({ sub: people.shift()! }));
  const first = await source.token();
  time.pass(870);
  // The old token would be valid for another 30 seconds.
  await assert.rejects(source.token(), AnotherPerson);
  await assert.rejects(source.token(), AnotherPerson);
  const again = await source.token();
  assert.notEqual(again, first);
  assert.equal(subject(again), "alice");
  source.clear();
  assert.equal(subject(await source.token()), "alice");
});

test("a user is identified by issuer and subject, and tokens must contain both", async () => {
  const first = jwt({ sub: "alice", iss: "https://one.test" });
  const others = [
    jwt({ sub: "bob", iss: "https://one.test" }),
    jwt({ sub: "alice", iss: "https://other.test" }),
    jwt({ sub: "alice" }),
    jwt({ sub: "", iss: "https://one.test" }),
    jwt({ sub: 7, iss: "https://one.test" }),
    jwt({ sub: undefined, iss: "https://one.test" }),
    "opaque",
    "e30.e30.c2ln",
    "",
  ];
  for (const other of others) {
    const tokens = [first, other];
    const source = tokenSource(async () => tokens.shift()!);
    assert.equal(await source.token(), first);
    await assert.rejects(source.token({ refused: first }), AnotherPerson, other);
  }
});

test("the subject option also applies to the first token", async (t) => {
  for (const token of [jwt({ sub: "bob" }), "opaque", jwt({ sub: undefined })]) {
    const api = await client(t, empty, { token: tokenSource(async () => token, { subject: "alice" }) });
    await assert.rejects(api.GET("/api/v1/tasks"), AnotherPerson);
    assert.equal(api.calls().length, 0);
  }
  for (const sub of ["ä", "50%", "日本", "\u{1f600}"]) {
    const token = jwt({ sub });
    assert.equal(await tokenSource(async () => token, { subject: sub }).token(), token);
  }
  const { url } = await serve(t, (_, response) => json(response, 200, { token: jwt({ sub: "bob" }) }));
  await assert.rejects(cookieSession({ authUrl: url, subject: "alice" }).token(), AnotherPerson);
  await assert.rejects(bearerSession({ authUrl: url, sessionToken: () => "s.h", subject: "alice" }).token(), AnotherPerson);
  await assert.rejects(tokenSource(async () => jwt(), { subject: "" }).token(), AnotherPerson);
});

test("a write is not retried as another user after a 401", async (t) => {
  const { person, api, senders } = await shared(t, (request, response) =>
    request.method === "GET" ? empty(request, response) : problem(response, 401, "invalid_token"));
  await api.GET("/api/v1/tasks");
  person.now = "bob";
  await assert.rejects(api.POST("/api/v1/tasks", { body: { title: "Alice's draft" } }), AnotherPerson);
  await assert.rejects(api.fetch("/api/v1/tasks", { method: "POST", body: "{}" }), AnotherPerson);
  assert.deepEqual(senders(), ["alice", "alice"]);
});

test("all callers waiting for another user's token get AnotherPerson", async (t) => {
  const { person, token, api, senders } = await shared(t, empty);
  await api.GET("/api/v1/tasks");
  token.clear();
  person.now = "bob";
  const waiting = Array.from({ length: 20 }, () => api.PUT("/api/v1/tasks/{id}", { params: { path: { id: uuid() } }, body: { title: "x" } }));
  for (const { status, reason } of (await Promise.allSettled(waiting)) as PromiseRejectedResult[]) {
    assert.equal(status, "rejected");
    assert.ok(reason instanceof AnotherPerson);
  }
  assert.deepEqual(senders(), ["alice"]);
});

test("a late response to an earlier token request does not change the user", async () => {
  const waiting: ((token: string) => void)[] = [];
  const source = tokenSource(() => new Promise((resolve) => waiting.push(resolve)));
  const early = source.token();
  source.clear();
  const late = source.token();
  waiting[1]!(jwt({ sub: "bob" }));
  assert.equal(subject(await late), "bob");
  waiting[0]!(jwt({ sub: "alice" }));
  await assert.rejects(early, AnotherPerson);
});

test("a client sends as one user, even if its source returns tokens of several", async (t) => {
  let now = "alice";
  const token: TokenSource = { token: async () => jwt({ sub: now }), clear() {} };
  const api = await client(t, inTurn(empty, empty, (_, response) => void ((now = "bob"), problem(response, 401, "invalid_token"))), { token });
  await api.GET("/api/v1/tasks");
  now = "bob";
  await assert.rejects(api.GET("/api/v1/tasks"), AnotherPerson);
  now = "alice";
  await api.GET("/api/v1/tasks");
  await assert.rejects(api.GET("/api/v1/tasks"), AnotherPerson);
  assert.equal(api.calls().length, 3);
});

test("sources with different cookies do not share tokens", async (t) => {
  const { url } = await serve(t, ({ headers }, response) => json(response, 200, { token: jwt({ sub: headers.cookie! }) }));
  const sources = ["alice", "bob", "alice"].map((cookie) => cookieSession({ authUrl: url, cookie }));
  const tokens = await Promise.all(sources.map((source) => source.token()));
  assert.deepEqual(tokens.map(subject), ["alice", "bob", "alice"]);
  for (const [index, source] of sources.entries()) assert.equal(await source.token(), tokens[index]);
});
