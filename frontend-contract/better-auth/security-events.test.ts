import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { createPublicKey, randomBytes, verify } from "node:crypto";
import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { DatabaseSync } from "node:sqlite";
import { type TestContext, test } from "node:test";
import { betterAuth } from "better-auth";
import { getMigrations } from "better-auth/db/migration";
import { anonymous, jwt } from "better-auth/plugins";
import { authOptions } from "./auth.ts";
import { type SecurityEventsOptions, securityEvents } from "./security-events.ts";

const BASE = "http://localhost:3000";
const SECRET = randomBytes(32).toString("base64url");
const RISC = "https://schemas.openid.net/secevent/risc/event-type";
const CAEP = "https://schemas.openid.net/secevent/caep/event-type";

/** Hashing would take most of the time. */
const PLAIN = {
  hash: async (password: string) => password,
  verify: async ({ hash, password }: { hash: string; password: string }) => hash === password,
};

interface Answer {
  status: number;
  body?: string;
  headers?: Record<string, string>;
}

interface Received {
  type: string;
  token: string;
  headers: Record<string, unknown>;
  payload: Record<string, any>;
}

/** An API that takes security events, and answers as the test says: 202 unless told otherwise. */
async function receiver(t: TestContext) {
  const received: Received[] = [];
  const waiting: { count: number; resolve: () => void }[] = [];
  const api = {
    received,
    answer: (_: Received): Answer | Promise<Answer> => ({ status: 202 }),
    endpoint: "",
    /** Resolves when so many were received in all. */
    async until(count: number): Promise<Received[]> {
      if (received.length < count) await new Promise<void>((resolve) => waiting.push({ count, resolve }));
      return received;
    },
    open: () => server.listen(Number(new URL(api.endpoint).port), "127.0.0.1"),
    close: () => server.close() && server.closeAllConnections(),
    types: () => received.map(({ type }) => type),
  };
  const server = createServer(async (request, response) => {
    const chunks = await request.toArray();
    const token = Buffer.concat(chunks).toString();
    const [header, payload] = token.split(".").slice(0, 2).map((part) => JSON.parse(Buffer.from(part, "base64url").toString()));
    assert.equal(request.method, "POST");
    assert.equal(request.headers["content-type"], "application/secevent+jwt");
    const [uri] = Object.keys(payload.events);
    const event = { type: uri!.split(/[/:]/).at(-1)!, token, headers: header, payload };
    received.push(event);
    for (const { count, resolve } of waiting) if (received.length >= count) resolve();
    const { status, headers, body } = await api.answer(event);
    response.writeHead(status, headers).end(body);
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  api.endpoint = `http://127.0.0.1:${(server.address() as AddressInfo).port}/api/v1/security-events`;
  t.after(api.close);
  return api;
}

type Api = Awaited<ReturnType<typeof receiver>>;

async function issuer(t: TestContext, api: Api, { file = ":memory:", ...more }: Partial<SecurityEventsOptions> & { file?: string; serial?: boolean } = {}) {
  const database = new DatabaseSync(file);
  database.exec("PRAGMA busy_timeout = 5000");
  const options = authOptions({ database, baseURL: BASE, secret: SECRET });
  const errors: string[] = [];
  const auth = betterAuth({
    ...options,
    emailAndPassword: { enabled: true, password: PLAIN },
    user: { deleteUser: { enabled: true } },
    logger: { log: (_, message) => void errors.push(message) },
    advanced: { database: more.serial ? { generateId: "serial" as const } : {} },
    plugins: [...options.plugins, securityEvents({ endpoint: api.endpoint, ...more })],
  });
  await (await getMigrations(auth.options)).runMigrations();
  const join = async (name: string, headers = new Headers()) => {
    const body = { email: `${name}@example.com`, password: "long-enough-for-a-test", name };
    const answer = await auth.api.signUpEmail({ body, headers, returnHeaders: true });
    return { id: answer.response.user.id, headers: bearer(answer.headers), body };
  };
  const rows = () => database.prepare("SELECT * FROM securityEvent ORDER BY begunAt").all();
  /** Whatever was begun is told. */
  const settled = async () => {
    while (rows().length) await new Promise(setImmediate);
  };
  /** The time for the next attempt has come. */
  const later = async () => {
    while (rows().some(({ claimedAt }) => claimedAt)) await new Promise(setImmediate);
    database.exec("UPDATE securityEvent SET dueAt = '2020-01-01T00:00:00.000Z'");
  };
  t.after(() => void (database.isOpen && database.close()));
  const boss = await join(`boss-${randomBytes(4).toString("hex")}`);
  database.prepare("UPDATE user SET role = 'admin' WHERE id = ?").run(boss.id);
  return { auth, database, join, boss, rows, settled, later, errors };
}

const bearer = (headers: Headers) => new Headers({ authorization: `Bearer ${headers.get("set-auth-token")}` });
const uris = ({ payload }: Received) => Object.keys(payload["events"]);

test("a ban is told, signed with the published key, in the form of RFC 8417", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, settled } = await issuer(t, api);
  const ada = await join("ada");
  const before = Date.now() / 1000;
  await auth.api.banUser({ headers: boss.headers, body: { userId: ada.id } });
  await settled();
  assert.deepEqual(api.types(), ["account-disabled", "session-revoked"]);
  const { headers, payload, token } = api.received[0]!;
  const { keys } = await auth.api.getJwks();
  assert.deepEqual(headers, { typ: "secevent+jwt", alg: "EdDSA", kid: keys[0]!.kid });
  const [signed, signature] = [token.slice(0, token.lastIndexOf(".")), token.slice(token.lastIndexOf(".") + 1)];
  const key = createPublicKey({ key: { ...keys[0] }, format: "jwk" });
  assert.ok(verify(null, Buffer.from(signed), key, Buffer.from(signature, "base64url")));
  const { iat, exp, jti, toe, ...rest } = payload;
  assert.deepEqual(rest, {
    iss: BASE,
    aud: api.endpoint,
    sub_id: { format: "iss_sub", iss: BASE, sub: ada.id },
    events: { [`${RISC}/account-disabled`]: {} },
  });
  assert.ok(Number.isInteger(iat) && exp > iat && toe >= before && toe <= Date.now() / 1000 && /^[0-9a-f-]{36}$/.test(jti));
});

test("each change sends its own event, and what changes nothing sends none", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, settled, database } = await issuer(t, api, { audience: "https://api.example.com/events" });
  const admin = { headers: boss.headers };
  const ada = await join("ada");
  const userId = ada.id;
  const again = async () => bearer((await auth.api.signInEmail({ body: ada.body, returnHeaders: true })).headers);
  const told = async (...types: string[]) => {
    await settled();
    assert.deepEqual(api.received.splice(0).map((event) => (assert.equal(event.payload["sub_id"].sub, userId), event.type)), types);
  };
  await told();
  await auth.api.updateUser({ headers: ada.headers, body: { name: "Ada L." } });
  await auth.api.adminUpdateUser({ ...admin, body: { userId, data: { name: "L." } } });
  await auth.api.setRole({ ...admin, body: { userId, role: "user" } });
  await auth.api.unbanUser({ ...admin, body: { userId } });
  await told();

  await auth.api.setRole({ ...admin, body: { userId, role: ["user", "admin"] } });
  await settled();
  assert.deepEqual(api.received[0]?.payload["events"], { [`${CAEP}/token-claims-change`]: { claims: { role: "user,admin" } } });
  assert.equal(api.received[0]?.payload["aud"], "https://api.example.com/events");
  await told("token-claims-change");
  await auth.api.adminUpdateUser({ ...admin, body: { userId, data: { role: "user", name: "Ada" } } });
  await told("token-claims-change");

  await auth.api.banUser({ ...admin, body: { userId } });
  await told("account-disabled", "session-revoked");
  await auth.api.banUser({ ...admin, body: { userId, banReason: "still" } });
  await told();
  await auth.api.unbanUser({ ...admin, body: { userId } });
  await settled();
  assert.deepEqual(uris(api.received[0]!), [`${RISC}/account-enabled`]);
  await told("account-enabled");

  const [first, second] = [await again(), await again()];
  await told();
  await auth.api.signOut({ headers: first });
  await told("session-revoked");
  await again();
  await auth.api.revokeOtherSessions({ headers: second });
  await told("session-revoked");
  await auth.api.revokeOtherSessions({ headers: second });
  await told();
  const { body: { password } } = ada;
  const changed = { currentPassword: password, newPassword: password };
  await auth.api.changePassword({ headers: second, body: changed });
  await told();
  const { token } = await auth.api.changePassword({ headers: second, body: { ...changed, revokeOtherSessions: true } });
  assert.ok(token);
  await settled();
  assert.deepEqual(uris(api.received[0]!), [`${CAEP}/session-revoked`]);
  await told("session-revoked");
  await auth.api.revokeUserSessions({ ...admin, body: { userId } });
  await told("session-revoked");

  const old = await again();
  database.prepare("UPDATE session SET expiresAt = ? WHERE userId = ?").run(new Date(Date.now() - 1000).toISOString(), userId);
  assert.equal(await auth.api.getSession({ headers: old }), null);
  assert.equal(database.prepare("SELECT count(*) AS n FROM session WHERE userId = ?").get(userId)?.["n"], 0);
  await told(); // a session that ended by itself is cleaned up

  const last = await again();
  await auth.api.revokeSessions({ headers: last });
  await told("session-revoked");
  await auth.api.removeUser({ ...admin, body: { userId } });
  await settled();
  assert.deepEqual(uris(api.received[0]!), [`${RISC}/account-purged`]);
  await told("account-purged");
});

test("who deletes their own account is purged", async (t) => {
  const api = await receiver(t);
  const { auth, join, settled } = await issuer(t, api);
  const { headers, body: { password } } = await join("ada");
  await auth.api.deleteUser({ headers, body: { password } });
  await settled();
  assert.deepEqual(api.types(), ["session-revoked", "account-purged"]);
});

test("a ban that ends by itself is told at the next sign-in", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, settled, database } = await issuer(t, api);
  const ada = await join("ada");
  await auth.api.banUser({ headers: boss.headers, body: { userId: ada.id, banExpiresIn: 60 } });
  await settled();
  await assert.rejects(auth.api.signInEmail({ body: ada.body }), /banned/);
  assert.deepEqual(api.types(), ["account-disabled", "session-revoked"]);
  database.prepare("UPDATE user SET banExpires = ?").run(new Date(Date.now() - 1000).toISOString());
  await auth.api.signInEmail({ body: ada.body });
  await settled();
  assert.deepEqual(api.types().slice(2), ["account-enabled"]);
});

test("an anonymous account that is linked is merged, and only then purged", async (t) => {
  const api = await receiver(t);
  const { auth, join, settled } = await issuer(t, api);
  const guest = await auth.api.signInAnonymous({ headers: new Headers(), returnHeaders: true });
  const ada = await join("ada", bearer(guest.headers));
  await settled();
  assert.deepEqual(api.types(), ["account-merged", "session-revoked", "account-purged"]);
  for (const { payload } of api.received) assert.equal(payload["sub_id"].sub, guest.response.user.id);
  assert.deepEqual(api.received[0]?.payload["events"], {
    "urn:better-auth-resource-server:event-type:account-merged": { into: { format: "iss_sub", iss: BASE, sub: ada.id } },
  });
});

test("an app's own onLinkAccount runs as well, and one that fails merges nothing", async (t) => {
  const api = await receiver(t);
  const database = new DatabaseSync(":memory:");
  const options = authOptions({ database, baseURL: BASE, secret: SECRET });
  const seen: string[] = [];
  const linked = anonymous({ onLinkAccount: ({ newUser }) => void seen.push(newUser.user.name) });
  const plugins = [...options.plugins.filter(({ id }) => id !== "anonymous"), linked, securityEvents({ endpoint: api.endpoint })];
  const auth = betterAuth({ ...options, plugins });
  await (await getMigrations(auth.options)).runMigrations();
  const guest = await auth.handler(new Request(`${BASE}/api/auth/sign-in/anonymous`, { method: "POST" }));
  const body = { email: "ada@example.com", password: "long-enough-for-a-test", name: "Ada" };
  await auth.api.signUpEmail({ body, headers: bearer(guest.headers) });
  assert.deepEqual(seen, ["Ada"]);
  assert.equal((await api.until(1))[0]?.type, "account-merged");
});

test("serial ids are told as the tokens say them", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, settled } = await issuer(t, api, { serial: true });
  const ada = await join("ada");
  await auth.api.banUser({ headers: boss.headers, body: { userId: ada.id } });
  await settled();
  assert.deepEqual(api.received.map(({ payload }) => payload["sub_id"].sub), ["2", "2"]);
  await auth.api.removeUser({ headers: boss.headers, body: { userId: ada.id } });
  await settled();
  assert.equal(api.types().at(-1), "account-purged");
});

test("what is not accepted is sent again: the same jti and toe, signed anew", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, settled } = await issuer(t, api);
  const ada = await join("ada");
  let mood = 0;
  api.answer = () => ({ status: [200, 400, 302, 202][Math.min(mood++, 3)]!, body: '{"err":"invalid_audience"}', headers: { location: "/" } });
  await auth.api.setRole({ headers: boss.headers, body: { userId: ada.id, role: "admin" } });
  const sent = (await api.until(4)).map(({ payload }) => payload);
  await settled();
  assert.deepEqual(api.types(), Array(4).fill("token-claims-change"));
  assert.equal(new Set(sent.map(({ jti }) => jti)).size, 1);
  assert.equal(new Set(sent.map(({ toe }) => toe)).size, 1);
  assert.ok(sent.at(-1)!["iat"] - sent[0]!["iat"] >= 1);
});

test("a ban and its end are sent in order, and neither waits for another event of that person", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, later, rows } = await issuer(t, api, { timer: false });
  const admin = { headers: boss.headers };
  const { id: userId } = await join("ada");
  const refused = ["token-claims-change", "session-revoked"];
  api.answer = ({ type }) => ({ status: refused.includes(type) ? 400 : 503 });
  await auth.api.setRole({ ...admin, body: { userId, role: "admin" } });
  await auth.api.banUser({ ...admin, body: { userId } });
  await auth.api.unbanUser({ ...admin, body: { userId } });
  await auth.api.banUser({ ...admin, body: { userId } });
  await later();
  api.answer = ({ type }) => ({ status: refused.includes(type) ? 400 : 202 });
  api.received.length = 0;
  await auth.api.deliverSecurityEvents();
  const bans = api.received.filter(({ type }) => !refused.includes(type));
  assert.deepEqual(bans.map(({ type }) => type), ["account-disabled", "account-disabled"]); // the unban is no longer true
  assert.ok(bans[0]!.payload["toe"] < bans[1]!.payload["toe"]);
  assert.deepEqual(rows().map(({ type }) => type), refused);
});

test("one whose events are not accepted holds up nobody else", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, rows } = await issuer(t, api);
  const [stuck, ada] = [await join("stuck"), await join("ada")];
  api.answer = ({ payload }) => ({ status: payload["sub_id"].sub === stuck.id ? 500 : 202 });
  for (const { id: userId } of [stuck, ada]) await auth.api.banUser({ headers: boss.headers, body: { userId } });
  while (rows().some(({ userId }) => userId === ada.id)) await new Promise(setImmediate);
  const told = (id: string) => api.received.filter(({ payload }) => payload["sub_id"].sub === id).map(({ type }) => type);
  assert.deepEqual(told(ada.id), ["account-disabled", "session-revoked"]);
  assert.ok(rows().some(({ userId }) => userId === stuck.id));
});

test("an API that is down holds up no answer for long, and hears everything that is still true when it is back", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, rows, settled } = await issuer(t, api);
  const admin = { headers: boss.headers };
  const people: { id: string }[] = [];
  for (let n = 0; n < 12; n += 1) people.push(await join(`ada-${n}`));
  api.close();
  for (const { id: userId } of people) await auth.api.banUser({ ...admin, body: { userId } });
  await auth.api.unbanUser({ ...admin, body: { userId: people[0]!.id } });
  await auth.api.removeUser({ ...admin, body: { userId: people[1]!.id } });
  assert.equal(rows().length, 26);
  api.open();
  await api.until(24);
  await settled();
  const about = (n: number) => api.received.filter(({ payload }) => payload["sub_id"].sub === people[n]!.id);
  const heard = (n: number) => about(n).map(({ type }) => type).sort();
  assert.deepEqual(heard(0), ["account-enabled", "session-revoked"]); // the ban was lifted unheard
  assert.deepEqual(heard(1), ["account-purged", "session-revoked"]);
  for (let n = 2; n < 12; n += 1) assert.deepEqual(heard(n), ["account-disabled", "session-revoked"]);
});

test("of many changes that nobody heard, the last of each kind is told", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, rows } = await issuer(t, api, { timer: false });
  const ada = await join("ada");
  api.close();
  for (const role of ["admin", "user", "admin"] as const) {
    await auth.api.setRole({ headers: boss.headers, body: { userId: ada.id, role } });
  }
  for (let n = 0; n < 3; n += 1) {
    const { headers } = await auth.api.signInEmail({ body: ada.body, returnHeaders: true });
    await auth.api.signOut({ headers: bearer(headers) });
  }
  api.open();
  while (rows().length) {
    await auth.api.deliverSecurityEvents();
    await new Promise(setImmediate); // what is under way is to end
  }
  assert.deepEqual(api.types().sort(), ["session-revoked", "token-claims-change"]);
});

test("the first that is accepted after an outage takes the others along, however long they were to wait", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, database, later } = await issuer(t, api, { timer: false });
  api.close();
  for (const name of ["ada", "bob", "eve"]) {
    const { id: userId } = await join(name);
    await auth.api.setRole({ headers: boss.headers, body: { userId, role: "admin" } });
  }
  await later();
  database.exec("UPDATE securityEvent SET dueAt = '2099-01-01T00:00:00.000Z' WHERE begunAt > (SELECT min(begunAt) FROM securityEvent)");
  api.open();
  assert.deepEqual(await auth.api.deliverSecurityEvents(), { waiting: 0 });
  assert.equal(api.received.length, 3);
});

test("without a timer, what is left goes out when the app says so", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, later } = await issuer(t, api, { timer: false });
  const ada = await join("ada");
  api.answer = () => ({ status: 503 });
  await auth.api.setRole({ headers: boss.headers, body: { userId: ada.id, role: "admin" } });
  await api.until(1);
  api.answer = () => ({ status: 202 });
  await later();
  assert.deepEqual(await auth.api.deliverSecurityEvents(), { waiting: 0 });
  assert.equal(api.received.length, 2);
});

test("a slow API holds up the answer for no more than a moment", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, rows, settled } = await issuer(t, api);
  const ada = await join("ada");
  const { promise, resolve } = Promise.withResolvers<void>();
  api.answer = async () => (await promise, { status: 202 });
  await auth.api.setRole({ headers: boss.headers, body: { userId: ada.id, role: "admin" } });
  assert.equal(rows().length, 1);
  resolve();
  await settled();
  assert.equal(api.received.length, 1);
});

test("an API that takes an event and never answers is given up, and asked again later", { timeout: 60_000 }, async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, later } = await issuer(t, api, { timer: false });
  const ada = await join("ada");
  api.answer = () => ({ status: 503 });
  await auth.api.setRole({ headers: boss.headers, body: { userId: ada.id, role: "admin" } });
  await later();
  api.answer = () => new Promise(() => {});
  assert.deepEqual(await auth.api.deliverSecurityEvents(), { waiting: 1 });
  api.answer = () => ({ status: 202 });
  await later();
  assert.deepEqual(await auth.api.deliverSecurityEvents(), { waiting: 0 });
  assert.equal(api.received.length, 3);
});

test("an API that takes no more sign-outs for now is sent none until it said, and everything else at once", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, settled } = await issuer(t, api);
  const people: Awaited<ReturnType<typeof join>>[] = [];
  for (let n = 0; n < 4; n += 1) people.push(await join(`ada-${n}`));
  const [eve, ...others] = people;
  const times: number[] = [];
  api.answer = ({ type }) => {
    if (type !== "session-revoked") return { status: 202 };
    return times.push(performance.now()) > 1 ? { status: 202 } : { status: 429, headers: { "retry-after": "2" } };
  };
  for (const { headers } of others) await auth.api.signOut({ headers });
  await auth.api.setRole({ headers: boss.headers, body: { userId: eve!.id, role: "admin" } });
  await auth.api.banUser({ headers: boss.headers, body: { userId: eve!.id } });
  assert.deepEqual(api.types(), ["session-revoked", "token-claims-change", "account-disabled"]);
  await settled();
  assert.equal(times.length, 5);
  assert.ok(times[1]! - times[0]! > 1900, `${times}`);
});

test("a ban that is answered 429 is sent again within a second, whatever Retry-After says", { timeout: 30_000 }, async (t) => {
  const api = await receiver(t);
  const { auth, join, boss } = await issuer(t, api);
  const ada = await join("ada");
  const times: number[] = [];
  api.answer = ({ type }) => {
    if (type === "account-disabled") times.push(performance.now());
    return times.length > 1 ? { status: 202 } : { status: 429, headers: { "retry-after": "60" } };
  };
  await auth.api.banUser({ headers: boss.headers, body: { userId: ada.id } });
  while (times.length < 2) await new Promise(setImmediate);
  assert.ok(times[1]! - times[0]! < 2000, `${times}`);
});

/** What an outage may leave in the outbox: events of so many people. */
function leave(database: DatabaseSync, type: string, count: number, person = (n: number) => `person-${n}`) {
  const insert = database.prepare(
    "INSERT INTO securityEvent (id, jti, type, userId, mergedInto, begunAt, toe, attempts, dueAt) VALUES (?, ?, ?, ?, ?, ?, ?, 0, ?)",
  );
  for (let n = 0; n < count; n += 1) {
    const at = new Date(Date.now() - 60_000 + n).toISOString();
    insert.run(`${n}`, `jti-${n}`, type, person(n), type === "account-merged" ? "ada" : null, at, at, at);
  }
}

for (const type of ["session-revoked", "account-purged", "account-merged"]) {
  test(`when the API is back, a ban does not wait for 1,500 events of type ${type}`, { timeout: 120_000 }, async (t) => {
    const api = await receiver(t);
    const { auth, join, boss, database, rows } = await issuer(t, api);
    const { id: userId } = await join("eve");
    api.close();
    leave(database, type, 1500);
    await auth.api.banUser({ headers: boss.headers, body: { userId } });
    while (!rows().some(({ attempts }) => Number(attempts) > 2)) await new Promise(setImmediate);
    api.open();
    await api.until(100);
    const place = api.types().indexOf("account-disabled");
    assert.ok(place >= 0 && place < 30, `${place}`);
    assert.equal(api.types().filter((each) => each === "account-disabled").length, 1);
  });
}

test("a ban does not wait for sign-outs that the API is slow to answer, of which a bounded number is under way", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, settled } = await issuer(t, api);
  const { id: userId } = await join("eve");
  const { promise, resolve } = Promise.withResolvers<void>();
  api.answer = async ({ type }) => {
    if (type === "session-revoked") await promise;
    return { status: 202 };
  };
  const guests: Headers[] = [];
  for (let n = 0; n < 40; n += 1) {
    guests.push(bearer((await auth.api.signInAnonymous({ headers: new Headers(), returnHeaders: true })).headers));
  }
  await Promise.all(guests.map((headers) => auth.api.signOut({ headers })));
  await auth.api.banUser({ headers: boss.headers, body: { userId } });
  while (!api.types().includes("account-disabled")) await new Promise(setImmediate);
  const underWay = api.types().filter((type) => type === "session-revoked").length;
  assert.ok(underWay <= 16, `${underWay}`);
  resolve();
  await settled();
  assert.equal(api.received.length, 42);
});

test("the sign-outs of one person that wait are told in one event, which names the last", async (t) => {
  const api = await receiver(t);
  const { auth, database, rows } = await issuer(t, api, { timer: false });
  leave(database, "session-revoked", 300, () => "ada");
  const last = Date.parse(String(rows().at(-1)!["toe"])) / 1000;
  assert.deepEqual(await auth.api.deliverSecurityEvents(), { waiting: 0 });
  assert.deepEqual(api.received.map(({ payload }) => payload["toe"]), [last]);
});

test("an API that is back is noticed within a second, though every event was to wait longer", { timeout: 30_000 }, async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, database, rows } = await issuer(t, api);
  const { id: userId } = await join("eve");
  api.close();
  await auth.api.setRole({ headers: boss.headers, body: { userId, role: "admin" } });
  while (!rows().some(({ attempts }) => Number(attempts) > 2)) await new Promise(setImmediate);
  while (rows().some(({ claimedAt }) => claimedAt)) await new Promise(setImmediate);
  database.exec("UPDATE securityEvent SET dueAt = '2099-01-01T00:00:00.000Z'");
  const begin = performance.now();
  api.open();
  await api.until(1);
  assert.ok(performance.now() - begin < 2000);
});

test("a server that is started tells what another has left, though nobody asks it for anything", async (t) => {
  const api = await receiver(t);
  const directory = mkdtempSync(join(tmpdir(), "events-"));
  t.after(() => rmSync(directory, { recursive: true }));
  const file = join(directory, "db.sqlite");
  const first = await issuer(t, api, { file, timer: false });
  const ada = await first.join("ada");
  api.answer = () => ({ status: 503 });
  await first.auth.api.setRole({ headers: first.boss.headers, body: { userId: ada.id, role: "admin" } });
  await first.later();
  first.database.close();
  api.answer = () => ({ status: 202 });
  const { settled } = await issuer(t, api, { file });
  await settled();
  assert.deepEqual(api.types(), ["token-claims-change", "token-claims-change"]);
});

test("everybody whom one change concerns is told of, however many", async (t) => {
  const api = await receiver(t);
  const { auth, settled, boss } = await issuer(t, api);
  const { adapter } = await auth.$context;
  for (let n = 0; n < 101; n += 1) {
    await adapter.create({ model: "user", data: { name: "Ada", email: `${n}@example.com`, emailVerified: true, role: "user" } });
  }
  await adapter.updateMany({ model: "user", where: [{ field: "role", value: "user" }], update: { banned: true } });
  await settled();
  const people = new Set(api.received.map(({ payload }) => payload["sub_id"].sub));
  assert.equal(people.size, 101);
  assert.ok(!people.has(boss.id));
});

test("two issuers on one database send each change once", async (t) => {
  const api = await receiver(t);
  const directory = mkdtempSync(join(tmpdir(), "events-"));
  t.after(() => rmSync(directory, { recursive: true }));
  const file = join(directory, "db.sqlite");
  const [one, two] = [await issuer(t, api, { file, timer: false }), await issuer(t, api, { file, timer: false })];
  api.close();
  for (let n = 0; n < 10; n += 1) {
    const { id: userId } = await one.join(`ada-${n}`);
    await one.auth.api.setRole({ headers: one.boss.headers, body: { userId, role: "admin" } });
  }
  api.open();
  await one.later();
  while (one.rows().length) await Promise.all([one, two].map(({ auth }) => auth.api.deliverSecurityEvents()));
  assert.equal(api.received.length, 10);
  assert.equal(new Set(api.received.map(({ payload }) => payload["jti"])).size, 10);
});

/** Runs an issuer that ends, as by `kill -9`, where a trigger says so. */
async function killedAt(file: string, endpoint: string, trigger: string, act: string): Promise<void> {
  const program = `
    import { DatabaseSync } from "node:sqlite";
    import { betterAuth } from "better-auth";
    import { authOptions } from "./auth.ts";
    import { securityEvents } from "./security-events.ts";
    const database = new DatabaseSync(${JSON.stringify(file)});
    database.function("die", () => process.kill(process.pid, "SIGKILL"));
    database.exec("CREATE TEMP TRIGGER die ${trigger} BEGIN SELECT die(); END");
    const options = authOptions({ database, baseURL: "${BASE}", secret: "${SECRET}" });
    const auth = betterAuth({ ...options, plugins: [...options.plugins, securityEvents({ endpoint: "${endpoint}" })] });
    const { internalAdapter } = await auth.$context;
    ${act};
  `;
  const child = spawn(process.execPath, [...process.execArgv.filter((flag) => flag !== "--test"), "--input-type=module", "-e", program], {
    cwd: import.meta.dirname,
    stdio: ["ignore", "inherit", "inherit"],
  });
  const [, signal] = await once(child, "exit");
  assert.equal(signal, "SIGKILL");
}

for (const [what, trigger, events] of [
  ["before the change was made, tells nothing", "BEFORE UPDATE OF banned ON user", []],
  ["after the change was made, tells it", "BEFORE UPDATE OF toe ON securityEvent", ["account-disabled"]],
  ["when the change was noted as made, tells it", "BEFORE UPDATE OF attempts ON securityEvent", ["account-disabled"]],
  ["after the API has accepted it, tells it again as the same", "BEFORE DELETE ON securityEvent", ["account-disabled", "account-disabled"]],
] as const) {
  test(`a server that is killed ${what}`, async (t) => {
    const api = await receiver(t);
    const directory = mkdtempSync(join(tmpdir(), "events-"));
    t.after(() => rmSync(directory, { recursive: true }));
    const file = join(directory, "db.sqlite");
    const first = await issuer(t, api, { file, timer: false });
    const { id } = await first.join("ada");
    first.database.close();
    await killedAt(file, api.endpoint, trigger, `await internalAdapter.updateUser("${id}", { banned: true })`);
    const { auth, database, rows } = await issuer(t, api, { file, timer: false });
    assert.equal(rows().length, 1);
    database.exec("UPDATE securityEvent SET dueAt = '2020-01-01T00:00:00.000Z'"); // ten seconds later
    assert.deepEqual(await auth.api.deliverSecurityEvents(), { waiting: 0 });
    assert.deepEqual(api.types(), events);
    assert.ok(new Set(api.received.map(({ payload }) => payload["jti"])).size <= 1);
  });
}

const NOTED = "BEFORE UPDATE OF toe ON securityEvent";
for (const [type, act, trigger, events] of [
  ["account-enabled", 'updateUser("ID", { banned: false })', NOTED, ["account-enabled"]],
  ["token-claims-change", 'updateUser("ID", { role: "admin" })', NOTED, ["token-claims-change"]],
  ["token-claims-change", 'updateUser("ID", { role: "admin" })', "BEFORE UPDATE OF role ON user", []],
  ["session-revoked", 'deleteUserSessions("ID")', NOTED, ["session-revoked"]],
  ["session-revoked", 'deleteUserSessions("ID")', "BEFORE DELETE ON session", []],
] as const) {
  test(`a server that is killed in ${type}, ${trigger}, leaves to the next what is true`, async (t) => {
    const api = await receiver(t);
    const directory = mkdtempSync(join(tmpdir(), "events-"));
    t.after(() => rmSync(directory, { recursive: true }));
    const file = join(directory, "db.sqlite");
    const first = await issuer(t, api, { file, timer: false });
    const { id } = await first.join("ada");
    if (type === "account-enabled") first.database.prepare("UPDATE user SET banned = 1 WHERE id = ?").run(id);
    first.database.close();
    await killedAt(file, api.endpoint, trigger, `await internalAdapter.${act.replace("ID", id)}`);
    const { auth, database } = await issuer(t, api, { file, timer: false });
    database.exec("UPDATE securityEvent SET dueAt = '2020-01-01T00:00:00.000Z'");
    assert.deepEqual(await auth.api.deliverSecurityEvents(), { waiting: 0 });
    assert.deepEqual(api.types(), events);
  });
}

test("a change that nobody was told of yet is not given up for one that was never made", async (t) => {
  const api = await receiver(t);
  const directory = mkdtempSync(join(tmpdir(), "events-"));
  t.after(() => rmSync(directory, { recursive: true }));
  const file = join(directory, "db.sqlite");
  const first = await issuer(t, api, { file, timer: false });
  const { id } = await first.join("ada");
  api.answer = () => ({ status: 503 });
  await first.auth.api.setRole({ headers: first.boss.headers, body: { userId: id, role: "admin" } });
  first.database.close();
  await killedAt(file, api.endpoint, "BEFORE UPDATE OF role ON user", `await internalAdapter.updateUser("${id}", { role: "user" })`);
  api.answer = () => ({ status: 202 });
  api.received.length = 0;
  const { auth, database, rows } = await issuer(t, api, { file, timer: false });
  assert.equal(rows().length, 2);
  database.exec("UPDATE securityEvent SET dueAt = '2020-01-01T00:00:00.000Z'");
  assert.deepEqual(await auth.api.deliverSecurityEvents(), { waiting: 0 });
  assert.deepEqual(api.received.map(({ payload }) => payload["events"]), [{ [`${CAEP}/token-claims-change`]: { claims: { role: "admin" } } }]);
});

test("an outbox that fails once the change was made does not undo it, and it is told later", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, database } = await issuer(t, api, { timer: false });
  const ada = await join("ada");
  database.exec("CREATE TEMP TRIGGER full BEFORE UPDATE OF toe ON securityEvent BEGIN SELECT RAISE(ABORT, 'full'); END");
  await auth.api.setRole({ headers: boss.headers, body: { userId: ada.id, role: "admin" } });
  assert.deepEqual(api.types(), []);
  database.exec("DROP TRIGGER full; UPDATE securityEvent SET dueAt = '2020-01-01T00:00:00.000Z'");
  assert.deepEqual(await auth.api.deliverSecurityEvents(), { waiting: 0 });
  assert.deepEqual(api.types(), ["token-claims-change"]);
});

test("a change that took so long that it was given up is told all the same", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, database, settled } = await issuer(t, api);
  const ada = await join("ada");
  database.exec("CREATE TEMP TRIGGER given_up BEFORE UPDATE OF banned ON user BEGIN DELETE FROM securityEvent; END");
  await auth.api.banUser({ headers: boss.headers, body: { userId: ada.id } });
  await settled();
  assert.deepEqual(api.types(), ["account-disabled", "session-revoked"]);
});

test("a change that is rolled back is not told", async (t) => {
  const api = await receiver(t);
  const { auth, join, rows } = await issuer(t, api);
  const ada = await join("ada");
  const { adapter } = await auth.$context;
  const where = [{ field: "id", value: ada.id }];
  const work = adapter.transaction(async (inner) => {
    await inner.update({ model: "user", where, update: { banned: true } });
    throw new Error("no");
  });
  await assert.rejects(work, /no/);
  assert.deepEqual([rows(), api.received], [[], []]);
});

test("a merge waits for what came before it to either account", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, later } = await issuer(t, api, { timer: false });
  const ada = await join("ada");
  const guest = await auth.api.signInAnonymous({ headers: new Headers(), returnHeaders: true });
  api.answer = () => ({ status: 503 });
  await auth.api.setRole({ headers: boss.headers, body: { userId: ada.id, role: "admin" } });
  await auth.api.signInEmail({ body: ada.body, headers: bearer(guest.headers) });
  await later();
  assert.ok(!api.types().includes("account-merged"));
  api.answer = () => ({ status: 202 });
  api.received.length = 0;
  assert.deepEqual(await auth.api.deliverSecurityEvents(), { waiting: 0 });
  const types = api.types().filter((type) => type !== "session-revoked"); // which waits for nothing
  assert.deepEqual(types, ["token-claims-change", "account-merged", "account-purged"]);
});

test("what cannot work is refused at the start", async (t) => {
  const api = await receiver(t);
  const options = authOptions({ database: new DatabaseSync(":memory:"), baseURL: BASE, secret: SECRET });
  const events = securityEvents({ endpoint: api.endpoint });
  const without = (id: string) => options.plugins.filter((plugin) => plugin.id !== id);
  for (const [plugins, why] of [
    [[...without("jwt"), events], /jwt plugin/],
    [[...without("anonymous"), anonymous(), events], /anonymous\(\{\}\)/],
    [[...options.plugins, securityEvents({ endpoint: "api.example.com" })], /no address/],
    [[...without("jwt"), jwt({ jwt: { getSubject: ({ user }) => user.email } }), events], /not by getSubject/],
  ] as const) {
    await assert.rejects(betterAuth({ ...options, plugins: [...plugins] }).$context, why);
  }
});

test("no token is logged", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, errors } = await issuer(t, api);
  const ada = await join("ada");
  api.answer = () => ({ status: 400, body: '{"err":"invalid_audience","description":"not for me"}' });
  await auth.api.setRole({ headers: boss.headers, body: { userId: ada.id, role: "admin" } });
  await api.until(1);
  while (!errors.some((line) => line.includes("invalid_audience"))) await new Promise(setImmediate);
  assert.ok(!errors.some((line) => line.includes(api.received[0]!.token.split(".")[2]!)));
});
