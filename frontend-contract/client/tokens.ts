/** JWTs from Better Auth: one request in flight however many callers wait, renewed in time, kept in memory alone. */
import { IssuerError, SignedOut } from "./errors.ts";
import { buffered, PATIENCE, persist, within } from "./retry.ts";

/** Whom a client speaks for. Several clients of one person may share it; two persons never. */
export interface TokenSource {
  /**
   * A JWT that is good for a while; never `refused`, which the API has just turned down.
   *
   * Throws SignedOut, IssuerError, or what `fetch` throws when nobody answers.
   */
  token(options?: { refused?: string; signal?: AbortSignal }): Promise<string>;
  /** Forget the token: call it when somebody signs in or out. */
  clear(): void;
}

type Fetch = (input: string, init?: RequestInit) => Promise<Response>;

interface SessionOptions {
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

/** A source that keeps what `fetchToken` returns for as long as it lives. */
export function tokenSource(fetchToken: () => Promise<string>): TokenSource {
  let kept: Kept | null = null;
  let flight: Promise<Kept> | null = null;

  const renew = (): Promise<Kept> => {
    if (flight) return flight;
    const since = now();
    const mine = fetchToken()
      .then((jwt) => {
        const fresh = { jwt, life: lifeOf(jwt), since };
        // Somebody else may have signed in meanwhile.
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
        // Not renewed in time is not yet too late, unless there is nobody any more to speak for.
        if (inReserve && inReserve === kept && !(error instanceof SignedOut) && !signal?.aborted) return inReserve.jwt;
        if (error instanceof SignedOut) kept = null;
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
export function cookieSession({ authUrl, cookie, fetch }: SessionOptions & { cookie?: string }): TokenSource {
  const headers: Record<string, string> = cookie === undefined ? {} : { Cookie: cookie };
  return tokenSource(() => exchange({ authUrl, fetch }, { headers, credentials: "include" }));
}

/** The session token of a client without cookies, asked for each time: it may come from secure storage. */
export function bearerSession({
  authUrl,
  sessionToken,
  fetch,
}: SessionOptions & { sessionToken: () => string | null | Promise<string | null> }): TokenSource {
  return tokenSource(async () => {
    const bearer = await sessionToken();
    if (!bearer) throw new SignedOut();
    return exchange({ authUrl, fetch }, { headers: { Authorization: `Bearer ${bearer}` }, credentials: "omit" });
  });
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

/** Seconds between `iat` and `exp`: the issuer's own clock says both, so the device's need not be right. */
function lifeOf(jwt: string): number {
  try {
    const segment = jwt.split(".")[1]!.replace(/-/g, "+").replace(/_/g, "/");
    // The two members are ASCII; names in the rest need not come out right.
    const { exp, iat } = JSON.parse(atob(segment)) as { exp?: unknown; iat?: unknown };
    return typeof exp === "number" && typeof iat === "number" ? exp - iat : 0;
  } catch {
    return 0;
  }
}
