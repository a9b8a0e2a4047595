/** The Better Auth configuration for the API: sign-in methods and the claims of JWTs. */
import type { AuthContext, BetterAuthOptions, BetterAuthPlugin } from "better-auth";
import { BetterAuthError, betterAuth } from "better-auth";
import { APIError, createAuthMiddleware } from "better-auth/api";
import type { JwtOptions } from "better-auth/plugins";
import { admin, anonymous, bearer, createJwk, jwt } from "better-auth/plugins";

/** The JWS algorithms (RFC 7518, RFC 8037) of Better Auth. The API accepts all of them. */
export type KeyAlgorithm = "EdDSA" | "ES256" | "ES512" | "PS256" | "RS256";

/** Seconds. */
const DAY = 24 * 60 * 60;
const TOKEN_LIFETIME = 15 * 60;

export interface TokenSettings {
  /** `aud` of the JWTs. Defaults to the origin of Better Auth's `baseURL`. */
  audience?: string | string[];
  /** Algorithm of new keys. Existing keys keep theirs until they expire. */
  keyAlgorithm?: KeyAlgorithm;
  /** Seconds after which a new signing key replaces the current one; 0 disables rotation. */
  keyRotation?: number;
}

export interface AuthSettings extends TokenSettings {
  /** Any database that Better Auth accepts, such as a `Pool`, a `DatabaseSync` or an adapter. */
  database: NonNullable<BetterAuthOptions["database"]>;
  /** Public URL of the app. Its origin is the `iss` of JWTs. If it has a path, that path replaces `/api/auth`. */
  baseURL: string;
  /** At least 32 random characters. Encrypts private keys and signs cookies; a new secret makes existing ones unusable. */
  secret: string;
  /** Origins, besides that of `baseURL`, that may send requests with cookies. */
  trustedOrigins?: string[];
}

/** The user claims that the API reads. Others are left out to keep tokens small: a picture as a data URL may take 27 kB. */
interface Person {
  id: string;
  email: string;
  emailVerified: boolean;
  name: string;
  banned: boolean;
  /** ISO 8601; null for a permanent ban. */
  banExpires: string | null;
  isAnonymous: boolean;
  /** ISO 8601: time of the last change of the user. */
  updatedAt: string;
  /** Milliseconds since 1970, taken before the user was read. The API uses it to order the claims of tokens. */
  minted_at: number;
}

/** The payload of a session's token. */
export interface Claims extends Person {
  /** The admin plugin's roles, comma-separated. */
  role: string | null;
  /** The id of the session. */
  sid: string;
  /** The id of the administrator who impersonates the user, or null. */
  impersonatedBy: string | null;
}

/** The payload of an API key's token. The API permits only the operations in `scope`. */
export interface KeyClaims extends Person {
  /** The id of the API key. */
  key: string;
  /** The key's permissions as OAuth scopes, space-separated: `tasks:read tasks:write`. */
  scope: string;
  /** Seconds since 1970. Set if the key expires before the default expiry of the token. */
  exp?: number;
}

type PayloadInput = Parameters<NonNullable<NonNullable<JwtOptions["jwt"]>["definePayload"]>>[0];

/** A row of the api-key plugin. */
interface ApiKey {
  id: string;
  referenceId: string;
  enabled: boolean | null;
  expiresAt: Date | null;
  /** JSON: the permitted actions by resource. */
  permissions: string | null;
}

/**
 * Returns the payload of a session's token. Better Auth adds `sub`, `iss`, `aud`, `iat` and `exp`.
 *
 * Reads user and session again, because the given ones may be outdated: the session with `session.cookieCache`, the user
 * with secondary storage. Throws UNAUTHORIZED if the session has ended or the user is banned.
 */
async function claims(context: AuthContext, { user: { id }, session: { id: sessionId, token } }: PayloadInput) {
  const now = new Date();
  const [user, found] = await Promise.all([
    context.internalAdapter.findUserById(id) as Promise<PayloadInput["user"] | null>,
    context.internalAdapter.findSession(token),
  ]);
  if (!user || isBanned(user, now)) throw unauthorized();
  const person: Person = {
    id: user.id,
    email: user.email,
    emailVerified: user.emailVerified,
    name: user.name,
    banned: user["banned"] ?? false,
    banExpires: user["banExpires"] ? isoTime(user["banExpires"]) : null,
    isAnonymous: user["isAnonymous"] ?? false,
    updatedAt: isoTime(user.updatedAt),
    minted_at: now.getTime(),
  };
  if (!found) return { ...person, ...(await keyClaims(context, { sessionId, token, userId: user.id, now })) } satisfies KeyClaims;
  const session: PayloadInput["session"] = found.session;
  if (session.userId !== user.id || session.expiresAt <= now) throw unauthorized();
  const impersonatedBy = session["impersonatedBy"] ?? null;
  return { ...person, role: user["role"] ?? null, sid: session.id, impersonatedBy } satisfies Claims;
}

const unauthorized = () => new APIError("UNAUTHORIZED", { code: "UNAUTHORIZED", message: "Unauthorized" });

/** An expired ban stays in the row until the next sign-in. */
function isBanned({ banned, banExpires }: PayloadInput["user"], now: Date): boolean {
  return Boolean(banned) && !(banExpires && new Date(banExpires) <= now);
}

// Some adapters return dates as strings.
const isoTime = (date: Date | string): string => new Date(date).toISOString();

/**
 * Returns the additional claims of an API key's token. With `enableSessionForAPIKeys`, the session is not stored: its
 * token is the key, its id that of the key. Throws UNAUTHORIZED if the key does not exist, is disabled or has expired.
 */
async function keyClaims(
  { adapter, hasPlugin }: AuthContext,
  { sessionId, token, userId, now }: { sessionId: string; token: string; userId: string; now: Date },
) {
  if (!hasPlugin("api-key")) throw unauthorized();
  // Look up by key, not by id: with serial ids, an ended session can have the id of a key.
  const stored = { field: "key", operator: "in" as const, value: [await hash(token), token] };
  const key = await adapter.findOne<ApiKey>({ model: "apikey", where: [stored] });
  if (!key?.enabled || key.id !== sessionId || key.referenceId !== userId) throw unauthorized();
  if (key.expiresAt && key.expiresAt <= now) throw unauthorized();
  const end = key.expiresAt && Math.floor(Math.min(key.expiresAt.getTime() / 1000, now.getTime() / 1000 + TOKEN_LIFETIME));
  return { key: key.id, scope: scopes(key.permissions).join(" "), ...(end && { exp: end }) };
}

/** The hash that the api-key plugin stores, unless `disableKeyHashing` is set. */
async function hash(key: string): Promise<string> {
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(key));
  return btoa(String.fromCharCode(...new Uint8Array(digest))).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/** Converts `{"tasks": ["read"]}` to `tasks:read`. Skips names that are not valid in a scope (RFC 6749, 3.3). */
function scopes(permissions: string | null): string[] {
  const parsed: Record<string, string[]> | null = JSON.parse(permissions || "null");
  const all = Object.entries(parsed ?? {}).flatMap(([resource, actions]) => actions.map((action) => `${resource}:${action}`));
  return all.filter((scope) => /^[\x21\x23-\x5b\x5d-\x7e]+$/.test(scope));
}

/**
 * Creates a key when the key set is requested and has no current key.
 *
 * Better Auth itself creates keys only when it signs. Without sign-ins it would publish an empty key set once the last key
 * has expired, which verifiers treat as an error.
 */
function ensureKey(options: JwtOptions): BetterAuthPlugin {
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
 * The plugins that issue tokens for the API, for an existing Better Auth configuration: `plugins: [...apiTokens()]`.
 *
 * Call it once per Better Auth instance: the plugins read the database of their instance.
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
      // Time for which a rotated key is still published. It must exceed the lifetime of tokens, 15 minutes. With the
      // default of 30 days, a stolen key would be accepted for that long.
      gracePeriod: DAY,
      ...(keyRotation > 0 && { rotationInterval: keyRotation }),
    },
    jwt: {
      expirationTime: `${TOKEN_LIFETIME}s`,
      definePayload(input) {
        if (!context) throw new BetterAuthError("apiTokens() returns several plugins, use all of them: `plugins: [...apiTokens()]`");
        return claims(context, input);
      },
      ...(audience !== undefined && { audience }),
    },
    // Issue JWTs at /token only, instead of signing one for each response of /get-session.
    disableSettingJwtHeader: true,
  } satisfies JwtOptions;
  return [jwt(options), storage, ensureKey(options)] as const;
}

/** Returns options for `betterAuth`. To extend them, spread the object and append to `plugins`. */
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
      // Without a signature, the session tokens in a leaked database could be used to sign in.
      bearer({ requireSignature: true }),
      admin(),
      // A reserved domain (RFC 2606), so that mail to anonymous users cannot be delivered.
      anonymous({ emailDomainName: "anonymous.invalid" }),
    ],
  } satisfies BetterAuthOptions;
}

/** Creates a Better Auth instance, for example for a Next.js route handler: `toNextJsHandler(createAuth({...}))`. */
export const createAuth = (settings: AuthSettings) => betterAuth(authOptions(settings));
