/** The typed client of the API: adds a Better Auth token to each request, throws errors, and retries safely. */
import createFetchClient, { type FetchOptions } from "openapi-fetch";
import { ApiError } from "./client/errors.ts";
import { buffered, type Patience, RETRY_DEFAULTS, withRetries } from "./client/retry.ts";
import { onePerson, type TokenSource } from "./client/tokens.ts";
import { uuid } from "./client/uuid.ts";
import type { components, paths } from "./schema.d.ts";

export { type Change, changes, type LiveOptions } from "./client/changes.ts";
export {
  AnotherPerson,
  ApiError,
  Conflict,
  IssuerError,
  type Problem,
  type ProblemError,
  SignedOut,
  type Task,
  TimedOut,
} from "./client/errors.ts";
export { pages } from "./client/pages.ts";
export { backoff, type Patience, sleep } from "./client/retry.ts";
export { bearerSession, cookieSession, type TokenSource, tokenSource } from "./client/tokens.ts";
export { same, type TaskChanges, update } from "./client/update.ts";
export { uuid } from "./client/uuid.ts";
export type { components, paths };

export interface ClientOptions extends Partial<Patience> {
  /** The API's origin, such as `https://api.example.com`. */
  baseUrl: string;
  token: TokenSource;
  /** Replaces the global `fetch`, for example in tests. */
  fetch?: (input: string, init?: RequestInit) => Promise<Response>;
}

/** The methods of openapi-fetch, except that error responses are thrown, so that `data` is always defined. */
export interface Client {
  GET: Method<"get">;
  PUT: Method<"put">;
  POST: Method<"post">;
  PATCH: Method<"patch">;
  DELETE: Method<"delete">;
  /**
   * An untyped request to any path, with the same authentication, retries and errors.
   *
   * With `stream`, the response's body has not been read.
   */
  fetch(path: string, init?: RawInit): Promise<Response>;
}

export interface RawInit {
  method?: string;
  headers?: HeadersInit;
  body?: string;
  signal?: AbortSignal | undefined;
  stream?: boolean;
}

type Verb = "get" | "put" | "post" | "patch" | "delete";
type PathWith<M extends Verb> = { [P in keyof paths]: paths[P] extends Record<M, object> ? P : never }[keyof paths];
// Not a type parameter of the method, because then excess properties would not be reported.
type Init<T> = FetchOptions<T>;
type Method<M extends Verb> = <P extends PathWith<M>>(
  path: P,
  ...init: object extends Init<paths[P][M]> ? [init?: Init<paths[P][M]>] : [init: Init<paths[P][M]>]
) => Promise<{ data: Data<paths[P][M]>; response: Response }>;

/** The data of an operation's successful response. */
export type Data<T> = T extends { responses: infer R }
  ? {
      [S in keyof R]: S extends 200 | 201 | 202 | 204
        ? R[S] extends { content: { "application/json": infer D } } ? D : undefined
        : never;
    }[keyof R]
  : never;

type TakesKey<P extends keyof paths> = paths[P] extends { post: { parameters: { header?: infer H } } }
  ? H extends { "Idempotency-Key"?: unknown } ? P : never
  : never;

/** POST operations that get a random Idempotency-Key if the caller sets none. The type requires a complete list. */
const KEYED: { readonly [P in keyof paths as TakesKey<P>]: true } = {
  "/api/v1/tasks": true,
  "/api/v1/tasks/batch": true,
};

/**
 * Creates a client for one user, determined by the first token. If `token` later returns a token of another user, calls
 * throw AnotherPerson and send nothing.
 *
 * Retries requests without a response, and responses with 429, 502, 503 or 504, when repeating is safe: GET, PUT and
 * DELETE always, POST with an Idempotency-Key, PATCH with an If-Match; a 429 with any method. Also retries a 409 that
 * says that an earlier attempt is still being processed. After a 401, retries once with a new token.
 * Calls throw ApiError, SignedOut, AnotherPerson, IssuerError, TimedOut, errors of `fetch`, or the signal's abort reason.
 */
export function createClient({ baseUrl, token, fetch = globalThis.fetch, ...patience }: ClientOptions): Client {
  const base = baseUrl.replace(/\/+$/, "");
  const limits = { ...RETRY_DEFAULTS, ...patience };
  // Applications can implement TokenSource themselves, so the client checks the subject, too.
  const checkSubject = onePerson();

  async function send(url: string, init: RequestInit & { headers: Headers }, stream: boolean): Promise<Response> {
    const { signal, headers } = init;
    const sendWith = async (jwt: string) => {
      headers.set("Authorization", `Bearer ${jwt}`);
      const once = async (signal: AbortSignal) => {
        // Never follow a redirect with the token.
        const response = await fetch(url, { ...init, headers, signal, redirect: "error", credentials: "omit" });
        return stream && response.ok ? response : buffered(response);
      };
      const repeatable = isRepeatable(init.method ?? "GET", headers);
      return withRetries(once, { repeatable, signal: signal ?? undefined, limits });
    };
    const options = signal ? { signal } : {};
    const jwt = checkSubject(await token.token(options));
    let response = await sendWith(jwt);
    if (response.status === 401) response = await sendWith(checkSubject(await token.token({ ...options, refused: jwt })));
    if (!response.ok) throw await ApiError.of(response);
    return response;
  }

  const typed = createFetchClient<paths>({
    baseUrl: base,
    async fetch(request) {
      // Read the body here: a stream could be sent only once.
      const { url, method, headers, signal, cache } = request;
      const body = await request.text();
      return send(url, { method, headers, signal, cache, ...(body !== "" && { body }) }, false);
    },
  });
  typed.use({
    onRequest({ request, schemaPath }) {
      if (request.method === "POST" && schemaPath in KEYED && !request.headers.has(KEY)) request.headers.set(KEY, uuid());
    },
  });
  return {
    ...(typed as unknown as Client),
    fetch: (path, { headers, stream = false, ...init } = {}) =>
      send(base + path, { ...init, signal: init.signal ?? null, headers: new Headers(headers) }, stream),
  };
}

const KEY = "Idempotency-Key";

function isRepeatable(method: string, headers: Headers): boolean {
  if (method === "POST") return headers.has(KEY);
  return method !== "PATCH" || headers.has("If-Match");
}
