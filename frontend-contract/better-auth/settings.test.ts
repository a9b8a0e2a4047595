import assert from "node:assert/strict";
import { existsSync, mkdtempSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { readSettings, SettingsError } from "./settings.ts";

const memory = { ISSUER_DATABASE: ":memory:" };

test("missing and empty variables have defaults", () => {
  const empty = { ISSUER_PORT: "", ISSUER_URL: "", ISSUER_KEY_ALGORITHM: "", ISSUER_KEY_ROTATION: "", ISSUER_RATE_LIMIT: "" };
  for (const environment of [memory, { ...memory, ...empty }]) {
    const { secret, ...settings } = readSettings(environment);
    assert.ok(secret.length >= 32);
    assert.deepEqual(settings, {
      host: "127.0.0.1",
      port: 3000,
      url: null,
      database: ":memory:",
      audience: [],
      keyAlgorithm: "EdDSA",
      keyRotation: 2_592_000,
      adminEmails: [],
      securityEvents: null,
      securityEventsAudience: null,
      serialIds: false,
      apiKeys: false,
      cookieCache: false,
      rateLimit: false,
    });
  }
});

test("settings are read from the environment", () => {
  const settings = readSettings({
    ...memory,
    ISSUER_HOST: "0.0.0.0",
    ISSUER_PORT: "0",
    ISSUER_URL: "https://example.com/auth/",
    ISSUER_AUDIENCE: "a, b,",
    ISSUER_ADMIN_EMAILS: "Boss@Example.com",
    ISSUER_KEY_ROTATION: "0",
    ISSUER_SERIAL_IDS: "on",
    ISSUER_SECURITY_EVENTS: "http://127.0.0.1:8000/api/v1/security-events",
    ISSUER_SECURITY_EVENTS_AUDIENCE: "https://api.example.com/api/v1/security-events",
  });
  assert.equal(settings.host, "0.0.0.0");
  assert.equal(settings.port, 0);
  assert.equal(settings.url, "https://example.com/auth");
  assert.deepEqual(settings.audience, ["a", "b"]);
  assert.deepEqual(settings.adminEmails, ["boss@example.com"]);
  assert.equal(settings.keyRotation, 0);
  assert.equal(settings.serialIds, true);
  assert.equal(settings.securityEvents, "http://127.0.0.1:8000/api/v1/security-events");
  assert.equal(settings.securityEventsAudience, "https://api.example.com/api/v1/security-events");
});

for (const [name, value] of [
  ["ISSUER_HOST", "localhost"],
  ["ISSUER_PORT", "65536"],
  ["ISSUER_PORT", "-1"],
  ["ISSUER_PORT", "http"],
  ["ISSUER_URL", "localhost:3000"],
  ["ISSUER_URL", "ftp://localhost"],
  ["ISSUER_SECURITY_EVENTS", "127.0.0.1:8000"],
  ["ISSUER_KEY_ALGORITHM", "HS256"],
  ["ISSUER_KEY_ROTATION", "1.5"],
  ["ISSUER_COOKIE_CACHE", "true"],
] as const) {
  test(`${name}=${value} is rejected with the variable's name`, () => {
    assert.throws(() => readSettings({ ...memory, [name]: value }), (error) => {
      return error instanceof SettingsError && error.message.includes(name) && error.message.includes(`"${value}"`);
    });
  });
}

test("the secret is generated once and readable by its owner only", (t) => {
  const directory = mkdtempSync(join(tmpdir(), "issuer-"));
  t.after(() => rmSync(directory, { recursive: true }));
  const environment = { ISSUER_DATA_DIR: join(directory, "new", "data") };
  const { secret } = readSettings(environment);
  assert.equal(readSettings(environment).secret, secret);
  const file = join(environment.ISSUER_DATA_DIR, "better-auth.secret");
  assert.equal(statSync(file).mode & 0o777, 0o600);
});

test("an in-memory database creates no files", () => {
  const directory = join(tmpdir(), `issuer-${process.pid}-untouched`);
  const environment = { ...memory, ISSUER_DATA_DIR: directory };
  assert.notEqual(readSettings(environment).secret, readSettings(environment).secret);
  assert.equal(existsSync(directory), false);
});
