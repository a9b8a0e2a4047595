/** The Better Auth configuration that the API relies on: who signs in, and what a JWT says about them. */
import type { BetterAuthOptions, BetterAuthPlugin } from "better-auth";
import { betterAuth } from "better-auth";
import { createAuthMiddleware } from "better-auth/api";
import type { JwtOptions } from "better-auth/plugins";
import { admin, anonymous, bearer, createJwk, jwt } from "better-auth/plugins";

/** The JWS algorithms (RFC 7518, RFC 8037) that Better Auth signs with; the API accepts them all. */
export type KeyAlgorithm = "EdDSA" | "ES256" | "ES512" | "PS256" | "RS256";

const DAY = 24 * 60 * 60;

export interface TokenSettings {
  /** `aud` of the JWTs; the origin of Better Auth's `baseURL` unless given. */
  audience?: string | string[];
  /** What new keys sign with. Keys already in the database keep theirs until they expire. */
  keyAlgorithm?: KeyAlgorithm;
  /** Seconds a key signs for before the next one takes over; 0 keeps one key for ever. */
  keyRotation?: number;
}

export interface AuthSettings extends TokenSettings {
  /** A Pool, a DatabaseSync, an adapter: whatever Better Auth takes. */
  database: NonNullable<BetterAuthOptions["database"]>;
  /** The public address of the app. Its origin becomes `iss`; a path of its own replaces `/api/auth`. */
  baseURL: string;
  /** Encrypts the private keys and signs the cookies: at least 32 random characters, and never changed lightly. */
  secret: string;
  /** Other origins that may send cookies here, beside that of `baseURL`. */
  trustedOrigins?: string[];
}

/** What the API reads of a person, and no more: a picture as a data URL would make a token of 27 kB. */
export interface Claims {
  id: string;
  email: string;
  emailVerified: boolean;
  name: string;
  /** The admin plugin's roles, comma-separated. */
  role: string | null;
  banned: boolean;
  /** ISO 8601, or null for a ban without an end. */
  banExpires: string | null;
  isAnonymous: boolean;
  /** The session that the token was made from. */
  sid: string;
  /** The administrator who acts as this person. */
  impersonatedBy: string | null;
  /** ISO 8601 with milliseconds: orders the claims of two tokens whose `iat` is the same second. */
  updatedAt: string;
}

type Signed = Parameters<NonNullable<NonNullable<JwtOptions["jwt"]>["definePayload"]>>[0];

/** The payload of a JWT; Better Auth adds `sub`, `iss`, `aud`, `iat` and `exp`. */
export function claims({ user, session }: Signed): Claims {
  return {
    id: user.id,
    email: user.email,
    emailVerified: user.emailVerified,
    name: user.name,
    role: user["role"] ?? null,
    banned: user["banned"] ?? false,
    banExpires: user["banExpires"] ? instant(user["banExpires"]) : null,
    isAnonymous: user["isAnonymous"] ?? false,
    sid: session.id,
    impersonatedBy: session["impersonatedBy"] ?? null,
    updatedAt: instant(user.updatedAt),
  };
}

// A session read from the cookie cache may hold its dates as text.
const instant = (date: Date | string): string => new Date(date).toISOString();

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

/** The plugins that make tokens for the API, for an app with a Better Auth of its own: `plugins: [...apiTokens()]`. */
export function apiTokens({ audience, keyAlgorithm = "EdDSA", keyRotation = 30 * DAY }: TokenSettings = {}) {
  const options = {
    jwks: {
      keyPairConfig: { alg: keyAlgorithm },
      // An old key must outlive the tokens it signed, which is minutes. The default, 30 days, is as long as a stolen
      // key would stay good.
      gracePeriod: DAY,
      ...(keyRotation > 0 && { rotationInterval: keyRotation }),
    },
    jwt: { expirationTime: "15m", definePayload: claims, ...(audience !== undefined && { audience }) },
    // A JWT is made for whoever asks for one at /token, not signed anew into every answer of /get-session.
    disableSettingJwtHeader: true,
  } satisfies JwtOptions;
  return [jwt(options), neverWithoutKeys(options)] as const;
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
