/** What can go wrong, as classes: a program decides by them and by `code`, a person reads `message`. */
import type { components } from "../schema.d.ts";

export type Problem = components["schemas"]["Problem"];
export type ProblemError = components["schemas"]["ProblemError"];
export type Task = components["schemas"]["TaskRead"];

/** The API's refusal (RFC 9457). `code` is stable, and listed in docs/errors.md. */
export class ApiError extends Error {
  override readonly name: string = "ApiError";
  readonly status: number;
  /** `status_<number>` when the answer is not the API's own, but a proxy's. */
  readonly code: string;
  /** What is wrong with which member. */
  readonly errors: readonly ProblemError[];
  /** Finds the request in the API's log. */
  readonly requestId: string | null;
  /** Seconds until it may be worth asking again. */
  readonly retryAfter: number | null;

  constructor(refusal: Pick<ApiError, "message" | "status" | "code" | "errors" | "requestId" | "retryAfter">) {
    super(refusal.message);
    this.status = refusal.status;
    this.code = refusal.code;
    this.errors = refusal.errors;
    this.requestId = refusal.requestId;
    this.retryAfter = refusal.retryAfter;
  }

  /** Of an answer that is not a success. */
  static async of(response: Response): Promise<ApiError> {
    const problem = await problemOf(response);
    return new ApiError({
      message: problem.detail ?? problem.title ?? `the API answered ${response.status}`,
      status: response.status,
      code: problem.code ?? `status_${response.status}`,
      errors: problem.errors ?? [],
      requestId: problem.request_id ?? response.headers.get("X-Request-ID"),
      retryAfter: retryAfter(response),
    });
  }
}

/** Somebody else changed the task since it was read. */
export class Conflict extends ApiError {
  override readonly name = "Conflict";
  /** As it is now; null when it is gone, or in the bin. */
  readonly current: Task | null;

  constructor(refusal: ApiError, current: Task | null) {
    super(refusal);
    this.current = current;
  }
}

/** Better Auth knows no session here: the person has to sign in again. */
export class SignedOut extends Error {
  override readonly name = "SignedOut";

  constructor() {
    super("there is no session: sign in");
  }
}

/**
 * The token, the stored data or the session belongs to a person other than the one this client works for.
 *
 * Also thrown when a token does not say whose it is. Nothing is sent with such a token. Discard the client, and make a
 * new one for the person who is signed in now; in a browser, load the page anew.
 */
export class AnotherPerson extends Error {
  override readonly name = "AnotherPerson";

  constructor(message = "the token is for a different person: make a new client") {
    super(message);
  }
}

/** Better Auth gives no token, and not because of who asks. */
export class IssuerError extends Error {
  override readonly name = "IssuerError";
  readonly status: number;
  /** Seconds. */
  readonly retryAfter: number | null;

  constructor(response: Response) {
    const hint = response.status === 404 ? ": is the jwt plugin on, and authUrl its base address?" : "";
    super(`the issuer answered ${response.status} to a request for a token${hint}`);
    this.status = response.status;
    this.retryAfter = retryAfter(response);
  }
}

/** No answer in time. */
export class TimedOut extends Error {
  override readonly name = "TimedOut";
}

async function problemOf(response: Response): Promise<Partial<Problem>> {
  if (!response.headers.get("Content-Type")?.startsWith("application/problem+json")) return {};
  try {
    return (await response.json()) as Problem;
  } catch {
    return {};
  }
}

/** Seconds, from `Retry-After` in either form (RFC 9110, section 10.2.3) or from Better Auth's `X-Retry-After`. */
export function retryAfter({ headers }: Response): number | null {
  const text = headers.get("Retry-After") ?? headers.get("X-Retry-After");
  if (text === null) return null;
  if (/^\d+$/.test(text)) return Number(text);
  // Both times are the server's, so that a device whose clock is wrong waits no longer than it should.
  const seconds = (Date.parse(text) - (Date.parse(headers.get("Date") ?? "") || Date.now())) / 1000;
  return Number.isNaN(seconds) ? null : Math.max(0, seconds);
}
