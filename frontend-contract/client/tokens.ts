/** JWTs from Better Auth: one request in flight however many callers wait, renewed in time, kept in memory alone. */
import { AnotherPerson, IssuerError, SignedOut } from "./errors.ts";
import { buffered, PATIENCE, persist, within } from "./retry.ts";

/** The tokens of one person. Several clients of that person may share a source; another person needs a new one. */
export interface TokenSource {
  /**
   * A JWT that is good for a while; never `refused`, which the API has just turned down.
   *
   * Throws SignedOut, AnotherPerson, IssuerError, or what `fetch` throws when nobody answers.
   */
  token(options?: { refused?: string; signal?: AbortSignal }): Promise<string>;
  /** Discards the token, for example at sign-out. The source remains bound to the same person. */
  clear(): void;
}

type Fetch = (input: string, init?: RequestInit) => Promise<Response>;

interface PersonOptions {
  /** The `sub` that every token must have, the first one included. Without it, the first token decides. */
  subject?: string | undefined;
}

interface SessionOptions extends PersonOptions {
  /** Better Auth's base address, such as `https://app.example.com/api/auth`. */
  authUrl: string;
  fetch?: Fetch;
}

/** Seconds before its end at which a token is renewed; of a token that lives for less than two minutes, half its life. */
const MARGIN = 60;

interface Kept {
  jwt: string;
  /** Seconds from `exp - iat`; 0 when they cannot be read, and then the token serves those who wait for it alone. */
  life: number;
  /** When it was asked for, on both clocks: milliseconds. */
  since: Moment;
}

type Moment = readonly [running: number, wall: number];

// A device's clock may be wrong and be put right at any moment; the running clock may stand still while it sleeps.
// Neither is believed to have gone slower than the other.
const now = (): Moment => [performance.now(), Date.now()];
const age = ([running, wall]: Moment): number => Math.max(performance.now() - running, Math.abs(Date.now() - wall)) / 1000;

/**
 * A check for the tokens of one person: it returns the token, and throws AnotherPerson for a token of anyone else.
 *
 * A person is an issuer and a subject (RFC 7519, sections 4.1.1 and 4.1.2). Without `subject`, the first token that
 * names a subject decides; from then on a token that names none is refused, too.
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

/** A source that keeps what `fetchToken` returns for as long as it lives, and accepts tokens of one person alone. */
export function tokenSource(fetchToken: () => Promise<string>, { subject }: PersonOptions = {}): TokenSource {
  const checked = onePerson(subject);
  let kept: Kept | null = null;
  let flight: Promise<Kept> | null = null;

  const renew = (): Promise<Kept> => {
    if (flight) return flight;
    const since = now();
    const mine = fetchToken()
      .then((jwt) => {
        const fresh = { jwt: checked(jwt), life: claimsOf(jwt).life, since };
        // The token may have been discarded meanwhile.
        if (flight === mine) kept = fresh;
        return fresh;
      })
      .finally(() => {
        if (flight === mine) flight = null;
      });
    flight = mine;
    return mine;
  };

  return {
    async token({ refused, signal } = {}) {
      const left = kept && kept.jwt !== refused ? kept.life - age(kept.since) : 0;
      if (kept && left > Math.min(MARGIN, kept.life / 2)) return kept.jwt;
      const inReserve = left > 0 ? kept : null;
      try {
        return (await within(renew, 2 * PATIENCE.timeout, signal)).jwt;
      } catch (error) {
        // Not renewed in time is not yet too late, unless the session is gone.
        const ended = error instanceof SignedOut || error instanceof AnotherPerson;
        if (inReserve && inReserve === kept && !ended && !signal?.aborted) return inReserve.jwt;
        if (ended) kept = null;
        throw error;
      }
    },
    clear() {
      kept = flight = null;
    },
  };
}

/**
 * The session cookie of a browser; or of a request to a server, whose `Cookie` header is handed on.
 *
 * On a server make one for each request: it speaks for the person whose cookie it was given.
 */
export function cookieSession({ authUrl, cookie, subject, fetch }: SessionOptions & { cookie?: string }): TokenSource {
  const headers: Record<string, string> = cookie === undefined ? {} : { Cookie: cookie };
  return tokenSource(() => exchange({ authUrl, fetch }, { headers, credentials: "include" }), { subject });
}

/** The session token of a client without cookies, asked for each time: it may come from secure storage. */
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
  const response = await persist(
    async (signal) => buffered(await fetch(`${authUrl.replace(/\/+$/, "")}/token`, { ...init, signal })),
    { again: true, signal: undefined, patience: PATIENCE },
  );
  if (response.status === 401) throw new SignedOut();
  const { token } = response.ok ? ((await response.json().catch(() => ({}))) as { token?: unknown }) : {};
  if (typeof token !== "string") throw new IssuerError(response);
  return token;
}

interface Claims {
  /** Undefined when the token cannot be read, or names no subject. */
  sub: string | undefined;
  iss: unknown;
  /** Seconds between `iat` and `exp`: the issuer's own clock says both, so the device's need not be right. */
  life: number;
}

/** What a JWT says. The signature is not checked: the API does that, and the token came from the issuer itself. */
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
