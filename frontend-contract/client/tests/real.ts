/** Tests with a real issuer and a real API, at `AUTH_URL` and `API_URL`. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { AnotherPerson, ApiError, bearerSession, changes, Conflict, cookieSession, createClient, pages, SignedOut, update, uuid } from "../../client.ts";
import { signUp } from "./people.ts";

const { AUTH_URL: authUrl = "", API_URL: baseUrl = "" } = process.env;

async function signedIn() {
  const session = await signUp(authUrl);
  const token = cookieSession({ authUrl, cookie: session.cookie });
  return { ...session, token, api: createClient({ baseUrl, token }) };
}

test("the session cookie and the session token identify the same user", async () => {
  const { api, bearer } = await signedIn();
  const phone = createClient({ baseUrl, token: bearerSession({ authUrl, sessionToken: () => bearer }) });
  const [one, other] = await Promise.all([api.GET("/api/v1/users/me"), phone.GET("/api/v1/users/me")]);
  assert.equal(one.data.id, other.data.id);
});

test("a task can be created, changed, deleted, restored and replaced", async () => {
  const { api } = await signedIn();
  const { data: task, response } = await api.POST("/api/v1/tasks", { body: { title: "Buy milk", tags: ["home"] } });
  assert.equal(response.status, 201);
  const params = { path: { id: task.id } };
  const done = await update(api, task, { status: "done" });
  assert.equal(done.version, 2);
  await assert.rejects(update(api, task, { status: "in_progress" }), (error) =>
    error instanceof Conflict && error.current?.version === 2);
  assert.equal((await update(api, task, { status: "done", tags: ["HOME"] })).version, 2, "the task already has these values, so there is no conflict");
  assert.equal((await api.DELETE("/api/v1/tasks/{id}", { params })).data, undefined);
  await assert.rejects(update(api, done, { title: "x" }), (error) => error instanceof Conflict && error.current === null);
  assert.equal((await api.POST("/api/v1/tasks/{id}/restore", { params })).data.title, "Buy milk");
  assert.equal((await api.PUT("/api/v1/tasks/{id}", { params, body: { title: "Buy tea" } })).data.status, "todo");
});

test("a retried request is executed once, also after a lost response", async () => {
  const { token } = await signedIn();
  let sent = 0;
  const losing = async (input: string, init?: RequestInit) => {
    const response = await fetch(input, init);
    if (init?.method === "POST" && ++sent < 3) throw new TypeError("the response was lost");
    return response;
  };
  const api = createClient({ baseUrl, token, fetch: losing });
  const { response } = await api.POST("/api/v1/tasks", { body: { title: "once" } });
  assert.equal(response.headers.get("Idempotency-Replayed"), "true");
  assert.equal((await api.GET("/api/v1/tasks")).data.items.length, 1);
  const operations = [{ op: "create" as const, task: { title: "twice?" } }, { op: "create" as const, id: uuid(), task: { title: "no" } }];
  sent = 1;
  await api.POST("/api/v1/tasks/batch", { body: { operations } });
  assert.equal((await api.GET("/api/v1/tasks")).data.items.length, 3);
});

test("pages yields every task in order", async () => {
  const { api } = await signedIn();
  const operations = Array.from({ length: 25 }, (_, i) => ({ op: "create" as const, task: { title: `task ${String(i).padStart(2, "0")}` } }));
  await api.POST("/api/v1/tasks/batch", { body: { operations } });
  const titles: string[] = [];
  for await (const { title } of pages(api, "/api/v1/tasks", { limit: 10, sort: "title" })) titles.push(title);
  assert.deepEqual(titles, operations.map(({ task }) => task.title));
});

test("an error contains the code and the invalid member", async () => {
  const { api } = await signedIn();
  await assert.rejects(api.POST("/api/v1/tasks", { body: { title: "" } }), (error) => {
    assert.ok(error instanceof ApiError);
    assert.deepEqual([error.status, error.code, error.errors[0]?.loc], [422, "invalid", ["body", "title"]]);
    assert.ok(error.requestId);
    return true;
  });
  const invalid = createClient({ baseUrl, token: { token: async () => "a.b.c", clear() {} } });
  await assert.rejects(invalid.GET("/api/v1/tasks"), (error) => error instanceof ApiError && error.code === "invalid_token");
});

test("after a sign-out, the next token request throws SignedOut", async () => {
  const { api, token, signOut } = await signedIn();
  await api.GET("/api/v1/tasks");
  await signOut();
  await api.GET("/api/v1/tasks");
  token.clear();
  await assert.rejects(api.GET("/api/v1/tasks"), SignedOut);
});

test("requests are not sent as another user who signs in in the same browser", async () => {
  const [alice, bob] = [await signUp(authUrl), await signUp(authUrl)];
  let { cookie } = alice;
  const browser = (input: string, init?: RequestInit) => fetch(input, { ...init, headers: { ...init?.headers, Cookie: cookie } });
  const token = cookieSession({ authUrl, fetch: browser });
  const api = createClient({ baseUrl, token });
  await api.POST("/api/v1/tasks", { body: { title: "Alice's" } });
  // Bob's sign-in replaces the cookie, and the token has to be renewed.
  ({ cookie } = bob);
  token.clear();
  await assert.rejects(api.POST("/api/v1/tasks", { body: { title: "Alice's draft" } }), AnotherPerson);
  await assert.rejects(changes(api)[Symbol.asyncIterator]().next(), AnotherPerson);
  const bobs = createClient({ baseUrl, token: cookieSession({ authUrl, cookie }) });
  assert.deepEqual((await bobs.GET("/api/v1/tasks")).data.items, []);
  ({ cookie } = alice);
  await api.POST("/api/v1/tasks", { body: { title: "Alice's draft" } });
  assert.equal((await api.GET("/api/v1/tasks")).data.items.length, 2);
});

test("a rejected token is replaced", async () => {
  const { token } = await signedIn();
  let requested = 0;
  const stale = { token: (options?: { refused?: string }) => (requested++ ? token.token(options) : Promise.resolve("a.b.c")), clear() {} };
  const api = createClient({ baseUrl, token: stale });
  assert.deepEqual((await api.GET("/api/v1/tasks")).data.items, []);
  assert.equal(requested, 2);
});

test("raw requests are authenticated and throw the same errors", async () => {
  const { api } = await signedIn();
  const response = await api.fetch("/api/v1/tasks", { method: "POST", body: '{"title": "x"}', headers: { "Content-Type": "application/json" } });
  assert.equal(response.status, 201);
  await assert.rejects(api.fetch("/api/v1/nothing"), (error) => error instanceof ApiError && error.code === "not_found");
});

for (const streaming of "body" in Response.prototype ? [true, false] : [false]) {
  test(`changes made elsewhere arrive ${streaming ? "over a stream" : "by polling"}`, async () => {
    const { api } = await signedIn();
    const { data: before } = await api.POST("/api/v1/tasks", { body: { title: "before" } });
    const changed: string[] = [];
    let token = "";
    for await (const change of changes(api, { streaming, pollEvery: 20 })) {
      if (change.type === "resync") {
        await api.POST("/api/v1/tasks", { body: { title: "after" } });
        await api.DELETE("/api/v1/tasks/{id}", { params: { path: { id: before.id } } });
      } else {
        changed.push(`${change.task.title}${change.task.deleted_at ? " deleted" : ""}`);
        token = change.token;
        if (changed.length === 2) break;
      }
    }
    assert.deepEqual(changed, ["after", "before deleted"]);
    await update(api, (await api.GET("/api/v1/tasks")).data.items[0]!, { title: "later" });
    for await (const change of changes(api, { streaming, pollEvery: 20, since: token })) {
      if (change.type === "task") changed.push(change.task.title);
      if (change.type === "resync" || changed.includes("later")) break;
    }
    assert.equal(changed.at(-1), "later");
  });
}
