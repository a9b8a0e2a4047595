/** Against the real issuer and the real API, whose addresses are in the environment: `AUTH_URL`, `API_URL`. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { createClient, SignedOut, uuid } from "../../client.ts";
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
  return { session, storage, email, person, api: createClient({ baseUrl, token: session.token }) };
}

test("signed up, and known again when the app starts anew, by what is in secure storage alone", async () => {
  const { api, person, storage } = await signedUp();
  const { data: me } = await api.GET("/api/v1/users/me");
  const later = new Session({ authUrl, storage });
  assert.equal(await later.person(), person);
  const again = createClient({ baseUrl, token: later.token });
  assert.equal((await again.GET("/api/v1/users/me")).data.id, me.id);
  assert.ok([...storage.kept.values()].every((text) => !/eyJ/.test(text)), "no JWT is stored");
});

test("signed out here and at the issuer", async () => {
  const { session, storage, api } = await signedUp();
  await api.GET("/api/v1/users/me");
  const copied = new Keychain();
  for (const [key, value] of storage.kept) copied.kept.set(key, value);
  await session.signOut();
  assert.deepEqual([await session.person(), storage.kept.size], [null, 0]);
  await assert.rejects(api.GET("/api/v1/users/me"), SignedOut);
  await assert.rejects(new Session({ authUrl, storage: copied }).token.token(), SignedOut);
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
  assert.notEqual(await session.signInAnonymously(), person);
  const { data: nobody } = await api.GET("/api/v1/users/me");
  assert.ok(nobody.is_anonymous && nobody.id !== ada.id);
  assert.equal(await session.signIn(email, "long-enough-for-a-test"), person);
  assert.equal((await api.GET("/api/v1/users/me")).data.id, ada.id);
});

test("whatever fails and whenever, phones and server end up equal, and nothing that was kept is lost", async (t) => {
  for (let seed = 1; seed <= 4; seed++) {
    const { session } = await signedUp();
    t.diagnostic(`seed ${seed}`);
    const world = new World(seed, fetch, { baseUrl, token: session.token });
    await world.run(40);
  }
  assert.equal(Object.keys(faults).length, 7);
});

test("each request of a sync may fail, in each way: the swap of the token, each page, the batch", async (t) => {
  const { api, storage } = await signedUp();
  const session = (fetch: Fetch) => new Session({ authUrl, storage, fetch }).token;
  const place = { baseUrl, fetch, session, web: api, flash: new Flash(), news: 101 };
  const asked = await everyPhase(() => place, FAULTS.filter(({ dies }) => dies), (phase) => t.diagnostic(phase));
  const [swap, feed, batch] = [`GET ${new URL(authUrl).pathname}/token`, "GET /api/v1/tasks/changes", "POST /api/v1/tasks/batch"];
  assert.deepEqual(asked, [feed, feed, batch, feed].flatMap((request) => [swap, request]));
});
