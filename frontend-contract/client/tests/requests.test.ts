import assert from "node:assert/strict";
import { test } from "node:test";
import { ApiError, Conflict, pages, TimedOut, update, uuid } from "../../client.ts";
import { client, empty, inTurn, json, lost, problem, type Script, task } from "./scripted.ts";

const PATH = { path: { id: task().id } };
const busy: Script = (_, response) => problem(response, 503, "database_busy", { "Retry-After": "0" });
const created: Script = (_, response) => json(response, 201, task());
const found: Script = (_, response) => json(response, 200, task());
const isError = (status: number, code: string) => (error: unknown) =>
  error instanceof ApiError && error.status === status && error.code === code;

/** Closes the connection before the whole body is sent. */
const torn: Script = (_, response) => {
  response.writeHead(201, { "Content-Type": "application/json", "Content-Length": "100" });
  response.write("{", () => response.destroy());
};

test("an ApiError contains all members of the problem", async (t) => {
  const errors = [{ loc: ["body", "title"], msg: "Field required", type: "missing" }];
  const api = await client(t, (_, response) =>
    json(response, 422, { title: "No", detail: "See errors.", code: "invalid", request_id: "r7", errors }));
  await assert.rejects(api.POST("/api/v1/tasks", { body: { title: "" } }), (error) => {
    assert.ok(error instanceof ApiError);
    const { name, message, status, code, requestId, retryAfter } = error;
    assert.deepEqual([name, message, status, code, requestId, retryAfter], ["ApiError", "See errors.", 422, "invalid", "r7", null]);
    assert.deepEqual(error.errors, errors);
    return true;
  });
});

test("an error response of a proxy is an ApiError", async (t) => {
  const api = await client(t, (_, response) => void response.writeHead(500, { "X-Request-ID": "p1" }).end("<html>"));
  await assert.rejects(api.GET("/api/v1/tasks"), (error) => isError(500, "status_500")(error) && (error as ApiError).requestId === "p1");
});

for (const [name, trouble] of Object.entries({ lost, busy, torn })) {
  test(`a POST is retried with the same key and body: ${name}`, async (t) => {
    const api = await client(t, inTurn(trouble, trouble, created));
    const { data } = await api.POST("/api/v1/tasks", { body: { title: "Buy milk" } });
    assert.equal(data.title, "Buy milk");
    const calls = api.calls();
    assert.equal(calls.length, 3);
    assert.match(String(calls[0]!.headers["idempotency-key"]), /^[0-9a-f-]{36}$/);
    assert.equal(new Set(calls.map(({ headers, body }) => `${headers["idempotency-key"]} ${body}`)).size, 1);
  });
}

test("each batch has its own key, unless the caller sets one", async (t) => {
  const api = await client(t, (_, response) => json(response, 200, { items: [null] }));
  const body = { operations: [{ op: "delete" as const, id: task().id }] };
  for (const header of [{}, {}, { "Idempotency-Key": "mine" }]) await api.POST("/api/v1/tasks/batch", { body, params: { header } });
  const keys = api.calls().map(({ headers }) => headers["idempotency-key"]);
  assert.equal(new Set(keys).size, 3);
  assert.equal(keys[2], "mine");
});

test("a 409 is retried if the first attempt is still being processed", async (t) => {
  const api = await client(t, inTurn(lost, (_, response) => problem(response, 409, "idempotency_key_in_use"), created));
  await api.POST("/api/v1/tasks", { body: { title: "x" } });
  assert.equal(api.calls().length, 3);
  const other = await client(t, (_, response) => problem(response, 409, "conflict"));
  await assert.rejects(other.POST("/api/v1/tasks", { body: { title: "x" } }), isError(409, "conflict"));
  assert.equal(other.calls().length, 1);
});

test("requests that are not repeatable are not retried", async (t) => {
  for (const trouble of [lost, busy]) {
    const api = await client(t, trouble);
    await assert.rejects(api.POST("/api/v1/tags", { body: { name: "home" } }));
    await assert.rejects(api.PATCH("/api/v1/tasks/{id}", { params: PATH, body: { status: "done" } }));
    await assert.rejects(api.POST("/api/v1/tasks/{id}/restore", { params: PATH }));
    assert.equal(api.calls().length, 3);
  }
});

test("repeatable requests are retried", async (t) => {
  for (const trouble of [lost, busy]) {
    let turn = 0;
    const api = await client(t, (request, response) => (turn++ % 2 ? found : trouble)(request, response));
    await api.GET("/api/v1/tasks/{id}", { params: PATH });
    await api.PUT("/api/v1/tasks/{id}", { params: PATH, body: { title: "x" } });
    await api.DELETE("/api/v1/tasks/{id}", { params: PATH });
    await api.PATCH("/api/v1/tasks/{id}", { params: { ...PATH, header: { "If-Match": '"1"' } }, body: { status: "done" } });
    assert.deepEqual(api.calls().map(({ method }) => method), ["GET", "GET", "PUT", "PUT", "DELETE", "DELETE", "PATCH", "PATCH"]);
  }
});

test("a rate-limited PATCH is retried", async (t) => {
  const api = await client(t, inTurn((_, response) => problem(response, 429, "too_many_requests", { "Retry-After": "0" }), found));
  await api.PATCH("/api/v1/tasks/{id}", { params: PATH, body: { status: "done" } });
  assert.equal(api.calls().length, 2);
});

test("a 500 is not retried", async (t) => {
  const api = await client(t, (_, response) => problem(response, 500, "internal_error"));
  await assert.rejects(api.GET("/api/v1/tasks"), isError(500, "internal_error"));
  assert.equal(api.calls().length, 1);
});

test("retries are limited, and a long Retry-After is not waited for", async (t) => {
  const api = await client(t, busy, { retries: 2 });
  await assert.rejects(api.GET("/api/v1/tasks"), isError(503, "database_busy"));
  assert.equal(api.calls().length, 3);
  const closed = await client(t, (_, response) => problem(response, 503, "unavailable", { "Retry-After": "3600" }));
  await assert.rejects(closed.GET("/api/v1/tasks"), (error) => error instanceof ApiError && error.retryAfter === 3600);
  assert.equal(closed.calls().length, 1);
});

test("a date in Retry-After is compared with the server's clock", async (t) => {
  const [then, soon] = ["Tue, 24 Nov 2020 10:00:00 GMT", "Tue, 24 Nov 2020 10:00:45 GMT"];
  const api = await client(t, (_, response) => {
    response.sendDate = false;
    problem(response, 503, "unavailable", { Date: then, "Retry-After": soon });
  });
  await assert.rejects(api.GET("/api/v1/tasks"), (error) => error instanceof ApiError && error.retryAfter === 45);
});

test("an abort ends a retry wait, a pending request and an unfinished response", { timeout: 15_000 }, async (t) => {
  const scripts: Script[] = [
    (_, response) => problem(response, 503, "unavailable", { "Retry-After": "20" }),
    () => {},
    (_, response) => void response.writeHead(200, { "Content-Type": "application/json" }).write("{"),
  ];
  for (const script of scripts) {
    const stop = new AbortController();
    const api = await client(t, async (request, response) => {
      await script(request, response);
      setTimeout(() => stop.abort(new Error("cancelled")), 20);
    });
    await assert.rejects(api.GET("/api/v1/tasks", { signal: stop.signal }), /cancelled/);
    assert.equal(api.calls().length, 1);
  }
  const api = await client(t, empty);
  await assert.rejects(api.GET("/api/v1/tasks", { signal: AbortSignal.abort(new Error("too late")) }), /too late/);
  assert.equal(api.calls().length, 0);
});

test("a request times out without a response", async (t) => {
  const api = await client(t, inTurn(() => {}, empty), { timeout: 500 });
  await api.GET("/api/v1/tasks");
  assert.ok(api.calls().length > 1);
  let arrive = () => {};
  const arrived = new Promise<void>((resolve) => (arrive = resolve));
  const mute = await client(t, () => arrive(), { retries: 0 });
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const refused = assert.rejects(mute.GET("/api/v1/tasks"), TimedOut);
  await arrived;
  t.mock.timers.tick(30_000);
  await refused;
  await mute.calls()[0]!.closed; // the connection is closed
});

test("redirects are not followed", async (t) => {
  const other = await client(t, empty);
  const api = await client(t, (_, response) => void response.writeHead(307, { Location: `${other.url}/api/v1/tasks` }).end(), { retries: 0 });
  await assert.rejects(api.GET("/api/v1/tasks"));
  assert.equal(other.calls().length, 0);
});

test("pages are fetched on demand, each with the filters", async (t) => {
  const api = await client(t, ({ url }, response) => {
    const cursor = new URL(url, "http://x").searchParams.get("cursor");
    const at = Number(cursor ?? 0);
    json(response, 200, { items: [task({ title: `${at}` }), task({ title: `${at}b` })], next_cursor: at < 2 ? `${at + 1}` : null });
  });
  const titles: string[] = [];
  for await (const { title } of pages(api, "/api/v1/tasks", { status: "todo", tag: ["a", "b"] })) titles.push(title);
  assert.deepEqual(titles, ["0", "0b", "1", "1b", "2", "2b"]);
  assert.ok(api.calls().every(({ url }) => url.includes("status=todo&tag=a&tag=b")));
  for await (const _ of pages(api, "/api/v1/tasks")) break;
  assert.equal(api.calls().length, 4);
});

test("updating an outdated task throws Conflict with the current task", async (t) => {
  const theirs = task({ version: 4, title: "Buy bread" });
  const stale: Script = ({ method }, response) =>
    method === "PATCH" ? problem(response, 412, "stale_version") : json(response, 200, theirs);
  const api = await client(t, stale);
  await assert.rejects(update(api, task({ version: 3 }), { title: "Buy tea" }), (error) => {
    assert.ok(error instanceof Conflict);
    assert.deepEqual([error.status, error.code, error.current], [412, "stale_version", theirs]);
    return true;
  });
  assert.equal(api.calls()[0]!.headers["if-match"], '"3"');
  const gone = await client(t, (_, response) => problem(response, 404, "not_found"));
  await assert.rejects(update(gone, task(), { title: "x" }), (error) => error instanceof Conflict && error.current === null);
});

test("a retry after a lost response is no conflict", async (t) => {
  const done = task({ version: 2, due_at: "2026-12-01T18:00:00Z", tags: ["Home", "a"], status: "todo" });
  const api = await client(t, inTurn(lost, (_, response) => problem(response, 412, "stale_version"), (_, response) => json(response, 200, done)));
  const changes = { due_at: "2026-12-01T19:00:00+01:00", tags: ["A", "home"], status: null };
  assert.deepEqual(await update(api, task(), changes), done);
});

test("UUIDs can be generated without crypto", (t) => {
  const shape = /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/;
  for (const crypto of [globalThis.crypto, { getRandomValues: (bytes: Uint8Array) => bytes.fill(255) }, undefined]) {
    const real = Object.getOwnPropertyDescriptor(globalThis, "crypto")!;
    Object.defineProperty(globalThis, "crypto", { value: crypto, configurable: true });
    t.after(() => Object.defineProperty(globalThis, "crypto", real));
    assert.match(uuid(), shape);
    Object.defineProperty(globalThis, "crypto", real);
  }
});
