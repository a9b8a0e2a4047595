import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { DatabaseSync } from "node:sqlite";
import { test } from "node:test";
import { type BetterAuthOptions, betterAuth } from "better-auth";
import { getMigrations } from "better-auth/db/migration";
import { admin, bearer, multiSession } from "better-auth/plugins";
import { apiTokens, type AuthSettings, authOptions, createAuth } from "./auth.ts";

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

test("a session token contains exactly the documented claims", async () => {
  const { auth } = await started();
  const { bearer, user } = await signedUp(auth);
  const before = Date.now();
  const { iat, exp, sid, updatedAt, minted_at, ...rest } = await payload(auth, bearer);
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
  assert.ok(Number.isInteger(minted_at) && Number(minted_at) >= before && Number(minted_at) <= Date.now());
});

// The tests below use a separate Better Auth configuration with these tokens and a session cookie cache.

const STRATEGIES = ["compact", "jwt", "jwe"] as const;
const STORES = {
  "the database": {},
  "secondary storage": { secondary: true },
  "both": { secondary: true, session: { storeSessionInDatabase: true } },
} satisfies Record<string, { secondary?: boolean; session?: BetterAuthOptions["session"] }>;

// Stores passwords unhashed, because a hash takes 100 ms.
const PLAIN = {
  hash: async (password: string) => password,
  verify: async ({ hash, password }: { hash: string; password: string }) => hash === password,
};

type Store = { secondary?: boolean; session?: BetterAuthOptions["session"] };

async function ownApp(strategy: (typeof STRATEGIES)[number], { secondary = false, session = {} }: Store) {
  const database = new DatabaseSync(":memory:");
  const entries = new Map<string, string>();
  const secondaryStorage = {
    get: (key: string) => entries.get(key) ?? null,
    set: (key: string, value: string) => void entries.set(key, value),
    delete: (key: string) => void entries.delete(key),
    getAndDelete: (key: string) => [entries.get(key) ?? null, entries.delete(key)][0],
    increment: (key: string) => Number(entries.set(key, String(Number(entries.get(key) ?? 0) + 1)).get(key)),
  };
  const auth = betterAuth({
    database,
    baseURL: BASE,
    secret: randomBytes(32).toString("base64url"),
    emailAndPassword: { enabled: true, password: PLAIN },
    telemetry: { enabled: false },
    session: { cookieCache: { enabled: true, maxAge: 5 * 60, strategy }, ...session },
    ...(secondary && { secondaryStorage }),
    plugins: [...apiTokens(), admin(), bearer(), multiSession()],
  });
  await (await getMigrations(auth.options)).runMigrations();
  const signUp = async (name: string) => {
    const body = { ...person, email: `${name}@example.com`, name };
    const { headers, response } = await auth.api.signUpEmail({ body, returnHeaders: true });
    return { id: response.user.id, headers: new Headers({ authorization: `Bearer ${headers.get("set-auth-token")}` }), body };
  };
  const signIn = async (body: typeof person) => {
    const { headers } = await auth.api.signInEmail({ body, returnHeaders: true });
    return browser(headers);
  };
  const boss = await signUp("boss");
  database.prepare("UPDATE user SET role = 'admin' WHERE id = ?").run(boss.id);
  const again = await auth.api.signInEmail({ body: boss.body, returnHeaders: true });
  const asBoss = { headers: new Headers({ authorization: `Bearer ${again.headers.get("set-auth-token")}` }) };
  const ada = await signUp("ada");
  return { auth, database, asBoss, ada, signUp, signIn };
}

type OwnAuth = Awaited<ReturnType<typeof ownApp>>["auth"];

/** The Cookie header of a browser after a response with these headers. */
function browser(headers: Headers): Headers {
  const pairs = headers.getSetCookie().map((cookie) => cookie.split(";", 1)[0]!.split(/=(.*)/s, 2) as [string, string]);
  const cookies = [...new Map(pairs)].filter(([, value]) => value);
  return new Headers({ cookie: cookies.map((pair) => pair.join("=")).join("; ") });
}

async function minted(auth: OwnAuth, headers: Headers): Promise<Record<string, unknown>> {
  return part((await auth.api.getToken({ headers })).token, 1);
}

async function noToken(auth: OwnAuth, headers: Headers): Promise<void> {
  await assert.rejects(auth.api.getToken({ headers }), { status: "UNAUTHORIZED", statusCode: 401 });
}

for (const strategy of STRATEGIES) {
  for (const [name, store] of Object.entries(STORES)) {
    test(`the claims come from the storage, not from the ${strategy} cookie: sessions in ${name}`, async () => {
      const { auth, database, asBoss, ada, signIn } = await ownApp(strategy, store);
      await auth.api.setRole({ ...asBoss, body: { userId: ada.id, role: "admin" } });
      const cookie = await signIn(ada.body);
      const before = await minted(auth, cookie);
      assert.equal(before["role"], "admin");
      await auth.api.setRole({ ...asBoss, body: { userId: ada.id, role: "user" } });
      // The cached cookie is still accepted and outdated; otherwise this test would prove nothing.
      assert.equal((await auth.api.getSession({ headers: cookie }))?.user.role, "admin");
      const after = await minted(auth, cookie);
      assert.deepEqual([after["role"], after["sid"]], ["user", before["sid"]]);
      assert.ok(String(after["updatedAt"]) > String(before["updatedAt"]));
      assert.ok(Number(after["minted_at"]) >= Date.parse(String(after["updatedAt"])));
      database.prepare("UPDATE user SET role = 'editor' WHERE id = ?").run(ada.id);
      assert.equal((await minted(auth, cookie))["role"], "editor");
      assert.equal((await minted(auth, ada.headers))["role"], "editor", "with the bearer token");
    });

    test(`an ended session gets no token with its ${strategy} cookie: sessions in ${name}`, async () => {
      const { auth, asBoss, ada, signIn } = await ownApp(strategy, store);
      const [signedOut, revoked] = [await signIn(ada.body), await signIn(ada.body)];
      for (const cookie of [signedOut, revoked]) assert.equal((await minted(auth, cookie))["sub"], ada.id);
      await auth.api.signOut({ headers: signedOut });
      await noToken(auth, signedOut);
      await minted(auth, revoked);
      await auth.api.revokeUserSessions({ ...asBoss, body: { userId: ada.id } });
      assert.ok(await auth.api.getSession({ headers: revoked }));
      await noToken(auth, revoked);
      const last = await signIn(ada.body);
      await minted(auth, last);
      await auth.api.removeUser({ ...asBoss, body: { userId: ada.id } });
      assert.ok(await auth.api.getSession({ headers: last }));
      await noToken(auth, last);
    });

    test(`a banned user gets no token with the ${strategy} cookie: sessions in ${name}`, async () => {
      const { auth, database, ada, signIn } = await ownApp(strategy, store);
      const cookie = await signIn(ada.body);
      const ban = database.prepare("UPDATE user SET banned = 1, banExpires = ? WHERE id = ?");
      for (const until of [null, new Date(Date.now() + 60_000).toISOString()]) {
        ban.run(until, ada.id);
        await noToken(auth, cookie);
        await noToken(auth, ada.headers);
      }
      const over = new Date(Date.now() - 1000).toISOString();
      ban.run(over, ada.id);
      const { banned, banExpires } = await minted(auth, cookie);
      assert.deepEqual([banned, banExpires], [true, over]);
    });
  }

  test(`an expired session, or another user's, gets no token with its ${strategy} cookie`, async () => {
    const { auth, database, ada, signUp, signIn } = await ownApp(strategy, {});
    const eve = await signUp("eve");
    const cookie = await signIn(ada.body);
    const sid = String((await minted(auth, cookie))["sid"]);
    database.prepare("UPDATE session SET userId = ? WHERE id = ?").run(eve.id, sid);
    await noToken(auth, cookie);
    database.prepare("UPDATE session SET userId = ? WHERE id = ?").run(ada.id, sid);
    await minted(auth, cookie);
    database.prepare("UPDATE session SET expiresAt = ? WHERE id = ?").run(new Date(Date.now() - 1000).toISOString(), sid);
    await noToken(auth, cookie);
  });

  test(`impersonation and multiple sessions work with the ${strategy} cookie`, async () => {
    const { auth, asBoss, ada, signUp, signIn } = await ownApp(strategy, {});
    const { headers } = await auth.api.impersonateUser({ ...asBoss, body: { userId: ada.id }, returnHeaders: true });
    const acting = await minted(auth, browser(headers));
    const boss = await minted(auth, asBoss.headers);
    assert.deepEqual([acting["sub"], acting["impersonatedBy"], acting["role"]], [ada.id, boss["sub"], "user"]);
    const eve = await signUp("eve");
    const first = await signIn(ada.body);
    const second = await auth.api.signInEmail({ body: eve.body, headers: first, returnHeaders: true });
    assert.equal((await minted(auth, browser(second.headers)))["sub"], eve.id);
    assert.equal((await minted(auth, first))["sub"], ada.id);
  });
}

test("every change of a claim updates updatedAt", async () => {
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
  test(`signs with ${keyAlgorithm} and publishes the key under its kid`, async () => {
    const { auth } = await started({ keyAlgorithm });
    const { bearer } = await signedUp(auth);
    const header = part((await auth.api.getToken({ headers: bearer })).token, 0);
    const { keys } = await auth.api.getJwks();
    assert.equal(header.alg, keyAlgorithm);
    assert.deepEqual(keys.map(({ kid, alg }) => [kid, alg]), [[header.kid, keyAlgorithm]]);
  });
}

test("the key set is never empty, and an expired key is published for another day", async () => {
  const { auth, database } = await started();
  const kids = async () => (await auth.api.getJwks()).keys.map(({ kid }) => kid);
  const expireKeys = (seconds: number) => {
    const expiry = new Date(Date.now() - seconds * 1000).toISOString();
    database.prepare("UPDATE jwks SET expiresAt = ?").run(expiry);
  };
  const [first] = await kids();
  expireKeys(60);
  const both = await kids();
  assert.equal(both.length, 2);
  assert.ok(both.includes(first));
  expireKeys(25 * 60 * 60);
  const after = await kids();
  assert.equal(after.length, 1);
  assert.ok(!both.includes(after[0]));
});

test("keys rotate every 30 days by default, as configured, or never", async () => {
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

test("a session token without its signature is rejected", async () => {
  const { auth } = await started();
  const { bearer } = await signedUp(auth);
  const signed = bearer.get("authorization")!;
  assert.ok(await auth.api.getSession({ headers: bearer }));
  const headers = new Headers({ authorization: signed.split(".")[0]! });
  assert.equal(await auth.api.getSession({ headers }), null);
});

test("an app can set the audience and add plugins", async () => {
  const options = authOptions({ database: new DatabaseSync(":memory:"), baseURL: BASE, secret: randomBytes(32).toString("base64url"), audience: "api" });
  const auth = betterAuth({ ...options, plugins: [...options.plugins, { id: "mine" }] });
  await (await getMigrations(auth.options)).runMigrations();
  const { headers } = await auth.api.signUpEmail({ body: person, returnHeaders: true });
  const bearer = new Headers({ authorization: `Bearer ${headers.get("set-auth-token")}` });
  assert.equal(part((await auth.api.getToken({ headers: bearer })).token, 1).aud, "api");
});
