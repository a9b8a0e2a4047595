/** The reference server's settings, read from the environment and refused with one clear line when wrong. */
import { randomBytes } from "node:crypto";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { isIP } from "node:net";
import { join } from "node:path";
import type { KeyAlgorithm } from "./auth.ts";

const KEY_ALGORITHMS = ["EdDSA", "ES256", "ES512", "PS256", "RS256"] satisfies KeyAlgorithm[];

export class SettingsError extends Error {}

export interface Settings {
  /** The address to listen on: in a container 0.0.0.0, or nothing outside could reach it. */
  host: string;
  /** 0: the system chooses. */
  port: number;
  /** The public address; null is `http://localhost:<port>`. Its port may be 0, for the one that was chosen. */
  url: string | null;
  /** A file, or `:memory:`. */
  database: string;
  secret: string;
  audience: string[];
  keyAlgorithm: KeyAlgorithm;
  /** Seconds; 0 is never. */
  keyRotation: number;
  /** Whoever signs up with one of these addresses becomes an administrator. */
  adminEmails: string[];
  /** Where the API takes security events; null: nobody is told. */
  securityEvents: string | null;
  /** Their `aud`; null is the address. */
  securityEventsAudience: string | null;
  serialIds: boolean;
  /** The OAuth server alone: sessions for API keys, and the tokens of the reference configuration. */
  apiKeys: boolean;
  cookieCache: boolean;
  rateLimit: boolean;
}

type Environment = Readonly<Record<string, string | undefined>>;

/** Reads `ISSUER_*`. Makes the data directory and, once, the secret in it, unless the database lives in memory. */
export function readSettings(env: Environment): Settings {
  const directory = env["ISSUER_DATA_DIR"] || ".data";
  const database = env["ISSUER_DATABASE"] || join(directory, "better-auth.sqlite");
  return {
    host: ip(env, "ISSUER_HOST", "127.0.0.1"),
    port: whole(env, "ISSUER_PORT", 3000, 65_535),
    url: address(env, "ISSUER_URL"),
    audience: list(env, "ISSUER_AUDIENCE"),
    keyAlgorithm: algorithm(env),
    keyRotation: whole(env, "ISSUER_KEY_ROTATION", 30 * 24 * 60 * 60),
    adminEmails: list(env, "ISSUER_ADMIN_EMAILS").map((email) => email.toLowerCase()),
    securityEvents: address(env, "ISSUER_SECURITY_EVENTS"),
    securityEventsAudience: env["ISSUER_SECURITY_EVENTS_AUDIENCE"] || null,
    serialIds: onOff(env, "ISSUER_SERIAL_IDS"),
    apiKeys: onOff(env, "ISSUER_API_KEYS"),
    cookieCache: onOff(env, "ISSUER_COOKIE_CACHE"),
    rateLimit: onOff(env, "ISSUER_RATE_LIMIT"),
    database,
    secret: env["ISSUER_SECRET"] || (database === ":memory:" ? newSecret() : keptSecret(directory)),
  };
}

/** The options that both servers take from the settings as they stand; `port` is the one that was opened. */
export function serverOptions(settings: Settings, port: number) {
  return {
    secret: settings.secret,
    trustedOrigins: [`http://localhost:${port}`, `http://127.0.0.1:${port}`],
    rateLimit: { enabled: settings.rateLimit },
    session: { cookieCache: { enabled: settings.cookieCache, maxAge: 5 * 60 } },
    advanced: { database: settings.serialIds ? { generateId: "serial" as const } : {} },
    databaseHooks: {
      user: {
        create: {
          // The first administrator of a real app is set in its database; here a test needs one over HTTP.
          before: async <User extends { email: string }>(user: User) =>
            settings.adminEmails.includes(user.email.toLowerCase()) ? { data: { ...user, role: "admin" } } : undefined,
        },
      },
    },
  };
}

function whole(env: Environment, name: string, otherwise: number, most = Number.MAX_SAFE_INTEGER): number {
  const text = env[name];
  if (!text) return otherwise;
  const value = /^\d+$/.test(text) ? Number(text) : NaN;
  if (!(value <= most)) throw new SettingsError(`${name} must be a whole number from 0 to ${most}, not "${text}"`);
  return value;
}

function ip(env: Environment, name: string, otherwise: string): string {
  const text = env[name] || otherwise;
  if (!isIP(text)) throw new SettingsError(`${name} must be an IP address, not "${text}"`);
  return text;
}

function onOff(env: Environment, name: string): boolean {
  const text = env[name] || "off";
  if (text !== "on" && text !== "off") throw new SettingsError(`${name} must be "on" or "off", not "${text}"`);
  return text === "on";
}

function list(env: Environment, name: string): string[] {
  return (env[name] ?? "").split(",").map((item) => item.trim()).filter(Boolean);
}

function address(env: Environment, name: string): string | null {
  const text = env[name];
  if (!text) return null;
  if (!URL.canParse(text) || !/^https?:$/.test(new URL(text).protocol)) {
    throw new SettingsError(`${name} must be an http or https address, not "${text}"`);
  }
  return text.replace(/\/+$/, "");
}

function algorithm(env: Environment): KeyAlgorithm {
  const text = env["ISSUER_KEY_ALGORITHM"] || "EdDSA";
  const known = KEY_ALGORITHMS.find((name) => name === text);
  if (!known) throw new SettingsError(`ISSUER_KEY_ALGORITHM must be one of ${KEY_ALGORITHMS.join(", ")}, not "${text}"`);
  return known;
}

const newSecret = (): string => randomBytes(32).toString("base64url");

// Never in the repository and never the same on two machines: it decrypts the private keys beside it.
function keptSecret(directory: string): string {
  mkdirSync(directory, { recursive: true });
  const file = join(directory, "better-auth.secret");
  try {
    writeFileSync(file, newSecret(), { flag: "wx", mode: 0o600 });
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
  }
  const secret = readFileSync(file, "utf8").trim();
  if (secret.length < 32) throw new SettingsError(`${file} holds no secret of 32 characters: remove it to get a new one`);
  return secret;
}
