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

/** Stores passwords unhashed, because hashing would take most of the time. */
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

/** A receiver of security events. Responds with `answer`, by default 202. */
async function receiver(t: TestContext) {
  const received: Received[] = [];
  const waiting: { count: number; resolve: () => void }[] = [];
  const api = {
    received,
    answer: (_: Received): Answer | Promise<Answer> => ({ status: 202 }),
    endpoint: "",
    /** Resolves when `count` events have been received in total. */
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
  /** Waits until the outbox is empty. */
  const settled = async () => {
    while (rows().length) await new Promise(setImmediate);
  };
  /** Waits for the attempts in progress, then makes all events due. */
  const makeDue = async () => {
    while (rows().some(({ claimedAt }) => claimedAt)) await new Promise(setImmediate);
    database.exec("UPDATE securityEvent SET dueAt = '2020-01-01T00:00:00.000Z'");
  };
  t.after(() => void (database.isOpen && database.close()));
  const boss = await join(`boss-${randomBytes(4).toString("hex")}`);
  database.prepare("UPDATE user SET role = 'admin' WHERE id = ?").run(boss.id);
  return { auth, database, join, boss, rows, settled, makeDue, errors };
}

const bearer = (headers: Headers) => new Headers({ authorization: `Bearer ${headers.get("set-auth-token")}` });
const uris = ({ payload }: Received) => Object.keys(payload["events"]);

test("a ban is sent as a security event token (RFC 8417) signed with a published key", async (t) => {
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

test("each change sends its event, and updates without effect send none", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, settled, database } = await issuer(t, api, { audience: "https://api.example.com/events" });
  const admin = { headers: boss.headers };
  const ada = await join("ada");
  const userId = ada.id;
  const again = async () => bearer((await auth.api.signInEmail({ body: ada.body, returnHeaders: true })).headers);
  const assertSent = async (...types: string[]) => {
    await settled();
    assert.deepEqual(api.received.splice(0).map((event) => (assert.equal(event.payload["sub_id"].sub, userId), event.type)), types);
  };
  await assertSent();
  await auth.api.updateUser({ headers: ada.headers, body: { name: "Ada L." } });
  await auth.api.adminUpdateUser({ ...admin, body: { userId, data: { name: "L." } } });
  await auth.api.setRole({ ...admin, body: { userId, role: "user" } });
  await auth.api.unbanUser({ ...admin, body: { userId } });
  await assertSent();

  await auth.api.setRole({ ...admin, body: { userId, role: ["user", "admin"] } });
  await settled();
  assert.deepEqual(api.received[0]?.payload["events"], { [`${CAEP}/token-claims-change`]: { claims: { role: "user,admin" } } });
  assert.equal(api.received[0]?.payload["aud"], "https://api.example.com/events");
  await assertSent("token-claims-change");
  await auth.api.adminUpdateUser({ ...admin, body: { userId, data: { role: "user", name: "Ada" } } });
  await assertSent("token-claims-change");

  await auth.api.banUser({ ...admin, body: { userId } });
  await assertSent("account-disabled", "session-revoked");
  await auth.api.banUser({ ...admin, body: { userId, banReason: "still" } });
  await assertSent();
  await auth.api.unbanUser({ ...admin, body: { userId } });
  await settled();
  assert.deepEqual(uris(api.received[0]!), [`${RISC}/account-enabled`]);
  await assertSent("account-enabled");

  const [first, second] = [await again(), await again()];
  await assertSent();
  await auth.api.signOut({ headers: first });
  await assertSent("session-revoked");
  await again();
  await auth.api.revokeOtherSessions({ headers: second });
  await assertSent("session-revoked");
  await auth.api.revokeOtherSessions({ headers: second });
  await assertSent();
  const { body: { password } } = ada;
  const changed = { currentPassword: password, newPassword: password };
  await auth.api.changePassword({ headers: second, body: changed });
  await assertSent();
  const { token } = await auth.api.changePassword({ headers: second, body: { ...changed, revokeOtherSessions: true } });
  assert.ok(token);
  await settled();
  assert.deepEqual(uris(api.received[0]!), [`${CAEP}/session-revoked`]);
  await assertSent("session-revoked");
  await auth.api.revokeUserSessions({ ...admin, body: { userId } });
  await assertSent("session-revoked");

  const old = await again();
  database.prepare("UPDATE session SET expiresAt = ? WHERE userId = ?").run(new Date(Date.now() - 1000).toISOString(), userId);
  assert.equal(await auth.api.getSession({ headers: old }), null);
  assert.equal(database.prepare("SELECT count(*) AS n FROM session WHERE userId = ?").get(userId)?.["n"], 0);
  await assertSent(); // an expired session is only cleaned up

  const last = await again();
  await auth.api.revokeSessions({ headers: last });
  await assertSent("session-revoked");
  await auth.api.removeUser({ ...admin, body: { userId } });
  await settled();
  assert.deepEqual(uris(api.received[0]!), [`${RISC}/account-purged`]);
  await assertSent("account-purged");
});

test("deleting one's own account sends account-purged", async (t) => {
  const api = await receiver(t);
  const { auth, join, settled } = await issuer(t, api);
  const { headers, body: { password } } = await join("ada");
  await auth.api.deleteUser({ headers, body: { password } });
  await settled();
  assert.deepEqual(api.types(), ["session-revoked", "account-purged"]);
});

test("the end of an expired ban is sent at the next sign-in", async (t) => {
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

test("linking an anonymous account sends account-merged before account-purged", async (t) => {
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

test("the app's own onLinkAccount is called, too", async (t) => {
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

test("serial ids are sent as in the tokens", async (t) => {
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

test("a rejected event is sent again with the same jti and toe and a new signature", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, settled } = await issuer(t, api);
  const ada = await join("ada");
  let attempt = 0;
  api.answer = () => ({ status: [200, 400, 302, 202][Math.min(attempt++, 3)]!, body: '{"err":"invalid_audience"}', headers: { location: "/" } });
  await auth.api.setRole({ headers: boss.headers, body: { userId: ada.id, role: "admin" } });
  const sent = (await api.until(4)).map(({ payload }) => payload);
  await settled();
  assert.deepEqual(api.types(), Array(4).fill("token-claims-change"));
  assert.equal(new Set(sent.map(({ jti }) => jti)).size, 1);
  assert.equal(new Set(sent.map(({ toe }) => toe)).size, 1);
  assert.ok(sent.at(-1)!["iat"] - sent[0]!["iat"] >= 1);
});

test("bans and unbans are sent in order and do not wait for other events of the user", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, makeDue, rows } = await issuer(t, api, { timer: false });
  const admin = { headers: boss.headers };
  const { id: userId } = await join("ada");
  const refused = ["token-claims-change", "session-revoked"];
  api.answer = ({ type }) => ({ status: refused.includes(type) ? 400 : 503 });
  await auth.api.setRole({ ...admin, body: { userId, role: "admin" } });
  await auth.api.banUser({ ...admin, body: { userId } });
  await auth.api.unbanUser({ ...admin, body: { userId } });
  await auth.api.banUser({ ...admin, body: { userId } });
  await makeDue();
  api.answer = ({ type }) => ({ status: refused.includes(type) ? 400 : 202 });
  api.received.length = 0;
  await auth.api.deliverSecurityEvents();
  const bans = api.received.filter(({ type }) => !refused.includes(type));
  assert.deepEqual(bans.map(({ type }) => type), ["account-disabled", "account-disabled"]); // the unban is no longer true
  assert.ok(bans[0]!.payload["toe"] < bans[1]!.payload["toe"]);
  assert.deepEqual(rows().map(({ type }) => type), refused);
});

test("rejected events of one user do not block those of others", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, rows } = await issuer(t, api);
  const [stuck, ada] = [await join("stuck"), await join("ada")];
  api.answer = ({ payload }) => ({ status: payload["sub_id"].sub === stuck.id ? 500 : 202 });
  for (const { id: userId } of [stuck, ada]) await auth.api.banUser({ headers: boss.headers, body: { userId } });
  while (rows().some(({ userId }) => userId === ada.id)) await new Promise(setImmediate);
  const sentTo = (id: string) => api.received.filter(({ payload }) => payload["sub_id"].sub === id).map(({ type }) => type);
  assert.deepEqual(sentTo(ada.id), ["account-disabled", "session-revoked"]);
  assert.ok(rows().some(({ userId }) => userId === stuck.id));
});

test("an outage of the API delays no response for long, and current events are sent afterwards", async (t) => {
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
  const eventsOf = (n: number) => api.received.filter(({ payload }) => payload["sub_id"].sub === people[n]!.id);
  const typesOf = (n: number) => eventsOf(n).map(({ type }) => type).sort();
  assert.deepEqual(typesOf(0), ["account-enabled", "session-revoked"]); // the ban was lifted before it was sent
  assert.deepEqual(typesOf(1), ["account-purged", "session-revoked"]);
  for (let n = 2; n < 12; n += 1) assert.deepEqual(typesOf(n), ["account-disabled", "session-revoked"]);
});

test("after an outage, only the latest role change and sign-out are sent", async (t) => {
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
    await new Promise(setImmediate); // let deliveries in progress finish
  }
  assert.deepEqual(api.types().sort(), ["session-revoked", "token-claims-change"]);
});

test("the first delivery after an outage makes all other events due", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, database, makeDue } = await issuer(t, api, { timer: false });
  api.close();
  for (const name of ["ada", "bob", "eve"]) {
    const { id: userId } = await join(name);
    await auth.api.setRole({ headers: boss.headers, body: { userId, role: "admin" } });
  }
  await makeDue();
  database.exec("UPDATE securityEvent SET dueAt = '2099-01-01T00:00:00.000Z' WHERE begunAt > (SELECT min(begunAt) FROM securityEvent)");
  api.open();
  assert.deepEqual(await auth.api.deliverSecurityEvents(), { waiting: 0 });
  assert.equal(api.received.length, 3);
});

test("without a timer, deliverSecurityEvents sends the remaining events", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, makeDue } = await issuer(t, api, { timer: false });
  const ada = await join("ada");
  api.answer = () => ({ status: 503 });
  await auth.api.setRole({ headers: boss.headers, body: { userId: ada.id, role: "admin" } });
  await api.until(1);
  api.answer = () => ({ status: 202 });
  await makeDue();
  assert.deepEqual(await auth.api.deliverSecurityEvents(), { waiting: 0 });
  assert.equal(api.received.length, 2);
});

test("a slow API delays the response by a bounded time", async (t) => {
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

test("a request without a response times out and is retried", { timeout: 60_000 }, async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, makeDue } = await issuer(t, api, { timer: false });
  const ada = await join("ada");
  api.answer = () => ({ status: 503 });
  await auth.api.setRole({ headers: boss.headers, body: { userId: ada.id, role: "admin" } });
  await makeDue();
  api.answer = () => new Promise(() => {});
  assert.deepEqual(await auth.api.deliverSecurityEvents(), { waiting: 1 });
  api.answer = () => ({ status: 202 });
  await makeDue();
  assert.deepEqual(await auth.api.deliverSecurityEvents(), { waiting: 0 });
  assert.equal(api.received.length, 3);
});

test("a 429 for sign-outs pauses sign-outs for Retry-After, and nothing else", async (t) => {
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

test("a ban is retried within a second of a 429, regardless of Retry-After", { timeout: 30_000 }, async (t) => {
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

/** Inserts events of many users into the outbox, as after an outage. */
function insertEvents(database: DatabaseSync, type: string, count: number, person = (n: number) => `person-${n}`) {
  const insert = database.prepare(
    "INSERT INTO securityEvent (id, jti, type, userId, mergedInto, begunAt, toe, attempts, dueAt) VALUES (?, ?, ?, ?, ?, ?, ?, 0, ?)",
  );
  for (let n = 0; n < count; n += 1) {
    const at = new Date(Date.now() - 60_000 + n).toISOString();
    insert.run(`${n}`, `jti-${n}`, type, person(n), type === "account-merged" ? "ada" : null, at, at, at);
  }
}

for (const type of ["session-revoked", "account-purged", "account-merged"]) {
  test(`after an outage, a ban does not wait for 1,500 events of type ${type}`, { timeout: 120_000 }, async (t) => {
    const api = await receiver(t);
    const { auth, join, boss, database, rows } = await issuer(t, api);
    const { id: userId } = await join("eve");
    api.close();
    insertEvents(database, type, 1500);
    await auth.api.banUser({ headers: boss.headers, body: { userId } });
    while (!rows().some(({ attempts }) => Number(attempts) > 2)) await new Promise(setImmediate);
    api.open();
    await api.until(100);
    const position = api.types().indexOf("account-disabled");
    assert.ok(position >= 0 && position < 30, `${position}`);
    assert.equal(api.types().filter((each) => each === "account-disabled").length, 1);
  });
}

test("a ban does not wait for slow sign-outs, and the number of concurrent sign-outs is bounded", async (t) => {
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
  const pending = api.types().filter((type) => type === "session-revoked").length;
  assert.ok(pending <= 16, `${pending}`);
  resolve();
  await settled();
  assert.equal(api.received.length, 42);
});

test("waiting sign-outs of one user are sent as one event, with the time of the last", async (t) => {
  const api = await receiver(t);
  const { auth, database, rows } = await issuer(t, api, { timer: false });
  insertEvents(database, "session-revoked", 300, () => "ada");
  const last = Date.parse(String(rows().at(-1)!["toe"])) / 1000;
  assert.deepEqual(await auth.api.deliverSecurityEvents(), { waiting: 0 });
  assert.deepEqual(api.received.map(({ payload }) => payload["toe"]), [last]);
});

test("the end of an outage is detected within a second, even if no event is due", { timeout: 30_000 }, async (t) => {
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

test("a started server sends the events left by another, without any request", async (t) => {
  const api = await receiver(t);
  const directory = mkdtempSync(join(tmpdir(), "events-"));
  t.after(() => rmSync(directory, { recursive: true }));
  const file = join(directory, "db.sqlite");
  const first = await issuer(t, api, { file, timer: false });
  const ada = await first.join("ada");
  api.answer = () => ({ status: 503 });
  await first.auth.api.setRole({ headers: first.boss.headers, body: { userId: ada.id, role: "admin" } });
  await first.makeDue();
  first.database.close();
  api.answer = () => ({ status: 202 });
  const { settled } = await issuer(t, api, { file });
  await settled();
  assert.deepEqual(api.types(), ["token-claims-change", "token-claims-change"]);
});

test("a change of many users sends an event for each", async (t) => {
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

test("two issuers on one database send each event once", async (t) => {
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
  await one.makeDue();
  while (one.rows().length) await Promise.all([one, two].map(({ auth }) => auth.api.deliverSecurityEvents()));
  assert.equal(api.received.length, 10);
  assert.equal(new Set(api.received.map(({ payload }) => payload["jti"])).size, 10);
});

/** Runs an issuer that is killed with SIGKILL when a database trigger fires. */
async function killAt(file: string, endpoint: string, trigger: string, act: string): Promise<void> {
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
  ["before the change, no event is sent", "BEFORE UPDATE OF banned ON user", []],
  ["after the change, the event is sent", "BEFORE UPDATE OF toe ON securityEvent", ["account-disabled"]],
  ["while it claims the event, the event is sent", "BEFORE UPDATE OF attempts ON securityEvent", ["account-disabled"]],
  ["when the API has accepted the event, it is sent again with the same jti", "BEFORE DELETE ON securityEvent", ["account-disabled", "account-disabled"]],
] as const) {
  test(`when a server is killed ${what}`, async (t) => {
    const api = await receiver(t);
    const directory = mkdtempSync(join(tmpdir(), "events-"));
    t.after(() => rmSync(directory, { recursive: true }));
    const file = join(directory, "db.sqlite");
    const first = await issuer(t, api, { file, timer: false });
    const { id } = await first.join("ada");
    first.database.close();
    await killAt(file, api.endpoint, trigger, `await internalAdapter.updateUser("${id}", { banned: true })`);
    const { auth, database, rows } = await issuer(t, api, { file, timer: false });
    assert.equal(rows().length, 1);
    database.exec("UPDATE securityEvent SET dueAt = '2020-01-01T00:00:00.000Z'"); // ten seconds later
    assert.deepEqual(await auth.api.deliverSecurityEvents(), { waiting: 0 });
    assert.deepEqual(api.types(), events);
    assert.ok(new Set(api.received.map(({ payload }) => payload["jti"])).size <= 1);
  });
}

const MARKED = "BEFORE UPDATE OF toe ON securityEvent";
for (const [type, act, trigger, events] of [
  ["account-enabled", 'updateUser("ID", { banned: false })', MARKED, ["account-enabled"]],
  ["token-claims-change", 'updateUser("ID", { role: "admin" })', MARKED, ["token-claims-change"]],
  ["token-claims-change", 'updateUser("ID", { role: "admin" })', "BEFORE UPDATE OF role ON user", []],
  ["session-revoked", 'deleteUserSessions("ID")', MARKED, ["session-revoked"]],
  ["session-revoked", 'deleteUserSessions("ID")', "BEFORE DELETE ON session", []],
] as const) {
  test(`the next server sends ${events.length > 0 ? "the event" : "no event"} after a kill in ${type}, ${trigger}`, async (t) => {
    const api = await receiver(t);
    const directory = mkdtempSync(join(tmpdir(), "events-"));
    t.after(() => rmSync(directory, { recursive: true }));
    const file = join(directory, "db.sqlite");
    const first = await issuer(t, api, { file, timer: false });
    const { id } = await first.join("ada");
    if (type === "account-enabled") first.database.prepare("UPDATE user SET banned = 1 WHERE id = ?").run(id);
    first.database.close();
    await killAt(file, api.endpoint, trigger, `await internalAdapter.${act.replace("ID", id)}`);
    const { auth, database } = await issuer(t, api, { file, timer: false });
    database.exec("UPDATE securityEvent SET dueAt = '2020-01-01T00:00:00.000Z'");
    assert.deepEqual(await auth.api.deliverSecurityEvents(), { waiting: 0 });
    assert.deepEqual(api.types(), events);
  });
}

test("an undelivered event is not replaced by a change that was never made", async (t) => {
  const api = await receiver(t);
  const directory = mkdtempSync(join(tmpdir(), "events-"));
  t.after(() => rmSync(directory, { recursive: true }));
  const file = join(directory, "db.sqlite");
  const first = await issuer(t, api, { file, timer: false });
  const { id } = await first.join("ada");
  api.answer = () => ({ status: 503 });
  await first.auth.api.setRole({ headers: first.boss.headers, body: { userId: id, role: "admin" } });
  first.database.close();
  await killAt(file, api.endpoint, "BEFORE UPDATE OF role ON user", `await internalAdapter.updateUser("${id}", { role: "user" })`);
  api.answer = () => ({ status: 202 });
  api.received.length = 0;
  const { auth, database, rows } = await issuer(t, api, { file, timer: false });
  assert.equal(rows().length, 2);
  database.exec("UPDATE securityEvent SET dueAt = '2020-01-01T00:00:00.000Z'");
  assert.deepEqual(await auth.api.deliverSecurityEvents(), { waiting: 0 });
  assert.deepEqual(api.received.map(({ payload }) => payload["events"]), [{ [`${CAEP}/token-claims-change`]: { claims: { role: "admin" } } }]);
});

test("an outbox error after the change does not undo it, and its event is sent later", async (t) => {
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

test("a change whose outbox row was removed meanwhile is sent", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, database, settled } = await issuer(t, api);
  const ada = await join("ada");
  database.exec("CREATE TEMP TRIGGER given_up BEFORE UPDATE OF banned ON user BEGIN DELETE FROM securityEvent; END");
  await auth.api.banUser({ headers: boss.headers, body: { userId: ada.id } });
  await settled();
  assert.deepEqual(api.types(), ["account-disabled", "session-revoked"]);
});

test("a change that is rolled back sends no event", async (t) => {
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

test("a merge waits for earlier events of both accounts", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, makeDue } = await issuer(t, api, { timer: false });
  const ada = await join("ada");
  const guest = await auth.api.signInAnonymous({ headers: new Headers(), returnHeaders: true });
  api.answer = () => ({ status: 503 });
  await auth.api.setRole({ headers: boss.headers, body: { userId: ada.id, role: "admin" } });
  await auth.api.signInEmail({ body: ada.body, headers: bearer(guest.headers) });
  await makeDue();
  assert.ok(!api.types().includes("account-merged"));
  api.answer = () => ({ status: 202 });
  api.received.length = 0;
  assert.deepEqual(await auth.api.deliverSecurityEvents(), { waiting: 0 });
  const types = api.types().filter((type) => type !== "session-revoked"); // sign-outs do not wait
  assert.deepEqual(types, ["token-claims-change", "account-merged", "account-purged"]);
});

test("invalid configurations are rejected at startup", async (t) => {
  const api = await receiver(t);
  const options = authOptions({ database: new DatabaseSync(":memory:"), baseURL: BASE, secret: SECRET });
  const events = securityEvents({ endpoint: api.endpoint });
  const without = (id: string) => options.plugins.filter((plugin) => plugin.id !== id);
  for (const [plugins, message] of [
    [[...without("jwt"), events], /jwt plugin/],
    [[...without("anonymous"), anonymous(), events], /anonymous\(\{\}\)/],
    [[...options.plugins, securityEvents({ endpoint: "api.example.com" })], /not a URL/],
    [[...without("jwt"), jwt({ jwt: { getSubject: ({ user }) => user.email } }), events], /does not support .* getSubject/],
  ] as const) {
    await assert.rejects(betterAuth({ ...options, plugins: [...plugins] }).$context, message);
  }
});

test("a rejected event is logged without its token", async (t) => {
  const api = await receiver(t);
  const { auth, join, boss, errors } = await issuer(t, api);
  const ada = await join("ada");
  api.answer = () => ({ status: 400, body: '{"err":"invalid_audience","description":"not for me"}' });
  await auth.api.setRole({ headers: boss.headers, body: { userId: ada.id, role: "admin" } });
  await api.until(1);
  while (!errors.some((line) => line.includes("invalid_audience"))) await new Promise(setImmediate);
  assert.ok(!errors.some((line) => line.includes(api.received[0]!.token.split(".")[2]!)));
});
