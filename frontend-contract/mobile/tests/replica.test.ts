import assert from "node:assert/strict";
import { DatabaseSync } from "node:sqlite";
import { type TestContext, test } from "node:test";
import { AnotherPerson, bearerSession, createClient, SignedOut, tokenSource } from "../../client.ts";
import { NotHere, Replica } from "../replica.ts";
import { type SQLite, sqliteStore } from "../store.ts";
import { FakeApi } from "./fake-api.ts";
import { everyPhase, FAULTS, journey } from "./phases.ts";
import { faults, type Fetch, Flash, World } from "./world.ts";

const baseUrl = "http://api.test";
const token = tokenSource(async () => "t");

/** node:sqlite with the interface of expo-sqlite. */
function sqlite(): SQLite {
  const database = new DatabaseSync(":memory:");
  return {
    execSync: (source) => database.exec(source),
    runSync: (source, ...params) => database.prepare(source).run(...params),
    getAllSync: <Row>(source: string) => database.prepare(source).all() as Row[],
    withTransactionSync(task) {
      database.exec("BEGIN");
      try {
        task();
        database.exec("COMMIT");
      } catch (error) {
        database.exec("ROLLBACK");
        throw error;
      }
    },
  };
}

/** A phone and another client of one user, and the batches that the phone sent. */
async function phone({ api = new FakeApi(), store = sqliteStore(sqlite()), person = "p" } = {}) {
  const batches: any[][] = [];
  /** Called once, before the next batch reaches the API, and before its response reaches the phone. */
  const once: { beforeRequest?: () => unknown; beforeResponse?: () => unknown } = {};
  const fetch = async (input: string, init?: RequestInit) => {
    if (!input.endsWith("/batch")) return api.fetch(input, init);
    const { beforeRequest, beforeResponse } = once;
    delete once.beforeRequest;
    delete once.beforeResponse;
    batches.push(JSON.parse(init!.body as string).operations);
    await beforeRequest?.();
    const response = await api.fetch(input, init);
    await beforeResponse?.();
    return response;
  };
  const client = createClient({ baseUrl, token, fetch, retries: 0 });
  const web = createClient({ baseUrl, token, fetch: api.fetch, retries: 0 });
  const replica = await Replica.open({ client, store, person });
  const patch = (id: string, body: object) => web.PATCH("/api/v1/tasks/{id}", { params: { path: { id } }, body });
  const remove = (id: string) => web.DELETE("/api/v1/tasks/{id}", { params: { path: { id } } });
  return { api, store, web, replica, batches, once, patch, remove, task: (id: string) => replica.tasks().get(id) };
}

test("phones and server converge after random failures, and no stored edit is lost", async (t) => {
  for (let seed = 1; seed <= 50; seed++) {
    const api = new FakeApi();
    let ids = 0;
    t.mock.method(crypto, "randomUUID", () => `00000000-0000-4000-8000-${String(++ids).padStart(12, "0")}`);
    const world = new World(seed, api.fetch, { baseUrl, token });
    // No purge while a response is unknown: a create would be repeated after a purge, even if the task was deleted.
    const purge = () => void (world.phones.some((phone) => phone.inDoubt) || api.purge());
    t.diagnostic(`seed ${seed}`);
    await world.run(60, [purge, () => api.forgetKeys()]);
  }
  assert.deepEqual(Object.keys(faults).sort(), [
    "killed after it was stored", "killed after the server acted", "killed before it was stored", "killed before the request",
    "lost after the server acted", "lost before the request", "lost in the middle of the response",
  ]);
});

test("a sync completes after a failure of any request, and after two failures in a row", async (t) => {
  t.mock.method(Math, "random", () => 0);
  const place = () => {
    const api = new FakeApi();
    // Responds as the issuer, too.
    const fetch: Fetch = async (input, init) =>
      input.endsWith("/token") ? Response.json({ token: "e30.e30.c2ln" }) : api.fetch(input, init);
    const session = (fetch: Fetch) => bearerSession({ authUrl: `${baseUrl}/api/auth`, sessionToken: () => "s.h", fetch });
    return { baseUrl, fetch, session, web: createClient({ baseUrl, token, fetch: api.fetch }), flash: new Flash(), news: 4 };
  };
  const requests = await everyPhase(place, FAULTS, (phase) => t.diagnostic(phase));
  const [tokenRequest, feed, batch] = ["GET /api/auth/token", "GET /api/v1/tasks/changes", "POST /api/v1/tasks/batch"];
  assert.deepEqual(requests, [feed, feed, feed, batch, feed].flatMap((request) => [tokenRequest, request]));
  for (const first of requests.keys()) {
    for (const one of FAULTS) {
      for (const dies of [false, true]) {
        await journey(place(), new Map([[first, one], [first + 1, { when: "before its response", dies }]]));
      }
    }
  }
});

test("an edit is displayed immediately, and is pending until the feed contains it", async () => {
  const { replica, task, web } = await phone();
  const id = await replica.create({ title: "Buy milk", due_at: "2020-01-01T00:00:00Z" });
  assert.deepEqual([task(id)?.title, task(id)?.pending, task(id)?.is_overdue, task(id)?.priority], ["Buy milk", true, true, "normal"]);
  await replica.update(id, { status: "done", title: "Buy tea" });
  assert.deepEqual([task(id)?.title, task(id)?.is_overdue, typeof task(id)?.completed_at], ["Buy tea", false, "string"]);
  assert.equal(replica.tasks(), replica.tasks(), "the same object until something changes");
  await replica.sync();
  assert.deepEqual([task(id)?.pending, task(id)?.version, replica.unsent], [false, 1, 0]);
  assert.equal((await web.GET("/api/v1/tasks")).data.items[0]?.title, "Buy tea");
});

test("unsent edits of a task are combined", async () => {
  const { replica, batches } = await phone();
  const [kept, dropped] = [await replica.create({ title: "a" }), await replica.create({ title: "b" })];
  await replica.update(kept, { title: "c" });
  await replica.update(kept, { title: "c" });
  await replica.update(dropped, { title: "d" });
  await replica.delete(dropped);
  await replica.sync();
  assert.deepEqual(batches.map((batch) => batch.map(({ op, id, task }) => [op, id, task.title])), [[["create", kept, "c"]]]);
  await replica.update(kept, { title: "x", tags: ["a"] });
  await replica.update(kept, { title: "c", priority: "high" });
  await replica.sync();
  assert.deepEqual(batches[1]![0].changes, { tags: ["a"], priority: "high" }, "a reverted change is not sent");
});

test("edits of different members are merged; in the same member the remote value wins and the local one is offered", async () => {
  const { replica, patch, task } = await phone();
  const id = await replica.create({ title: "one", description: "old" });
  await replica.sync();
  await replica.update(id, { title: "ours", description: "ours", priority: "high", tags: ["b", "A"] });
  await patch(id, { title: "theirs", description: "ours", status: "in_progress", tags: ["a", "B"] });
  await replica.sync();
  const { title, description, priority, status } = task(id)!;
  assert.deepEqual([title, description, priority, status], ["theirs", "ours", "high", "in_progress"]);
  const [offer] = replica.offers();
  assert.deepEqual([offer?.reason, offer?.changes], ["changed", { title: "ours" }]);
  await replica.accept(offer!);
  await replica.sync();
  assert.deepEqual([task(id)?.title, replica.offers()], ["ours", []]);
});

test("a remote change that arrives just before the batch is detected", async () => {
  const { replica, patch, task, once } = await phone();
  const id = await replica.create({ title: "one" });
  await replica.sync();
  await replica.update(id, { title: "ours", priority: "high" });
  once.beforeRequest = () => patch(id, { title: "theirs" });
  await replica.sync();
  assert.deepEqual([task(id)?.title, task(id)?.priority], ["theirs", "high"]);
  assert.deepEqual(replica.offers().map(({ changes }) => changes), [{ title: "ours" }]);
});

test("a batch with a lost response is not executed again and causes no conflict with later remote changes", async () => {
  for (const restarted of [false, true]) {
    const { api, store, replica: first, patch, once } = await phone();
    const id = await first.create({ title: "one" });
    await first.sync();
    await first.update(id, { title: "ours" });
    const lost = () => Promise.reject(new TypeError("network"));
    once.beforeResponse = lost;
    await assert.rejects(first.sync(), TypeError);
    await patch(id, { title: "theirs" });
    const { replica } = restarted ? await phone({ api, store }) : { replica: first };
    await replica.update(id, { priority: "high" });
    await replica.sync();
    const task = replica.tasks().get(id);
    assert.deepEqual([task?.title, task?.priority, task?.version, replica.offers()], ["theirs", "high", 4, []]);
  }
});

test("an edit of a deleted task is offered, and accepting it creates the task again", async () => {
  const { replica, remove, task } = await phone();
  const id = await replica.create({ title: "one" });
  await replica.sync();
  await replica.update(id, { title: "two" });
  await remove(id);
  await replica.sync();
  assert.equal(task(id), undefined);
  const [offer] = replica.offers();
  assert.deepEqual([offer?.reason, offer?.changes], ["deleted", { title: "two" }]);
  await replica.accept(offer!);
  await replica.sync();
  assert.deepEqual([...replica.tasks().values()].map(({ title }) => title), ["two"]);
});

test("a delete wins over remote changes", async () => {
  const { replica, patch, web } = await phone();
  const id = await replica.create({ title: "one" });
  await replica.sync();
  await patch(id, { title: "two" });
  await replica.delete(id);
  await assert.rejects(replica.update(id, { title: "three" }), NotHere);
  await replica.sync();
  assert.deepEqual((await web.GET("/api/v1/tasks")).data.items, []);
});

test("a rejected edit is offered with its errors and does not block other edits", async () => {
  const { replica } = await phone();
  await replica.create({ title: " " });
  const fine = await replica.create({ title: "fine" });
  await replica.sync();
  assert.deepEqual([...replica.tasks().keys()], [fine]);
  const [offer] = replica.offers();
  assert.deepEqual([offer?.reason, offer?.changes.title, offer?.errors.length], ["refused", " ", 1]);
  await replica.dismiss(offer!);
  assert.deepEqual(replica.offers(), []);
});

test("an expired sync token causes a full read and loses no edit", async () => {
  const { api, replica, remove, task } = await phone();
  const [gone, kept] = [await replica.create({ title: "gone" }), await replica.create({ title: "kept" })];
  await replica.sync();
  await replica.update(kept, { title: "edited" });
  const late = await replica.create({ title: "late" });
  await remove(gone);
  api.purge();
  await replica.sync();
  assert.deepEqual([task(gone), task(kept)?.title, task(late)?.title, replica.unsent], [undefined, "edited", "late", 0]);
});

test("many edits are sent in few batches below the size limit", async () => {
  const { replica, batches } = await phone();
  for (let i = 0; i < 250; i++) await replica.create({ title: `${i}`, description: i < 100 ? "d".repeat(10_000) : null });
  await replica.sync();
  assert.equal(replica.unsent, 0);
  assert.ok(batches.every((batch) => batch.length <= 100 && JSON.stringify(batch).length < 349_000));
  assert.ok(batches.length <= 7, `${batches.length}`);
});

test("a restarted app has its edits in their order", async () => {
  const first = await phone();
  const ids = [];
  for (let i = 0; i < 12; i++) ids.push(await first.replica.create({ title: `${i}` }));
  // A store does not guarantee an order.
  const load = async () => new Map([...(await first.store.load())].reverse());
  const second = await phone({ api: first.api, store: { ...first.store, load } });
  assert.deepEqual([...second.replica.tasks().keys()], ids);
  await second.replica.sync();
  assert.deepEqual(second.batches[0]!.map(({ id }) => id), ids);
  const third = await phone({ api: first.api, store: first.store });
  assert.deepEqual([third.replica.unsent, third.replica.tasks().size], [0, 12]);
});

test("a store cannot be opened for another user before it is adopted", async () => {
  const { store, replica, api } = await phone({ person: "anonymous" });
  await replica.create({ title: "mine" });
  await assert.rejects(phone({ store, api, person: "ada" }), AnotherPerson);
  const { web } = await phone({ api });
  await replica.adopt("ada", web);
  assert.equal((await phone({ store, api, person: "ada" })).replica.unsent, 1);
});

/** A token with this subject and a lifetime of 15 minutes. */
const tokenOf = (sub: string) => `e30.${Buffer.from(JSON.stringify({ sub, iat: 0, exp: 900 })).toString("base64url")}.c2ln`;

test("edits wait while another user is signed in", async (t) => {
  const api = new FakeApi();
  const requests: string[] = [];
  let now = "ada";
  const source = tokenSource(async () => tokenOf(now), { subject: "ada" });
  const fetch: Fetch = (input, init) => (requests.push(input), api.fetch(input, init));
  const client = createClient({ baseUrl, token: source, fetch });
  const replica = await Replica.open({ client, store: sqliteStore(sqlite()), person: "ada" });
  await replica.create({ title: "Ada's" });
  // Before the first token, and when the token has to be renewed.
  for (const prepare of [async () => {}, () => replica.sync()]) {
    now = "ada";
    await prepare();
    await replica.create({ title: "Ada's, too" });
    now = "grace";
    source.clear();
    requests.length = 0;
    const { unsent } = replica;
    await assert.rejects(replica.sync(), AnotherPerson);
    await assert.rejects((await keepSynced(t, replica, 5)).end, AnotherPerson);
    assert.deepEqual([requests, replica.unsent], [[], unsent]);
  }
  now = "ada";
  await replica.sync();
  assert.deepEqual([replica.unsent, replica.tasks().size], [0, 3]);
});

test("an adopted replica sends with the new client", async () => {
  const api = new FakeApi();
  const as = (sub: string) => createClient({ baseUrl, token: tokenSource(async () => tokenOf("ada"), { subject: sub }), fetch: api.fetch });
  const replica = await Replica.open({ client: as("anonymous"), store: sqliteStore(sqlite()), person: "anonymous" });
  await replica.create({ title: "mine" });
  await assert.rejects(replica.sync(), AnotherPerson);
  await replica.adopt("ada", as("ada"));
  await replica.sync();
  assert.equal(replica.unsent, 0);
});

test("concurrent edits are stored one after the other", async () => {
  const commit = () => new Promise<void>((resolve) => setImmediate(resolve));
  const { replica } = await phone({ store: { load: async () => new Map(), commit } });
  const ids = await Promise.all(["a", "b", "c"].map((title) => replica.create({ title })));
  await Promise.all(ids.map((id) => replica.update(id, { status: "done" })));
  assert.deepEqual([...replica.tasks().values()].map(({ title, status }) => `${title} ${status}`), ["a done", "b done", "c done"]);
});

test("an edit that could not be stored is not applied", async () => {
  let full = true;
  const commit = async () => {
    if (full) throw new Error("the disk is full");
  };
  const { replica } = await phone({ store: { load: async () => new Map(), commit } });
  await assert.rejects(replica.create({ title: "x" }), /disk is full/);
  assert.equal(replica.tasks().size, 0);
  full = false;
  await replica.create({ title: "y" });
  assert.equal(replica.tasks().size, 1);
});

/** Waits until the condition holds after a change of the replica. */
function until(replica: Replica, holds: () => boolean): Promise<void> {
  return new Promise((resolve) => {
    const check = () => void (holds() && (unsubscribe(), resolve()));
    const unsubscribe = replica.subscribe(check);
    check();
  });
}

async function keepSynced(t: TestContext, replica: Replica, every: number) {
  const stop = new AbortController();
  t.after(() => stop.abort());
  return { stop, end: replica.keepSynced({ signal: stop.signal, every }) };
}

test("keepSynced sends edits immediately and fetches remote changes periodically", async (t) => {
  const { replica, patch, task } = await phone();
  const { stop, end } = await keepSynced(t, replica, 5);
  const id = await replica.create({ title: "one" });
  await until(replica, () => replica.unsent === 0);
  await patch(id, { title: "two" });
  await until(replica, () => task(id)?.title === "two");
  stop.abort();
  await end;
  const { replica: patient } = await phone();
  const slow = await keepSynced(t, patient, 3_600_000);
  await patient.sync();
  await patient.create({ title: "at once" });
  await until(patient, () => patient.unsent === 0);
  slow.stop.abort();
  await slow.end;
});

test("keepSynced throws SignedOut", async (t) => {
  const client = createClient({ baseUrl, token: tokenSource(() => Promise.reject(new SignedOut())) });
  const replica = await Replica.open({ client, store: sqliteStore(sqlite()), person: "p" });
  await assert.rejects((await keepSynced(t, replica, 5)).end, SignedOut);
});
