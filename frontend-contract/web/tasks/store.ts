/** The state of the task page: tasks from the API, with unconfirmed local changes applied on top. */
import {
  AnotherPerson,
  ApiError,
  changes as liveChanges,
  type Client,
  type components,
  Conflict,
  SignedOut,
  sleep,
  type Task,
  type TaskChanges,
  TimedOut,
  update,
  uuid,
} from "@frontend-contract/client";
import { comparing, forApi, isOverdue, matches, PAGE, type Query } from "./query.ts";

export type Tag = components["schemas"]["TagRead"];
export type Summary = components["schemas"]["TaskSummary"];
export type NewTask = components["schemas"]["TaskCreate"];
export interface Page {
  items: Task[];
  next_cursor: string | null;
}

/** The data that the server rendered the page with. */
export interface Initial {
  page: Page;
  tags: Tag[];
  summary: Summary;
}

export interface Notice {
  id: number;
  text: string;
  tone: "done" | "failed";
  undo: (() => void) | null;
}

/** Two conflicting versions of a task. */
export interface Dispute {
  mine: Task;
  theirs: Task;
  /** Names of the members that were changed here. */
  changed: readonly string[];
}

export interface State {
  query: Query;
  tasks: readonly Task[];
  phase: "loading" | "ready" | "failed";
  more: boolean;
  loadingMore: boolean;
  tags: readonly Tag[];
  summary: Summary;
  /** Number of changes that the API has not confirmed. */
  unsent: number;
  reachable: boolean;
  /** Whether the change stream is connected. */
  live: boolean;
  dispute: Dispute | null;
  notices: readonly Notice[];
  ended: "ended" | "suspended" | "another" | null;
}

/** An optimistic change: applied to the displayed tasks until the API has confirmed it. */
interface Draft {
  id: string;
  apply: (task: Task | null) => Task | null;
}

export class TaskStore {
  readonly #api: Client;
  #state: State;
  readonly #listeners = new Set<() => void>();
  /** All tasks received from the API, whether or not they are shown. */
  readonly #received = new Map<string, Task>();
  #drafts: Draft[] = [];
  /** The last request for each task; the next one waits for it. */
  readonly #requests = new Map<string, Promise<unknown>>();
  #cursor: string | null = null;
  /** The last task of the loaded pages. Tasks that sort after it are not shown, because others between may be missing. */
  #lastLoaded: Task | null = null;
  #loads = 0;
  #lastNoticeId = 0;
  #countTimer: ReturnType<typeof setTimeout> | null = null;
  #stop = new AbortController();

  constructor(api: Client, query: Query, initial: Initial) {
    this.#api = api;
    this.#state = {
      query,
      tasks: [],
      phase: "ready",
      more: false,
      loadingMore: false,
      tags: initial.tags,
      summary: initial.summary,
      unsent: 0,
      reachable: true,
      live: false,
      dispute: null,
      notices: [],
      ended: null,
    };
    this.#addPage(initial.page);
    this.#update();
  }

  readonly subscribe = (listener: () => void): (() => void) => {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  };

  readonly state = (): State => this.#state;

  /** Follows changes made elsewhere until the returned function is called. */
  start(): () => void {
    this.#stop = new AbortController();
    const { signal } = this.#stop;
    const online = () => this.#set({ reachable: navigator.onLine });
    window.addEventListener("online", online, { signal });
    window.addEventListener("offline", online, { signal });
    void this.#followChanges(signal);
    return () => this.#stop.abort();
  }

  /** Shows the tasks of another query. */
  async setQuery(query: Query): Promise<void> {
    this.#set({ query, phase: "loading", tasks: [] });
    await this.reload();
  }

  /** Loads the displayed tasks again. */
  async reload(): Promise<void> {
    const load = ++this.#loads;
    const { query } = this.#state;
    const limit = Math.min(100, Math.max(PAGE, this.#state.tasks.length));
    try {
      const { data } = await this.#api.GET("/api/v1/tasks", { params: { query: { ...forApi(query), limit } } });
      if (load !== this.#loads) return;
      this.#received.clear();
      this.#lastLoaded = null;
      this.#addPage(data);
      this.#set({ phase: "ready", loadingMore: false });
      this.#update();
      this.#reloadCounts(0);
    } catch (error) {
      if (load !== this.#loads || this.#endsSession(error)) return;
      if (this.#state.phase === "loading") this.#set({ phase: "failed" });
    }
  }

  async loadMore(): Promise<void> {
    const load = this.#loads;
    if (this.#cursor === null || this.#state.loadingMore) return;
    this.#set({ loadingMore: true });
    try {
      const query = { ...forApi(this.#state.query), cursor: this.#cursor };
      const { data } = await this.#api.GET("/api/v1/tasks", { params: { query } });
      if (load !== this.#loads) return;
      this.#addPage(data);
      this.#update();
    } catch (error) {
      if (!this.#endsSession(error)) this.#notify("More tasks could not be loaded.", "failed");
    }
    if (load === this.#loads) this.#set({ loadingMore: false });
  }

  /** Adds a task, which is displayed immediately. Returns its id, generated here. */
  create(task: NewTask): string {
    const id = uuid();
    const at = new Date().toISOString();
    const drafted: Task = {
      id,
      title: task.title,
      description: task.description ?? null,
      status: task.status ?? "todo",
      priority: task.priority ?? "normal",
      due_at: task.due_at ?? null,
      tags: task.tags ?? [],
      is_overdue: false,
      completed_at: null,
      created_at: at,
      updated_at: at,
      deleted_at: null,
      version: 0,
    };
    void this.#change(id, (now) => now ?? drafted, async () => {
      try {
        const params = { path: { id }, header: { "If-None-Match": "*" } };
        return (await this.#api.PUT("/api/v1/tasks/{id}", { params, body: task })).data;
      } catch (error) {
        // The task exists: an earlier attempt succeeded and its response was lost.
        if (error instanceof ApiError && error.status === 412) return this.#get(id);
        throw error;
      }
    }, { failed: `“${task.title}” could not be added.` });
    return id;
  }

  /** seen: the task as the user saw it when the edit began. A later change made elsewhere causes a conflict. */
  edit(seen: Task, changes: TaskChanges, { quiet = false, done = "Saved" }: { quiet?: boolean; done?: string } = {}): void {
    const before = Object.fromEntries(Object.keys(changes).map((name) => [name, seen[name as keyof TaskChanges]])) as TaskChanges;
    const undo = () => this.#withCurrent(seen.id, (task) => this.edit(task, before, { quiet: true }));
    void this.#change(seen.id, (task) => task && withChanges(task, changes), (current) => update(this.#api, baseVersion(seen, current, this.#ownVersions), changes), {
      failed: `“${seen.title}” could not be changed.`,
      ...(!quiet && { done, undo }),
      wanted: { mine: withChanges(seen, changes), changed: Object.keys(changes) },
    });
  }

  complete(task: Task): void {
    const status = task.status === "done" ? "todo" : "done";
    this.edit(task, { status }, { done: status === "done" ? `Completed “${task.title}”` : `Reopened “${task.title}”` });
  }

  remove(task: Task): void {
    const at = new Date().toISOString();
    void this.#change(task.id, (now) => now && { ...now, deleted_at: at }, async (current) => {
      await this.#api.DELETE("/api/v1/tasks/{id}", { params: { path: { id: task.id } } });
      return current && { ...current, deleted_at: at, version: current.version + 1 };
    }, {
      failed: `“${task.title}” could not be deleted.`,
      done: `Deleted “${task.title}”`,
      undo: () => this.restore(task, { quiet: true }),
    });
  }

  restore(task: Task, { quiet = false }: { quiet?: boolean } = {}): void {
    void this.#change(
      task.id,
      (now) => now && { ...now, deleted_at: null },
      async () => (await this.#api.POST("/api/v1/tasks/{id}/restore", { params: { path: { id: task.id } } })).data,
      { failed: `“${task.title}” could not be restored.`, ...(!quiet && { done: `Restored “${task.title}”`, undo: () => this.#withCurrent(task.id, (now) => this.remove(now)) }) },
    );
  }

  /** Ends a conflict. resolved: changes to apply to their version; null keeps their version. */
  settle(resolved: TaskChanges | null): void {
    const { dispute } = this.#state;
    this.#set({ dispute: null });
    if (dispute && resolved && Object.keys(resolved).length > 0) this.edit(dispute.theirs, resolved, { done: "Conflict resolved" });
  }

  /** Undoes the newest change that has an undo action. */
  undo(): void {
    const notice = this.#state.notices.findLast(({ undo }) => undo);
    if (!notice) return;
    this.dismiss(notice.id);
    notice.undo?.();
  }

  dismiss(id: number): void {
    this.#set({ notices: this.#state.notices.filter((notice) => notice.id !== id) });
  }

  /** Versions created by this page. Editing one of them is not a conflict. */
  readonly #ownVersions = new Map<string, number>();

  async #change(
    id: string,
    apply: Draft["apply"],
    send: (current: Task | null) => Promise<Task | null>,
    { failed, done, undo, wanted }: { failed: string; done?: string; undo?: () => void; wanted?: Omit<Dispute, "theirs"> },
  ): Promise<void> {
    const draft: Draft = { id, apply };
    this.#drafts.push(draft);
    this.#update();
    if (done) this.#notify(done, "done", undo);
    const request = (this.#requests.get(id) ?? Promise.resolve()).then(() => this.#sendUntilAnswered(() => send(this.#received.get(id) ?? null)));
    this.#requests.set(id, request.catch(() => {}));
    try {
      const task = await request;
      if (task) {
        this.#addTask(task);
        this.#ownVersions.set(id, task.version);
      }
    } catch (error) {
      if (error instanceof Conflict && error.current && wanted) {
        this.#addTask(error.current);
        this.#set({ dispute: { ...wanted, theirs: error.current }, notices: [] });
      } else if (error instanceof Conflict || (error instanceof ApiError && error.status === 404)) {
        this.#received.delete(id);
        this.#notify(`${failed} It has been deleted elsewhere.`, "failed");
      } else if (!this.#endsSession(error)) {
        this.#notify(`${failed} ${reasonOf(error)}`.trim(), "failed");
      }
    }
    this.#drafts = this.#drafts.filter((other) => other !== draft);
    this.#update();
    this.#reloadCounts(0);
  }

  /** Retries until the server responds. `send` must be safe to repeat. */
  async #sendUntilAnswered<T>(send: () => Promise<T>): Promise<T> {
    for (;;) {
      try {
        const result = await send();
        this.#set({ reachable: navigator.onLine });
        return result;
      } catch (error) {
        if (!(error instanceof TypeError || error instanceof TimedOut)) throw error;
        this.#set({ reachable: false });
        await reconnected(this.#stop.signal);
      }
    }
  }

  async #followChanges(signal: AbortSignal): Promise<void> {
    try {
      for await (const change of liveChanges(this.#api, { signal })) {
        this.#set({ live: true, reachable: navigator.onLine });
        if (change.type === "resync") {
          await this.reload();
        } else {
          this.#addTask(change.task);
          this.#update();
          this.#reloadCounts(400);
        }
      }
    } catch (error) {
      if (!signal.aborted && !this.#endsSession(error)) this.#set({ live: false });
    }
  }

  async #get(id: string): Promise<Task> {
    return (await this.#api.GET("/api/v1/tasks/{id}", { params: { path: { id } } })).data;
  }

  #withCurrent(id: string, act: (task: Task) => void): void {
    const task = this.#withDrafts().find((drafted) => drafted.id === id);
    if (task) act(task);
  }

  #addPage(page: Page): void {
    for (const task of page.items) this.#addTask(task);
    this.#cursor = page.next_cursor;
    this.#lastLoaded = page.items.at(-1) ?? this.#lastLoaded;
  }

  /** Keeps the higher version: responses and live changes can arrive in any order. */
  #addTask(task: Task): void {
    if (task.version >= (this.#received.get(task.id)?.version ?? 0)) this.#received.set(task.id, task);
  }

  #withDrafts(): Task[] {
    const tasks = new Map<string, Task | null>(this.#received);
    for (const { id, apply } of this.#drafts) tasks.set(id, apply(tasks.get(id) ?? null));
    return [...tasks.values()].filter((task) => task !== null);
  }

  #update(): void {
    const { query, phase } = this.#state;
    const compare = comparing(query.sort);
    const end = this.#cursor === null ? null : this.#lastLoaded;
    const now = Date.now();
    const tasks = this.#withDrafts()
      .filter((task) => matches(query, task, now) && (!end || compare(task, end) <= 0))
      .map((task) => (task.is_overdue === isOverdue(task, now) ? task : { ...task, is_overdue: isOverdue(task, now) }))
      .sort(compare);
    this.#set({ tasks: phase === "ready" ? tasks : [], more: this.#cursor !== null, unsent: this.#drafts.length });
  }

  /** Reloads tags and counts after a delay, so that many changes cause one request. */
  #reloadCounts(milliseconds: number): void {
    if (this.#countTimer !== null) clearTimeout(this.#countTimer);
    this.#countTimer = setTimeout(() => {
      this.#countTimer = null;
      Promise.all([this.#api.GET("/api/v1/tags"), this.#api.GET("/api/v1/tasks/summary")]).then(
        ([tags, summary]) => this.#set({ tags: tags.data.items, summary: summary.data }),
        (error: unknown) => void this.#endsSession(error),
      );
    }, milliseconds);
  }

  #notify(text: string, tone: Notice["tone"], undo: (() => void) | null = null): void {
    const notice = { id: ++this.#lastNoticeId, text, tone, undo };
    this.#set({ notices: [...this.#state.notices.slice(-2), notice] });
  }

  #endsSession(error: unknown): boolean {
    if (error instanceof SignedOut) this.#set({ ended: "ended" });
    else if (error instanceof AnotherPerson) this.#set({ ended: "another" });
    else if (error instanceof ApiError && (error.status === 401 || error.status === 403)) {
      this.#set({ ended: error.status === 403 ? "suspended" : "ended" });
    } else return false;
    return true;
  }

  #set(change: Partial<State>): void {
    this.#state = { ...this.#state, ...change };
    for (const listener of this.#listeners) listener();
  }
}

function withChanges(task: Task, changes: TaskChanges): Task {
  const changed = { ...task, ...(changes as Partial<Task>) };
  const completed_at = changed.status !== "done" ? null : (task.completed_at ?? new Date().toISOString());
  return { ...changed, completed_at };
}

/** The version to save against: `seen`, or the current one if this page itself has changed the task since. */
function baseVersion(seen: Task, current: Task | null, ownVersions: ReadonlyMap<string, number>): Task {
  return current && (seen.version === 0 || ownVersions.get(seen.id) === current.version) ? current : seen;
}

function reasonOf(error: unknown): string {
  if (!(error instanceof ApiError)) return "Something went wrong.";
  return error.errors[0]?.msg ?? error.message;
}

/** Resolves when the browser is online again, at the latest after five seconds. */
async function reconnected(signal: AbortSignal): Promise<void> {
  const online = new AbortController();
  window.addEventListener("online", () => online.abort(), { signal: AbortSignal.any([signal, online.signal]) });
  await sleep(navigator.onLine ? 1_000 : 5_000, AbortSignal.any([signal, online.signal])).catch(() => signal.throwIfAborted());
}
