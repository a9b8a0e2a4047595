/** Error classes of the client. */
import type { components } from "../schema.d.ts";

export type Problem = components["schemas"]["Problem"];
export type ProblemError = components["schemas"]["ProblemError"];
export type Task = components["schemas"]["TaskRead"];

/** An error response of the API (RFC 9457). `code` is stable and listed in docs/errors.md. */
export class ApiError extends Error {
  override readonly name: string = "ApiError";
  readonly status: number;
  /** The API's error code; `status_<number>` if the response came from a proxy. */
  readonly code: string;
  /** The invalid members of the request. */
  readonly errors: readonly ProblemError[];
  /** Identifies the request in the API's log. */
  readonly requestId: string | null;
  /** Seconds to wait before a retry, from Retry-After. */
  readonly retryAfter: number | null;

  constructor(error: Pick<ApiError, "message" | "status" | "code" | "errors" | "requestId" | "retryAfter">) {
    super(error.message);
    this.status = error.status;
    this.code = error.code;
    this.errors = error.errors;
    this.requestId = error.requestId;
    this.retryAfter = error.retryAfter;
  }

  /** Creates an error from an error response. */
  static async of(response: Response): Promise<ApiError> {
    const problem = await problemOf(response);
    return new ApiError({
      message: problem.detail ?? problem.title ?? `the API responded with status ${response.status}`,
      status: response.status,
      code: problem.code ?? `status_${response.status}`,
      errors: problem.errors ?? [],
      requestId: problem.request_id ?? response.headers.get("X-Request-ID"),
      retryAfter: retryAfter(response),
    });
  }
}

/** The task was changed or deleted after it was read. */
export class Conflict extends ApiError {
  override readonly name = "Conflict";
  /** The current task; null if it was deleted. */
  readonly current: Task | null;

  constructor(error: ApiError, current: Task | null) {
    super(error);
    this.current = current;
  }
}

/** There is no valid Better Auth session: the user has to sign in again. */
export class SignedOut extends Error {
  override readonly name = "SignedOut";

  constructor() {
    super("there is no session: sign in");
  }
}

/**
 * The token, the stored data or the session belongs to a different user than this client.
 *
 * Also thrown for a token without a readable subject. Nothing is sent with such a token. Discard the client and create a
 * new one for the user who is signed in now; in a browser, reload the page.
 */
export class AnotherPerson extends Error {
  override readonly name = "AnotherPerson";

  constructor(message = "the token belongs to a different user: create a new client") {
    super(message);
  }
}

/** Better Auth returned no token, for a reason other than a missing session. */
export class IssuerError extends Error {
  override readonly name = "IssuerError";
  readonly status: number;
  /** Seconds. */
  readonly retryAfter: number | null;

  constructor(response: Response) {
    const hint = response.status === 404 ? ": check that the jwt plugin is enabled and authUrl is Better Auth's base URL" : "";
    super(`the issuer responded with status ${response.status} to a token request${hint}`);
    this.status = response.status;
    this.retryAfter = retryAfter(response);
  }
}

/** There was no response within the timeout. */
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
  // Compare with the server's Date, so that a wrong clock on the device does not matter.
  const seconds = (Date.parse(text) - (Date.parse(headers.get("Date") ?? "") || Date.now())) / 1000;
  return Number.isNaN(seconds) ? null : Math.max(0, seconds);
}
