/** An in-memory fake of the API, fast enough for hundreds of simulations. `real.ts` uses the real API. */
import { type Task, uuid } from "../../client.ts";
import { complete, differing, members } from "../edits.ts";

type Answer = { status: number; body?: unknown };
type Operation = { op: string; id?: string; task?: { title: string }; changes?: object; if_match?: string };

class Refusal extends Error {
  readonly status: number;
  constructor(status: number) {
    super(`${status}`);
    this.status = status;
  }
}

export class FakeApi {
  #rows = new Map<string, Task & { n: number }>();
  #answers = new Map<string, Answer>();
  #n = 0;
  #floor = 0;

  readonly fetch = async (input: string, init: RequestInit = {}): Promise<Response> => {
    const { status, body } = this.#answer(init.method ?? "GET", new URL(input), init);
    const type = status >= 400 ? "application/problem+json" : "application/json";
    return new Response(body === undefined ? null : JSON.stringify(body), { status, headers: { "Content-Type": type } });
  };

  /** Purges the trash and expires earlier sync tokens. */
  purge(): void {
    for (const [id, row] of this.#rows) if (row.deleted_at) this.#rows.delete(id);
    this.#floor = this.#n;
  }

  /** Expires all idempotency keys. */
  forgetKeys(): void {
    this.#answers.clear();
  }

  #answer(method: string, { pathname, searchParams }: URL, { headers, body }: RequestInit): Answer {
    const key = new Headers(headers).get("Idempotency-Key");
    const replayed = key && this.#answers.get(key);
    if (replayed) return replayed;
    const [before, n] = [structuredClone(this.#rows), this.#n];
    try {
      const answer = this.#route(`${method} ${pathname}`, searchParams, body ? JSON.parse(body as string) : undefined);
      if (key) this.#answers.set(key, answer);
      return answer;
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      [this.#rows, this.#n] = [before, n];
      const errors = [{ loc: JSON.parse(error.stack!.startsWith("[") ? error.stack! : "[]"), msg: "", type: "" }];
      return { status: error.status, body: { status: error.status, code: error.status === 410 ? "sync_token_expired" : "refused", errors } };
    }
  }

  #route(route: string, query: URLSearchParams, body: any): Answer {
    const live = () => [...this.#rows.values()].filter((row) => !row.deleted_at);
    if (route === "GET /api/v1/tasks") return { status: 200, body: { items: live(), next_cursor: null } };
    if (route === "GET /api/v1/tasks/changes") return this.#changes(query.get("since"));
    if (route === "POST /api/v1/tasks") return { status: 201, body: this.#apply({ op: "create", task: body }) };
    if (route === "POST /api/v1/tasks/batch") {
      const items = (body.operations as Operation[]).map((operation, i) => {
        try {
          return this.#apply(operation);
        } catch (error) {
          (error as Error).stack = JSON.stringify(["body", "operations", i]);
          throw error;
        }
      });
      return { status: 200, body: { items } };
    }
    const [, method, id] = /^(\w+) \/api\/v1\/tasks\/(.+)$/.exec(route)!;
    if (method === "PATCH") return { status: 200, body: this.#apply({ op: "update", id: id!, changes: body }) };
    this.#apply({ op: "delete", id: id! });
    return { status: 204 };
  }

  /** Returns pages of three tasks. A token holds the position and, in a full read, the floor at its start. */
  #changes(since: string | null): Answer {
    const [after, began] = since === null ? [0, this.#floor] : (since.split(".").map(Number) as [number, number?]);
    if (began === undefined ? after < this.#floor : began < this.#floor) throw new Refusal(410);
    const rows = [...this.#rows.values()].filter(({ n }) => n > after).sort((one, other) => one.n - other.n);
    const items = rows.slice(0, 3);
    const more = rows.length > 3;
    const at = more ? items.at(-1)!.n : this.#n;
    return { status: 200, body: { items, next: more && began !== undefined ? `${at}.${began}` : `${at}`, more } };
  }

  #apply({ op, id = uuid(), task, changes, if_match }: Operation): Task | null {
    const row = this.#rows.get(id);
    const now = new Date().toISOString();
    if (op === "create") {
      if (row) throw new Refusal(row.deleted_at ? 404 : 412);
      if (!task!.title.trim()) throw new Refusal(422);
      const times = { created_at: now, updated_at: now, deleted_at: null, completed_at: null, is_overdue: false };
      return this.#put({ id, ...complete(task!), ...times, version: 1 });
    }
    if (!row || (op === "update" && row.deleted_at)) throw new Refusal(404);
    if (if_match && if_match !== `"${row.version}"` && !row.deleted_at) throw new Refusal(412);
    if (op === "delete") return row.deleted_at ? null : (this.#put({ ...row, deleted_at: now, version: row.version + 1 }), null);
    const wanted = differing(row, members(changes!));
    if (wanted.title !== undefined && !wanted.title.trim()) throw new Refusal(422);
    return Object.keys(wanted).length ? this.#put({ ...row, ...wanted, updated_at: now, version: row.version + 1 }) : row;
  }

  #put(task: Task): Task {
    this.#rows.set(task.id, { ...task, n: ++this.#n });
    return task;
  }
}
