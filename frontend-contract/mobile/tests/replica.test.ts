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

/** node:sqlite in the clothes of expo-sqlite. */
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

/** A phone and a browser of one person; the bodies of the batches that were sent. */
async function phone({ api = new FakeApi(), store = sqliteStore(sqlite()), person = "p" } = {}) {
  const batches: any[][] = [];
  /** What happens, once, while a batch is on its way there, and while its answer is on its way back. */
  const underway: { there?: () => unknown; back?: () => unknown } = {};
  const fetch = async (input: string, init?: RequestInit) => {
    if (!input.endsWith("/batch")) return api.fetch(input, init);
    const { there, back } = underway;
    delete underway.there;
    delete underway.back;
    batches.push(JSON.parse(init!.body as string).operations);
    await there?.();
    const response = await api.fetch(input, init);
    await back?.();
    return response;
  };
  const client = createClient({ baseUrl, token, fetch, retries: 0 });
  const web = createClient({ baseUrl, token, fetch: api.fetch, retries: 0 });
  const replica = await Replica.open({ client, store, person });
  const patch = (id: string, body: object) => web.PATCH("/api/v1/tasks/{id}", { params: { path: { id } }, body });
  const remove = (id: string) => web.DELETE("/api/v1/tasks/{id}", { params: { path: { id } } });
  return { api, store, web, replica, batches, underway, patch, remove, task: (id: string) => replica.tasks().get(id) };
}

test("whatever fails and whenever, phones and server end up equal, and nothing that was kept is lost", async (t) => {
  for (let seed = 1; seed <= 50; seed++) {
    const api = new FakeApi();
    let ids = 0;
    t.mock.method(crypto, "randomUUID", () => `00000000-0000-4000-8000-${String(++ids).padStart(12, "0")}`);
    const world = new World(seed, api.fetch, { baseUrl, token });
    // A phone that is away for 30 days with a create in doubt makes it again, whoever deleted it: rather that than lose it.
    const purge = () => void (world.phones.some((phone) => phone.inDoubt) || api.purge());
    t.diagnostic(`seed ${seed}`);
    await world.run(60, [purge, () => api.forgetKeys()]);
  }
  assert.deepEqual(Object.keys(faults).sort(), [
    "killed after it was kept", "killed after the server acted", "killed before it was kept", "killed before the request",
    "lost after the server acted", "lost before the request", "lost in the middle of the answer",
  ]);
});

test("each request of a sync may fail, in each way, and be followed by another failure", async (t) => {
  t.mock.method(Math, "random", () => 0);
  const place = () => {
    const api = new FakeApi();
    // What the issuer says; a page of the feed has three tasks.
    const fetch: Fetch = async (input, init) =>
      input.endsWith("/token") ? Response.json({ token: "e30.e30.c2ln" }) : api.fetch(input, init);
    const session = (fetch: Fetch) => bearerSession({ authUrl: `${baseUrl}/api/auth`, sessionToken: () => "s.h", fetch });
    return { baseUrl, fetch, session, web: createClient({ baseUrl, token, fetch: api.fetch }), flash: new Flash(), news: 4 };
  };
  const asked = await everyPhase(place, FAULTS, (phase) => t.diagnostic(phase));
  const [swap, feed, batch] = ["GET /api/auth/token", "GET /api/v1/tasks/changes", "POST /api/v1/tasks/batch"];
  assert.deepEqual(asked, [feed, feed, feed, batch, feed].flatMap((request) => [swap, request]));
  for (const first of asked.keys()) {
    for (const one of FAULTS) {
      for (const dies of [false, true]) {
        await journey(place(), new Map([[first, one], [first + 1, { when: "before its answer", dies }]]));
      }
    }
  }
});

test("an edit shows at once, and is pending until the server has told of it", async () => {
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

test("edits that nobody has seen become one, or none", async () => {
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
  assert.deepEqual(batches[1]![0].changes, { tags: ["a"], priority: "high" }, "what was taken back is not sent");
});

test("two who changed different members both have their way; in the same member the server's stands, and ours is offered", async () => {
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

test("who was first is seen also if they were first by a moment", async () => {
  const { replica, patch, task, underway } = await phone();
  const id = await replica.create({ title: "one" });
  await replica.sync();
  await replica.update(id, { title: "ours", priority: "high" });
  underway.there = () => patch(id, { title: "theirs" });
  await replica.sync();
  assert.deepEqual([task(id)?.title, task(id)?.priority], ["theirs", "high"]);
  assert.deepEqual(replica.offers().map(({ changes }) => changes), [{ title: "ours" }]);
});

test("what was done and not answered is not done again, and is no conflict with what others did since", async () => {
  for (const restarted of [false, true]) {
    const { api, store, replica: first, patch, underway } = await phone();
    const id = await first.create({ title: "one" });
    await first.sync();
    await first.update(id, { title: "ours" });
    const lost = () => Promise.reject(new TypeError("network"));
    underway.back = lost;
    await assert.rejects(first.sync(), TypeError);
    await patch(id, { title: "theirs" });
    const { replica } = restarted ? await phone({ api, store }) : { replica: first };
    await replica.update(id, { priority: "high" });
    await replica.sync();
    const task = replica.tasks().get(id);
    assert.deepEqual([task?.title, task?.priority, task?.version, replica.offers()], ["theirs", "high", 4, []]);
  }
});

test("an edit of what is gone is offered, and makes it anew", async () => {
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

test("a delete stands, whatever others did to the task", async () => {
  const { replica, patch, web } = await phone();
  const id = await replica.create({ title: "one" });
  await replica.sync();
  await patch(id, { title: "two" });
  await replica.delete(id);
  await assert.rejects(replica.update(id, { title: "three" }), NotHere);
  await replica.sync();
  assert.deepEqual((await web.GET("/api/v1/tasks")).data.items, []);
});

test("what the server refuses is offered with the reason, and holds up nothing else", async () => {
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

test("a token that is too old costs a reading from the start, and no edit", async () => {
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

test("a long time without a network goes in few requests, none of them too long", async () => {
  const { replica, batches } = await phone();
  for (let i = 0; i < 250; i++) await replica.create({ title: `${i}`, description: i < 100 ? "d".repeat(10_000) : null });
  await replica.sync();
  assert.equal(replica.unsent, 0);
  assert.ok(batches.every((batch) => batch.length <= 100 && JSON.stringify(batch).length < 349_000));
  assert.ok(batches.length <= 7, `${batches.length}`);
});

test("an app that starts again has what it had, in order", async () => {
  const first = await phone();
  const ids = [];
  for (let i = 0; i < 12; i++) ids.push(await first.replica.create({ title: `${i}` }));
  // No order is promised of what a store holds.
  const load = async () => new Map([...(await first.store.load())].reverse());
  const second = await phone({ api: first.api, store: { ...first.store, load } });
  assert.deepEqual([...second.replica.tasks().keys()], ids);
  await second.replica.sync();
  assert.deepEqual(second.batches[0]!.map(({ id }) => id), ids);
  const third = await phone({ api: first.api, store: first.store });
  assert.deepEqual([third.replica.unsent, third.replica.tasks().size], [0, 12]);
});

test("one person's edits are never sent as another's", async () => {
  const { store, replica, api } = await phone({ person: "anonymous" });
  await replica.create({ title: "mine" });
  await assert.rejects(phone({ store, api, person: "ada" }), AnotherPerson);
  const { web } = await phone({ api });
  await replica.adopt("ada", web);
  assert.equal((await phone({ store, api, person: "ada" })).replica.unsent, 1);
});

/** A token of this subject, which lives for 15 minutes. */
const tokenOf = (sub: string) => `e30.${Buffer.from(JSON.stringify({ sub, iat: 0, exp: 900 })).toString("base64url")}.c2ln`;

test("edits wait while another person is signed in, and go out when their own is again", async (t) => {
  const api = new FakeApi();
  const asked: string[] = [];
  let now = "ada";
  const source = tokenSource(async () => tokenOf(now), { subject: "ada" });
  const fetch: Fetch = (input, init) => (asked.push(input), api.fetch(input, init));
  const client = createClient({ baseUrl, token: source, fetch });
  const replica = await Replica.open({ client, store: sqliteStore(sqlite()), person: "ada" });
  await replica.create({ title: "Ada's" });
  // Before the first token, and with one that is due for renewal.
  for (const before of [async () => {}, () => replica.sync()]) {
    now = "ada";
    await before();
    await replica.create({ title: "Ada's, too" });
    now = "grace";
    source.clear();
    asked.length = 0;
    const { unsent } = replica;
    await assert.rejects(replica.sync(), AnotherPerson);
    await assert.rejects((await kept(t, replica, 5)).end, AnotherPerson);
    assert.deepEqual([asked, replica.unsent], [[], unsent]);
  }
  now = "ada";
  await replica.sync();
  assert.deepEqual([replica.unsent, replica.tasks().size], [0, 3]);
});

test("a linked account sends with the client that came with it", async () => {
  const api = new FakeApi();
  const as = (sub: string) => createClient({ baseUrl, token: tokenSource(async () => tokenOf("ada"), { subject: sub }), fetch: api.fetch });
  const replica = await Replica.open({ client: as("anonymous"), store: sqliteStore(sqlite()), person: "anonymous" });
  await replica.create({ title: "mine" });
  await assert.rejects(replica.sync(), AnotherPerson);
  await replica.adopt("ada", as("ada"));
  await replica.sync();
  assert.equal(replica.unsent, 0);
});

test("edits of one moment are kept one after the other, however long that takes", async () => {
  const commit = () => new Promise<void>((resolve) => setImmediate(resolve));
  const { replica } = await phone({ store: { load: async () => new Map(), commit } });
  const ids = await Promise.all(["a", "b", "c"].map((title) => replica.create({ title })));
  await Promise.all(ids.map((id) => replica.update(id, { status: "done" })));
  assert.deepEqual([...replica.tasks().values()].map(({ title, status }) => `${title} ${status}`), ["a done", "b done", "c done"]);
});

test("an edit that could not be kept was not made", async () => {
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

/** Resolves when the condition holds, after some change of the replica. */
function until(replica: Replica, holds: () => boolean): Promise<void> {
  return new Promise((resolve) => {
    const look = () => void (holds() && (unsubscribe(), resolve()));
    const unsubscribe = replica.subscribe(look);
    look();
  });
}

async function kept(t: TestContext, replica: Replica, every: number) {
  const stop = new AbortController();
  t.after(() => stop.abort());
  return { stop, end: replica.keepSynced({ signal: stop.signal, every }) };
}

test("kept in step: an edit goes out at once, what others did comes in time", async (t) => {
  const { replica, patch, task } = await phone();
  const { stop, end } = await kept(t, replica, 5);
  const id = await replica.create({ title: "one" });
  await until(replica, () => replica.unsent === 0);
  await patch(id, { title: "two" });
  await until(replica, () => task(id)?.title === "two");
  stop.abort();
  await end;
  const { replica: patient } = await phone();
  const slow = await kept(t, patient, 3_600_000);
  await patient.sync();
  await patient.create({ title: "at once" });
  await until(patient, () => patient.unsent === 0);
  slow.stop.abort();
  await slow.end;
});

test("kept in step until there is nobody to speak for", async (t) => {
  const client = createClient({ baseUrl, token: tokenSource(() => Promise.reject(new SignedOut())) });
  const replica = await Replica.open({ client, store: sqliteStore(sqlite()), person: "p" });
  await assert.rejects((await kept(t, replica, 5)).end, SignedOut);
});
