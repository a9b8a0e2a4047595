import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { DatabaseSync } from "node:sqlite";
import { test } from "node:test";
import { betterAuth } from "better-auth";
import { getMigrations } from "better-auth/db/migration";
import { type AuthSettings, authOptions, claims, createAuth } from "./auth.ts";

const BASE = "http://localhost:3000";
const person = { email: "ada@example.com", password: "long-enough-for-a-test", name: "Ada" };

async function started(settings: Partial<AuthSettings> = {}) {
  const database = new DatabaseSync(":memory:");
  const auth = createAuth({ database, baseURL: BASE, secret: randomBytes(32).toString("base64url"), ...settings });
  await (await getMigrations(auth.options)).runMigrations();
  return { auth, database };
}

type Auth = Awaited<ReturnType<typeof started>>["auth"];

async function signedUp(auth: Auth, body: typeof person = person) {
  const { headers, response } = await auth.api.signUpEmail({ body, returnHeaders: true });
  return { bearer: new Headers({ authorization: `Bearer ${headers.get("set-auth-token")}` }), user: response.user };
}

const part = (token: string, index: number) => JSON.parse(Buffer.from(token.split(".")[index]!, "base64url").toString());

async function payload(auth: Auth, headers: Headers): Promise<Record<string, unknown>> {
  return part((await auth.api.getToken({ headers })).token, 1);
}

test("a token says who, in which role, from which session, and nothing else", async () => {
  const { auth } = await started();
  const { bearer, user } = await signedUp(auth);
  const { iat, exp, sid, updatedAt, ...rest } = await payload(auth, bearer);
  assert.deepEqual(rest, {
    sub: user.id,
    id: user.id,
    email: "ada@example.com",
    emailVerified: false,
    name: "Ada",
    role: "user",
    banned: false,
    banExpires: null,
    isAnonymous: false,
    impersonatedBy: null,
    iss: BASE,
    aud: BASE,
  });
  assert.equal(Number(exp) - Number(iat), 15 * 60);
  assert.equal(sid, (await auth.api.getSession({ headers: bearer }))?.session.id);
  assert.equal(updatedAt, user.updatedAt.toISOString());
});

test("dates that the cookie cache turned into text come out alike", () => {
  const user = { id: "1", email: "a@b.c", emailVerified: true, name: "A", createdAt: new Date(), updatedAt: new Date() };
  const session = { id: "s", token: "t", userId: "1", expiresAt: new Date(), createdAt: new Date(), updatedAt: new Date() };
  const date = new Date("2026-01-02T03:04:05.678Z");
  const asText = { updatedAt: date.toISOString() as unknown as Date, banExpires: date.toISOString() };
  const whole = claims({ user: { ...user, updatedAt: date, banExpires: date }, session });
  assert.deepEqual(claims({ user: { ...user, ...asText }, session }), whole);
  assert.equal(whole.updatedAt, "2026-01-02T03:04:05.678Z");
  assert.equal(whole.banExpires, "2026-01-02T03:04:05.678Z");
});

test("updatedAt moves with whatever changes a claim", async () => {
  const { auth, database } = await started();
  const boss = await signedUp(auth, { ...person, email: "boss@example.com" });
  database.exec("UPDATE user SET role = 'admin'");
  const { bearer, user } = await signedUp(auth);
  const longAgo = "2020-01-01T00:00:00.000Z";
  const admin = { headers: boss.bearer };
  const changes: Record<string, () => Promise<unknown>> = {
    "set-role": () => auth.api.setRole({ ...admin, body: { userId: user.id, role: ["user", "admin"] } }),
    "update-user": () => auth.api.updateUser({ headers: bearer, body: { name: "Ada L." } }),
    "admin/update-user": () => auth.api.adminUpdateUser({ ...admin, body: { userId: user.id, data: { name: "L." } } }),
    "ban-user": () => auth.api.banUser({ ...admin, body: { userId: user.id } }),
    "unban-user": () => auth.api.unbanUser({ ...admin, body: { userId: user.id } }),
  };
  for (const [name, change] of Object.entries(changes)) {
    database.prepare("UPDATE user SET updatedAt = ? WHERE id = ?").run(longAgo, user.id);
    await change();
    const row = database.prepare("SELECT updatedAt FROM user WHERE id = ?").get(user.id);
    assert.ok(String(row?.["updatedAt"]) > longAgo, name);
  }
});

for (const keyAlgorithm of ["EdDSA", "ES256", "ES512", "PS256", "RS256"] as const) {
  test(`signs with ${keyAlgorithm}, by a key that is published under its kid`, async () => {
    const { auth } = await started({ keyAlgorithm });
    const { bearer } = await signedUp(auth);
    const header = part((await auth.api.getToken({ headers: bearer })).token, 0);
    const { keys } = await auth.api.getJwks();
    assert.equal(header.alg, keyAlgorithm);
    assert.deepEqual(keys.map(({ kid, alg }) => [kid, alg]), [[header.kid, keyAlgorithm]]);
  });
}

test("the key set is never empty, and an expired key stays for a day", async () => {
  const { auth, database } = await started();
  const kids = async () => (await auth.api.getJwks()).keys.map(({ kid }) => kid);
  const age = (seconds: number) => {
    const expiry = new Date(Date.now() - seconds * 1000).toISOString();
    database.prepare("UPDATE jwks SET expiresAt = ?").run(expiry);
  };
  const [first] = await kids();
  age(60);
  const both = await kids();
  assert.equal(both.length, 2);
  assert.ok(both.includes(first));
  age(25 * 60 * 60);
  const after = await kids();
  assert.equal(after.length, 1);
  assert.ok(!both.includes(after[0]));
});

test("keys rotate each 30 days, as told, or never", async () => {
  const expiry = async (settings: Partial<AuthSettings>) => {
    const { auth, database } = await started(settings);
    await auth.api.getJwks();
    const at = database.prepare("SELECT expiresAt FROM jwks").get()?.["expiresAt"];
    return at && Math.round((Date.parse(String(at)) - Date.now()) / 10_000) * 10;
  };
  assert.equal(await expiry({}), 30 * 24 * 60 * 60);
  assert.equal(await expiry({ keyRotation: 600 }), 600);
  assert.equal(await expiry({ keyRotation: 0 }), null);
});

test("a session id without its signature opens nothing", async () => {
  const { auth } = await started();
  const { bearer } = await signedUp(auth);
  const whole = bearer.get("authorization")!;
  assert.ok(await auth.api.getSession({ headers: bearer }));
  const headers = new Headers({ authorization: whole.split(".")[0]! });
  assert.equal(await auth.api.getSession({ headers }), null);
});

test("an app may name the audience and add plugins of its own", async () => {
  const options = authOptions({ database: new DatabaseSync(":memory:"), baseURL: BASE, secret: randomBytes(32).toString("base64url"), audience: "api" });
  const auth = betterAuth({ ...options, plugins: [...options.plugins, { id: "mine" }] });
  await (await getMigrations(auth.options)).runMigrations();
  const { headers } = await auth.api.signUpEmail({ body: person, returnHeaders: true });
  const bearer = new Headers({ authorization: `Bearer ${headers.get("set-auth-token")}` });
  assert.equal(part((await auth.api.getToken({ headers: bearer })).token, 1).aud, "api");
});
