/** The reference server's settings, read from environment variables. */
import { randomBytes } from "node:crypto";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { isIP } from "node:net";
import { join } from "node:path";
import type { KeyAlgorithm } from "./auth.ts";

const KEY_ALGORITHMS = ["EdDSA", "ES256", "ES512", "PS256", "RS256"] satisfies KeyAlgorithm[];

/** A setting is invalid. The message names the variable. */
export class SettingsError extends Error {}

export interface Settings {
  /** IP address to listen on. Use 0.0.0.0 in a container. */
  host: string;
  /** Port to listen on; 0 lets the system choose one. */
  port: number;
  /** Public URL; null means `http://localhost:<port>`. Port 0 is replaced by the chosen port. */
  url: string | null;
  /** Path of a SQLite file, or `:memory:`. */
  database: string;
  secret: string;
  audience: string[];
  keyAlgorithm: KeyAlgorithm;
  /** Seconds between rotations of the signing key; 0 disables rotation. */
  keyRotation: number;
  /** Accounts created with these email addresses become administrators. */
  adminEmails: string[];
  /** URL of the API's endpoint for security events; null sends none. */
  securityEvents: string | null;
  /** `aud` of security events; null means the URL of the endpoint. */
  securityEventsAudience: string | null;
  serialIds: boolean;
  /** OAuth server only: enables API keys with sessions, and the tokens of the reference configuration. */
  apiKeys: boolean;
  cookieCache: boolean;
  rateLimit: boolean;
}

type Environment = Readonly<Record<string, string | undefined>>;

/**
 * Reads the `ISSUER_*` variables. Unless the database is in memory, creates the data directory and a secret in it.
 *
 * Throws SettingsError.
 */
export function readSettings(env: Environment): Settings {
  const directory = env["ISSUER_DATA_DIR"] || ".data";
  const database = env["ISSUER_DATABASE"] || join(directory, "better-auth.sqlite");
  return {
    host: ip(env, "ISSUER_HOST", "127.0.0.1"),
    port: wholeNumber(env, "ISSUER_PORT", 3000, 65_535),
    url: address(env, "ISSUER_URL"),
    audience: list(env, "ISSUER_AUDIENCE"),
    keyAlgorithm: algorithm(env),
    keyRotation: wholeNumber(env, "ISSUER_KEY_ROTATION", 30 * 24 * 60 * 60),
    adminEmails: list(env, "ISSUER_ADMIN_EMAILS").map((email) => email.toLowerCase()),
    securityEvents: address(env, "ISSUER_SECURITY_EVENTS"),
    securityEventsAudience: env["ISSUER_SECURITY_EVENTS_AUDIENCE"] || null,
    serialIds: onOff(env, "ISSUER_SERIAL_IDS"),
    apiKeys: onOff(env, "ISSUER_API_KEYS"),
    cookieCache: onOff(env, "ISSUER_COOKIE_CACHE"),
    rateLimit: onOff(env, "ISSUER_RATE_LIMIT"),
    database,
    secret: env["ISSUER_SECRET"] || (database === ":memory:" ? newSecret() : storedSecret(directory)),
  };
}

/** Better Auth options of both servers. port: the port that the server listens on. */
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
          // In production, set the first administrator in the database. Tests need one over HTTP.
          before: async <User extends { email: string }>(user: User) =>
            settings.adminEmails.includes(user.email.toLowerCase()) ? { data: { ...user, role: "admin" } } : undefined,
        },
      },
    },
  };
}

function wholeNumber(env: Environment, name: string, fallback: number, max = Number.MAX_SAFE_INTEGER): number {
  const text = env[name];
  if (!text) return fallback;
  const value = /^\d+$/.test(text) ? Number(text) : NaN;
  if (!(value <= max)) throw new SettingsError(`${name} must be a whole number from 0 to ${max}, not "${text}"`);
  return value;
}

function ip(env: Environment, name: string, fallback: string): string {
  const text = env[name] || fallback;
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

// Generated per machine, because it decrypts the private keys in the database next to it.
function storedSecret(directory: string): string {
  mkdirSync(directory, { recursive: true });
  const file = join(directory, "better-auth.secret");
  try {
    writeFileSync(file, newSecret(), { flag: "wx", mode: 0o600 });
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
  }
  const secret = readFileSync(file, "utf8").trim();
  if (secret.length < 32) throw new SettingsError(`${file} does not contain a secret of at least 32 characters: delete it to create a new one`);
  return secret;
}
