/** JWTs from Better Auth, cached in memory and renewed before they expire. */
import { AnotherPerson, IssuerError, SignedOut } from "./errors.ts";
import { buffered, RETRY_DEFAULTS, within, withRetries } from "./retry.ts";

/** The tokens of one user. Clients of the same user may share a source; each user needs their own. */
export interface TokenSource {
  /**
   * Returns a valid JWT. Never returns `refused`, a token that the API has just rejected.
   *
   * Throws SignedOut, AnotherPerson, IssuerError, TimedOut, or errors of `fetch`.
   */
  token(options?: { refused?: string; signal?: AbortSignal }): Promise<string>;
  /** Discards the token, for example at sign-out. The source stays bound to the same user. */
  clear(): void;
}

type Fetch = (input: string, init?: RequestInit) => Promise<Response>;

interface PersonOptions {
  /** The `sub` that every token must have. Defaults to the `sub` of the first token. */
  subject?: string | undefined;
}

interface SessionOptions extends PersonOptions {
  /** Better Auth's base URL, such as `https://app.example.com/api/auth`. */
  authUrl: string;
  fetch?: Fetch;
}

/** Seconds before expiry at which a token is renewed; half the lifetime for tokens of less than two minutes. */
const RENEWAL_MARGIN = 60;

interface Cached {
  jwt: string;
  /** Lifetime in seconds, `exp - iat`; 0 if unknown, and then the token is not cached. */
  life: number;
  /** Time of the request for the token, on both clocks, in milliseconds. */
  since: Moment;
}

type Moment = readonly [monotonic: number, wall: number];

// The wall clock can be adjusted, and the monotonic clock may stop while the device sleeps. A token's age is therefore
// the larger of the two.
const now = (): Moment => [performance.now(), Date.now()];
const age = ([monotonic, wall]: Moment): number => Math.max(performance.now() - monotonic, Math.abs(Date.now() - wall)) / 1000;

/**
 * Creates a function that returns a token of one user, and throws AnotherPerson for any other token.
 *
 * A user is identified by issuer and subject (RFC 7519, sections 4.1.1 and 4.1.2). Without `subject`, the first token
 * with a subject determines the user; after it, tokens without a subject are rejected.
 */
export function onePerson(subject?: string): (jwt: string) => string {
  let first: Claims | null = null;
  let accepted: string | null = null;
  return (jwt) => {
    if (jwt === accepted) return jwt;
    const claims = claimsOf(jwt);
    const sub = first ? first.sub : subject;
    if (sub !== undefined && claims.sub !== sub) throw new AnotherPerson();
    if (first && claims.iss !== first.iss) throw new AnotherPerson();
    if (claims.sub !== undefined) first ??= claims;
    return (accepted = jwt);
  };
}

/** A source that caches the tokens returned by `fetchToken`. Throws AnotherPerson if one belongs to a different user. */
export function tokenSource(fetchToken: () => Promise<string>, { subject }: PersonOptions = {}): TokenSource {
  const checkSubject = onePerson(subject);
  let cached: Cached | null = null;
  let pending: Promise<Cached> | null = null;

  const renew = (): Promise<Cached> => {
    if (pending) return pending;
    const since = now();
    const request = fetchToken()
      .then((jwt) => {
        const fresh = { jwt: checkSubject(jwt), life: claimsOf(jwt).life, since };
        // `clear` may have been called meanwhile.
        if (pending === request) cached = fresh;
        return fresh;
      })
      .finally(() => {
        if (pending === request) pending = null;
      });
    pending = request;
    return request;
  };

  return {
    async token({ refused, signal } = {}) {
      const left = cached && cached.jwt !== refused ? cached.life - age(cached.since) : 0;
      if (cached && left > Math.min(RENEWAL_MARGIN, cached.life / 2)) return cached.jwt;
      const fallback = left > 0 ? cached : null;
      try {
        return (await within(renew, 2 * RETRY_DEFAULTS.timeout, signal)).jwt;
      } catch (error) {
        // If renewal fails, use the old token until it expires, unless the session has ended.
        const ended = error instanceof SignedOut || error instanceof AnotherPerson;
        if (fallback && fallback === cached && !ended && !signal?.aborted) return fallback.jwt;
        if (ended) cached = null;
        throw error;
      }
    },
    clear() {
      cached = pending = null;
    },
  };
}

/**
 * Gets tokens with the session cookie: of the browser, or given as `cookie`, the Cookie header of a request to a server.
 *
 * On a server, create a source for each request, because it is bound to the user of that cookie.
 */
export function cookieSession({ authUrl, cookie, subject, fetch }: SessionOptions & { cookie?: string }): TokenSource {
  const headers: Record<string, string> = cookie === undefined ? {} : { Cookie: cookie };
  return tokenSource(() => exchange({ authUrl, fetch }, { headers, credentials: "include" }), { subject });
}

/** Gets tokens with a session token, for clients without cookies. `sessionToken` is called for each new token. */
export function bearerSession({
  authUrl,
  sessionToken,
  subject,
  fetch,
}: SessionOptions & { sessionToken: () => string | null | Promise<string | null> }): TokenSource {
  const fetchToken = async () => {
    const bearer = await sessionToken();
    if (!bearer) throw new SignedOut();
    return exchange({ authUrl, fetch }, { headers: { Authorization: `Bearer ${bearer}` }, credentials: "omit" });
  };
  return tokenSource(fetchToken, { subject });
}

async function exchange(
  { authUrl, fetch = globalThis.fetch }: { authUrl: string; fetch: Fetch | undefined },
  { headers, credentials }: { headers: Record<string, string>; credentials: RequestCredentials },
): Promise<string> {
  const init: RequestInit = { headers: { Accept: "application/json", ...headers }, credentials, cache: "no-store" };
  const response = await withRetries(
    async (signal) => buffered(await fetch(`${authUrl.replace(/\/+$/, "")}/token`, { ...init, signal })),
    { repeatable: true, signal: undefined, limits: RETRY_DEFAULTS },
  );
  if (response.status === 401) throw new SignedOut();
  const { token } = response.ok ? ((await response.json().catch(() => ({}))) as { token?: unknown }) : {};
  if (typeof token !== "string") throw new IssuerError(response);
  return token;
}

interface Claims {
  /** Undefined if the token cannot be parsed or has no subject. */
  sub: string | undefined;
  iss: unknown;
  /** `exp - iat` in seconds: does not depend on the device's clock. */
  life: number;
}

/** Parses the claims of a JWT without verifying the signature, which the API does. */
function claimsOf(jwt: string): Claims {
  try {
    const bytes = atob(jwt.split(".")[1]!.replace(/-/g, "+").replace(/_/g, "/"));
    // React Native has no TextDecoder, so UTF-8 is decoded as percent-encoding.
    const text = decodeURIComponent(bytes.replace(/[%\x80-\xff]/g, (byte) => `%${byte.charCodeAt(0).toString(16)}`));
    const { sub, iss, exp, iat } = JSON.parse(text) as Record<string, unknown>;
    return {
      sub: typeof sub === "string" && sub !== "" ? sub : undefined,
      iss,
      life: typeof exp === "number" && typeof iat === "number" ? exp - iat : 0,
    };
  } catch {
    return { sub: undefined, iss: undefined, life: 0 };
  }
}
