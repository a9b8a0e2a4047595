/** The typed client of the API: a token of Better Auth's on each request, errors as exceptions, nothing done twice. */
import createFetchClient, { type FetchOptions } from "openapi-fetch";
import { ApiError } from "./client/errors.ts";
import { buffered, PATIENCE, type Patience, persist } from "./client/retry.ts";
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
  /** Where the API is, such as `https://api.example.com`. */
  baseUrl: string;
  token: TokenSource;
  /** Instead of the global one: in a test, or with what a framework adds to it. */
  fetch?: (input: string, init?: RequestInit) => Promise<Response>;
}

/** As in openapi-fetch, but a refusal is thrown: whoever has an answer has its data. */
export interface Client {
  GET: Method<"get">;
  PUT: Method<"put">;
  POST: Method<"post">;
  PATCH: Method<"patch">;
  DELETE: Method<"delete">;
  /** Any path, untyped, under the same promises; with `stream` the body is not read yet. Throws like the others. */
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
// Not a type parameter of the method: then a member too many would go unnoticed.
type Init<T> = FetchOptions<T>;
type Method<M extends Verb> = <P extends PathWith<M>>(
  path: P,
  ...init: object extends Init<paths[P][M]> ? [init?: Init<paths[P][M]>] : [init: Init<paths[P][M]>]
) => Promise<{ data: Data<paths[P][M]>; response: Response }>;

/** What an operation answers when all is well. */
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

/** Each request to one of these gets a key, unless it brings its own. The compiler sees to it that none is left out. */
const KEYED: { readonly [P in keyof paths as TakesKey<P>]: true } = {
  "/api/v1/tasks": true,
  "/api/v1/tasks/batch": true,
};

/**
 * A client for one person: that of the first token, for as long as the client lives. When `token` gives a token of
 * another person, the call throws AnotherPerson and nothing is sent.
 *
 * A request that is lost, or is told to come back later, is sent again when that does nothing twice: GET, PUT and DELETE
 * always, POST with its Idempotency-Key, PATCH with an If-Match. A 401 is followed by one more attempt with a new token.
 * Each call throws ApiError, SignedOut, AnotherPerson, IssuerError, TimedOut, what `fetch` throws, or the reason of its
 * signal.
 */
export function createClient({ baseUrl, token, fetch = globalThis.fetch, ...patience }: ClientOptions): Client {
  const base = baseUrl.replace(/\/+$/, "");
  const options = { ...PATIENCE, ...patience };
  // Any object may be a TokenSource, so the client does not rely on the source's own check.
  const checked = onePerson();

  async function send(url: string, init: RequestInit & { headers: Headers }, stream: boolean): Promise<Response> {
    const { signal, headers } = init;
    const ask = async (jwt: string) => {
      headers.set("Authorization", `Bearer ${jwt}`);
      const once = async (signal: AbortSignal) => {
        // A token goes nowhere but where it was meant to go.
        const response = await fetch(url, { ...init, headers, signal, redirect: "error", credentials: "omit" });
        return stream && response.ok ? response : buffered(response);
      };
      return persist(once, { again: repeatable(init.method ?? "GET", headers), signal: signal ?? undefined, patience: options });
    };
    const waiting = signal ? { signal } : {};
    const jwt = checked(await token.token(waiting));
    let response = await ask(jwt);
    if (response.status === 401) response = await ask(checked(await token.token({ ...waiting, refused: jwt })));
    if (!response.ok) throw await ApiError.of(response);
    return response;
  }

  const typed = createFetchClient<paths>({
    baseUrl: base,
    async fetch(request) {
      // Taken apart, because a body that is a stream could be sent only once.
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

function repeatable(method: string, headers: Headers): boolean {
  if (method === "POST") return headers.has(KEY);
  return method !== "PATCH" || headers.has("If-Match");
}
