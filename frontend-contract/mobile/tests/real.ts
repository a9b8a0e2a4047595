/** Tests with a real issuer and a real API, at `AUTH_URL` and `API_URL`. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { AnotherPerson, createClient, SignedOut, uuid } from "../../client.ts";
import { Replica } from "../replica.ts";
import { type SecureStorage, Session, SignInRefused } from "../session.ts";
import { everyPhase, FAULTS } from "./phases.ts";
import { faults, type Fetch, Flash, World } from "./world.ts";

const { AUTH_URL: authUrl = "", API_URL: baseUrl = "" } = process.env;

class Keychain implements SecureStorage {
  readonly entries = new Map<string, string>();
  get = async (key: string) => this.entries.get(key) ?? null;
  set = async (key: string, value: string) => void this.entries.set(key, value);
  delete = async (key: string) => void this.entries.delete(key);
}

async function signedUp(storage = new Keychain()) {
  const session = new Session({ authUrl, storage });
  const email = `${uuid()}@example.com`;
  const person = await session.signUp(email, "long-enough-for-a-test", "Ada");
  return { session, storage, email, person, api: createClient({ baseUrl, token: session.tokenOf(person) }) };
}

test("a session is restored from secure storage when the app restarts", async () => {
  const { api, person, storage } = await signedUp();
  const { data: me } = await api.GET("/api/v1/users/me");
  const later = new Session({ authUrl, storage });
  assert.equal(await later.person(), person);
  const again = createClient({ baseUrl, token: later.tokenOf(person) });
  assert.equal((await again.GET("/api/v1/users/me")).data.id, me.id);
  assert.ok([...storage.entries.values()].every((text) => !/eyJ/.test(text)), "no JWT is stored");
});

test("signing out ends the session on the phone and at the issuer", async () => {
  const { session, storage, person, api } = await signedUp();
  await api.GET("/api/v1/users/me");
  const copied = new Keychain();
  for (const [key, value] of storage.entries) copied.entries.set(key, value);
  await session.signOut();
  assert.deepEqual([await session.person(), storage.entries.size], [null, 0]);
  await assert.rejects(api.GET("/api/v1/users/me"), SignedOut);
  await assert.rejects(new Session({ authUrl, storage: copied }).tokenOf(person).token(), SignedOut);
});

test("signing out works offline", async () => {
  const { storage } = await signedUp();
  const offline = async () => Promise.reject(new TypeError("network"));
  const session = new Session({ authUrl, storage, fetch: offline });
  await assert.rejects(session.signOut(), TypeError);
  assert.equal(await session.person(), null);
});

test("another user on the same phone gets their own tokens", async () => {
  const storage = new Keychain();
  const { session, email, person, api } = await signedUp(storage);
  const { data: ada } = await api.GET("/api/v1/users/me");
  await assert.rejects(session.signIn(email, "wrong-password"), (error) =>
    error instanceof SignInRefused && error.code === "INVALID_EMAIL_OR_PASSWORD");
  await session.signOut();
  const guest = await session.signInAnonymously();
  assert.notEqual(guest, person);
  const { data: anonymous } = await createClient({ baseUrl, token: session.tokenOf(guest) }).GET("/api/v1/users/me");
  assert.ok(anonymous.is_anonymous && anonymous.id !== ada.id);
  await assert.rejects(api.GET("/api/v1/users/me"), AnotherPerson);
  assert.equal(await session.signIn(email, "long-enough-for-a-test"), person);
  assert.equal((await api.GET("/api/v1/users/me")).data.id, ada.id);
});

test("pending edits are not sent as the next user on the same phone", async () => {
  const storage = new Keychain();
  const { session, email, person } = await signedUp(storage);
  // No token has been requested yet, as after a start without a network.
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

test("phones and server converge after random failures, and no stored edit is lost", async (t) => {
  for (let seed = 1; seed <= 4; seed++) {
    const { session, person } = await signedUp();
    t.diagnostic(`seed ${seed}`);
    const world = new World(seed, fetch, { baseUrl, token: session.tokenOf(person) });
    await world.run(40);
  }
  assert.equal(Object.keys(faults).length, 7);
});

test("a sync completes after a failure of any request: token, feed page or batch", async (t) => {
  const { api, storage, person } = await signedUp();
  const session = (fetch: Fetch) => new Session({ authUrl, storage, fetch }).tokenOf(person);
  const place = { baseUrl, fetch, session, web: api, flash: new Flash(), news: 101 };
  const requests = await everyPhase(() => place, FAULTS.filter(({ dies }) => dies), (phase) => t.diagnostic(phase));
  const [token, feed, batch] = [`GET ${new URL(authUrl).pathname}/token`, "GET /api/v1/tasks/changes", "POST /api/v1/tasks/batch"];
  assert.deepEqual(requests, [feed, feed, batch, feed].flatMap((request) => [token, request]));
});
