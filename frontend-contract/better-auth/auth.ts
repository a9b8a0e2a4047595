/** The Better Auth configuration that the API relies on: who signs in, and what a JWT says about them. */
import type { AuthContext, BetterAuthOptions, BetterAuthPlugin } from "better-auth";
import { BetterAuthError, betterAuth } from "better-auth";
import { APIError, createAuthMiddleware } from "better-auth/api";
import type { JwtOptions } from "better-auth/plugins";
import { admin, anonymous, bearer, createJwk, jwt } from "better-auth/plugins";

/** The JWS algorithms (RFC 7518, RFC 8037) that Better Auth signs with; the API accepts them all. */
export type KeyAlgorithm = "EdDSA" | "ES256" | "ES512" | "PS256" | "RS256";

/** Seconds. */
const DAY = 24 * 60 * 60;
const TOKEN_LIFE = 15 * 60;

export interface TokenSettings {
  /** `aud` of the JWTs; the origin of Better Auth's `baseURL` unless given. */
  audience?: string | string[];
  /** What new keys sign with. Keys already in the database keep theirs until they expire. */
  keyAlgorithm?: KeyAlgorithm;
  /** Seconds a key signs for before the next one takes over; 0 keeps one key for ever. */
  keyRotation?: number;
}

export interface AuthSettings extends TokenSettings {
  /** A Pool, a DatabaseSync, an adapter, or another database that Better Auth accepts. */
  database: NonNullable<BetterAuthOptions["database"]>;
  /** The public address of the app. Its origin becomes `iss`; a path of its own replaces `/api/auth`. */
  baseURL: string;
  /** Encrypts the private keys and signs the cookies: at least 32 random characters, and never changed lightly. */
  secret: string;
  /** Other origins that may send cookies here, beside that of `baseURL`. */
  trustedOrigins?: string[];
}

/** What the API reads of a person, and no more: a picture as a data URL would make a token of 27 kB. */
interface Person {
  id: string;
  email: string;
  emailVerified: boolean;
  name: string;
  banned: boolean;
  /** ISO 8601, or null for a ban without an end. */
  banExpires: string | null;
  isAnonymous: boolean;
  /** ISO 8601: when the user was last changed. */
  updatedAt: string;
  /** Milliseconds since 1970, before the storage was read: orders the claims of tokens. */
  minted_at: number;
}

/** The payload of a token made from a session. */
export interface Claims extends Person {
  /** The admin plugin's roles, comma-separated. */
  role: string | null;
  /** The session that the token was made from. */
  sid: string;
  /** The administrator who acts as this person. */
  impersonatedBy: string | null;
}

/** The payload of a token made from an API key. The API lets it do what `scope` names, and nothing else. */
export interface KeyClaims extends Person {
  /** The id of the API key. */
  key: string;
  /** The key's permissions as OAuth scopes, space-separated: `tasks:read tasks:write`. */
  scope: string;
  /** Seconds since 1970; set where the key ends before the token would. */
  exp?: number;
}

type Signed = Parameters<NonNullable<NonNullable<JwtOptions["jwt"]>["definePayload"]>>[0];

/** A row of the api-key plugin. */
interface ApiKey {
  id: string;
  referenceId: string;
  enabled: boolean | null;
  expiresAt: Date | null;
  /** JSON: resources, and the actions allowed on each. */
  permissions: string | null;
}

/**
 * The payload of a token for a session; Better Auth adds `sub`, `iss`, `aud`, `iat` and `exp`.
 *
 * The session may come from a cookie that is minutes old (`session.cookieCache`), and with secondary storage the user may
 * be an old copy. Therefore both are read again. Throws UNAUTHORIZED where the session has ended or the user is banned.
 */
async function claims(context: AuthContext, { user: { id }, session: { id: sessionId, token } }: Signed) {
  const now = new Date();
  const [user, found] = await Promise.all([
    context.internalAdapter.findUserById(id) as Promise<Signed["user"] | null>,
    context.internalAdapter.findSession(token),
  ]);
  if (!user || isBanned(user, now)) throw unauthorized();
  const person: Person = {
    id: user.id,
    email: user.email,
    emailVerified: user.emailVerified,
    name: user.name,
    banned: user["banned"] ?? false,
    banExpires: user["banExpires"] ? instant(user["banExpires"]) : null,
    isAnonymous: user["isAnonymous"] ?? false,
    updatedAt: instant(user.updatedAt),
    minted_at: now.getTime(),
  };
  if (!found) return { ...person, ...(await keyClaims(context, { sessionId, token, userId: user.id, now })) } satisfies KeyClaims;
  const session: Signed["session"] = found.session;
  if (session.userId !== user.id || session.expiresAt <= now) throw unauthorized();
  const impersonatedBy = session["impersonatedBy"] ?? null;
  return { ...person, role: user["role"] ?? null, sid: session.id, impersonatedBy } satisfies Claims;
}

const unauthorized = () => new APIError("UNAUTHORIZED", { code: "UNAUTHORIZED", message: "Unauthorized" });

/** A ban that has run out stays in the row until the next sign-in. */
function isBanned({ banned, banExpires }: Signed["user"], now: Date): boolean {
  return Boolean(banned) && !(banExpires && new Date(banExpires) <= now);
}

// Some adapters give dates as text.
const instant = (date: Date | string): string => new Date(date).toISOString();

/**
 * What distinguishes the token of an API key (`enableSessionForAPIKeys`), whose session is in no storage: its token is
 * the key itself, its id the key's. Throws UNAUTHORIZED where there is no such key, or it is disabled or has expired.
 */
async function keyClaims(
  { adapter, hasPlugin }: AuthContext,
  { sessionId, token, userId, now }: { sessionId: string; token: string; userId: string; now: Date },
) {
  if (!hasPlugin("api-key")) throw unauthorized();
  // Found by the key and not by the id alone: with serial ids, an ended session can have the id of a key.
  const stored = { field: "key", operator: "in" as const, value: [await hashed(token), token] };
  const key = await adapter.findOne<ApiKey>({ model: "apikey", where: [stored] });
  if (!key?.enabled || key.id !== sessionId || key.referenceId !== userId) throw unauthorized();
  if (key.expiresAt && key.expiresAt <= now) throw unauthorized();
  const end = key.expiresAt && Math.floor(Math.min(key.expiresAt.getTime() / 1000, now.getTime() / 1000 + TOKEN_LIFE));
  return { key: key.id, scope: scopes(key.permissions).join(" "), ...(end && { exp: end }) };
}

/** As the api-key plugin stores a key, unless `disableKeyHashing` is set. */
async function hashed(key: string): Promise<string> {
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(key));
  return btoa(String.fromCharCode(...new Uint8Array(digest))).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/** `{"tasks": ["read"]}` is `tasks:read`. A name that cannot be part of a scope (RFC 6749, 3.3) is left out. */
function scopes(permissions: string | null): string[] {
  const read: Record<string, string[]> | null = JSON.parse(permissions || "null");
  const all = Object.entries(read ?? {}).flatMap(([resource, actions]) => actions.map((action) => `${resource}:${action}`));
  return all.filter((scope) => /^[\x21\x23-\x5b\x5d-\x7e]+$/.test(scope));
}

/**
 * Better Auth makes a key when it next signs, never before. A server where nobody signs in until its last key has left
 * the set would publish an empty one, which every verifier must take for a fault. So whoever asks for the keys finds one.
 */
function neverWithoutKeys(options: JwtOptions): BetterAuthPlugin {
  return {
    id: "never-without-keys",
    hooks: {
      before: [
        {
          matcher: ({ path }) => path === "/jwks",
          handler: createAuthMiddleware(async (ctx) => {
            const keys = await ctx.context.adapter.findMany<{ expiresAt?: Date | null }>({ model: "jwks" });
            if (!keys.some(({ expiresAt }) => !expiresAt || expiresAt.getTime() > Date.now())) {
              await createJwk(ctx, options);
            }
          }),
        },
      ],
    },
  };
}

/**
 * The plugins that make tokens for the API, for an app with a Better Auth of its own: `plugins: [...apiTokens()]`.
 *
 * Call it once for each instance of Better Auth: the plugins read the storage of the one that they are given to.
 */
export function apiTokens({ audience, keyAlgorithm = "EdDSA", keyRotation = 30 * DAY }: TokenSettings = {}) {
  let context: AuthContext | undefined;
  const storage = {
    id: "tokens-from-storage",
    init(initial) {
      context = initial;
    },
  } satisfies BetterAuthPlugin;
  const options = {
    jwks: {
      keyPairConfig: { alg: keyAlgorithm },
      // An old key must outlive the tokens it signed, which is minutes. The default, 30 days, is as long as a stolen
      // key would stay good.
      gracePeriod: DAY,
      ...(keyRotation > 0 && { rotationInterval: keyRotation }),
    },
    jwt: {
      expirationTime: `${TOKEN_LIFE}s`,
      definePayload(signed) {
        if (!context) throw new BetterAuthError("jwt() of apiTokens() needs the others: `plugins: [...apiTokens()]`");
        return claims(context, signed);
      },
      ...(audience !== undefined && { audience }),
    },
    // A JWT is made for whoever asks for one at /token, not signed anew into every answer of /get-session.
    disableSettingJwtHeader: true,
  } satisfies JwtOptions;
  return [jwt(options), storage, neverWithoutKeys(options)] as const;
}

/** The options for `betterAuth`, for an app that adds to them: spread them, and append to `plugins`. */
export function authOptions({ baseURL, secret, database, trustedOrigins = [], ...tokens }: AuthSettings) {
  return {
    baseURL,
    secret,
    database,
    trustedOrigins,
    emailAndPassword: { enabled: true },
    telemetry: { enabled: false },
    plugins: [
      ...apiTokens(tokens),
      // Without the signature, the session ids in a leaked database would be good credentials.
      bearer({ requireSignature: true }),
      admin(),
      // The domain is reserved (RFC 2606): no mail to an anonymous person can reach a stranger.
      anonymous({ emailDomainName: "anonymous.invalid" }),
    ],
  } satisfies BetterAuthOptions;
}

/** A Better Auth instance, as a Next.js route handler takes it: `toNextJsHandler(createAuth({...}))`. */
export const createAuth = (settings: AuthSettings) => betterAuth(authOptions(settings));
