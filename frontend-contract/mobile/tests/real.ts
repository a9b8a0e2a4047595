/** Against the real issuer and the real API, whose addresses are in the environment: `AUTH_URL`, `API_URL`. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { AnotherPerson, createClient, SignedOut, uuid } from "../../client.ts";
import { Replica } from "../replica.ts";
import { type SecureStorage, Session, SignInRefused } from "../session.ts";
import { everyPhase, FAULTS } from "./phases.ts";
import { faults, type Fetch, Flash, World } from "./world.ts";

const { AUTH_URL: authUrl = "", API_URL: baseUrl = "" } = process.env;

class Keychain implements SecureStorage {
  readonly kept = new Map<string, string>();
  get = async (key: string) => this.kept.get(key) ?? null;
  set = async (key: string, value: string) => void this.kept.set(key, value);
  delete = async (key: string) => void this.kept.delete(key);
}

async function signedUp(storage = new Keychain()) {
  const session = new Session({ authUrl, storage });
  const email = `${uuid()}@example.com`;
  const person = await session.signUp(email, "long-enough-for-a-test", "Ada");
  return { session, storage, email, person, api: createClient({ baseUrl, token: session.tokenOf(person) }) };
}

test("signed up, and known again when the app starts anew, by what is in secure storage alone", async () => {
  const { api, person, storage } = await signedUp();
  const { data: me } = await api.GET("/api/v1/users/me");
  const later = new Session({ authUrl, storage });
  assert.equal(await later.person(), person);
  const again = createClient({ baseUrl, token: later.tokenOf(person) });
  assert.equal((await again.GET("/api/v1/users/me")).data.id, me.id);
  assert.ok([...storage.kept.values()].every((text) => !/eyJ/.test(text)), "no JWT is stored");
});

test("signed out here and at the issuer", async () => {
  const { session, storage, person, api } = await signedUp();
  await api.GET("/api/v1/users/me");
  const copied = new Keychain();
  for (const [key, value] of storage.kept) copied.kept.set(key, value);
  await session.signOut();
  assert.deepEqual([await session.person(), storage.kept.size], [null, 0]);
  await assert.rejects(api.GET("/api/v1/users/me"), SignedOut);
  await assert.rejects(new Session({ authUrl, storage: copied }).tokenOf(person).token(), SignedOut);
});

test("signed out here also without a network", async () => {
  const { storage } = await signedUp();
  const offline = async () => Promise.reject(new TypeError("network"));
  const session = new Session({ authUrl, storage, fetch: offline });
  await assert.rejects(session.signOut(), TypeError);
  assert.equal(await session.person(), null);
});

test("another person on the same phone gets tokens of their own", async () => {
  const storage = new Keychain();
  const { session, email, person, api } = await signedUp(storage);
  const { data: ada } = await api.GET("/api/v1/users/me");
  await assert.rejects(session.signIn(email, "not this one"), (error) =>
    error instanceof SignInRefused && error.code === "INVALID_EMAIL_OR_PASSWORD");
  await session.signOut();
  const guest = await session.signInAnonymously();
  assert.notEqual(guest, person);
  const { data: nobody } = await createClient({ baseUrl, token: session.tokenOf(guest) }).GET("/api/v1/users/me");
  assert.ok(nobody.is_anonymous && nobody.id !== ada.id);
  await assert.rejects(api.GET("/api/v1/users/me"), AnotherPerson);
  assert.equal(await session.signIn(email, "long-enough-for-a-test"), person);
  assert.equal((await api.GET("/api/v1/users/me")).data.id, ada.id);
});

test("edits that were never sent are not sent as the next person on the same phone", async () => {
  const storage = new Keychain();
  const { session, email, person } = await signedUp(storage);
  // No token has been taken yet, as after a start without a network.
  const client = createClient({ baseUrl, token: session.tokenOf(person) });
  const replica = await Replica.open({ client, store: new Flash(), person });
  await replica.create({ title: "Ada's" });
  await session.signOut();
  await assert.rejects(replica.sync(), SignedOut);
  const guest = await session.signInAnonymously();
  await assert.rejects(replica.sync(), AnotherPerson);
  const theirs = createClient({ baseUrl, token: session.tokenOf(guest) });
  assert.deepEqual((await theirs.GET("/api/v1/tasks")).data.items, []);
  await session.signIn(email, "long-enough-for-a-test");
  await replica.sync();
  assert.equal((await client.GET("/api/v1/tasks")).data.items[0]?.title, "Ada's");
});

test("whatever fails and whenever, phones and server end up equal, and nothing that was kept is lost", async (t) => {
  for (let seed = 1; seed <= 4; seed++) {
    const { session, person } = await signedUp();
    t.diagnostic(`seed ${seed}`);
    const world = new World(seed, fetch, { baseUrl, token: session.tokenOf(person) });
    await world.run(40);
  }
  assert.equal(Object.keys(faults).length, 7);
});

test("each request of a sync may fail, in each way: the swap of the token, each page, the batch", async (t) => {
  const { api, storage, person } = await signedUp();
  const session = (fetch: Fetch) => new Session({ authUrl, storage, fetch }).tokenOf(person);
  const place = { baseUrl, fetch, session, web: api, flash: new Flash(), news: 101 };
  const asked = await everyPhase(() => place, FAULTS.filter(({ dies }) => dies), (phase) => t.diagnostic(phase));
  const [swap, feed, batch] = [`GET ${new URL(authUrl).pathname}/token`, "GET /api/v1/tasks/changes", "POST /api/v1/tasks/batch"];
  assert.deepEqual(asked, [feed, feed, batch, feed].flatMap((request) => [swap, request]));
});
