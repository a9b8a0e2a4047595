/** The tasks of one page: what the API said, with what was done here laid over it until the API has said that too. */
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

/** What the server rendered the page with. */
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

/** Two versions of a task, and what was wanted here. */
export interface Dispute {
  mine: Task;
  theirs: Task;
  /** What was changed here. */
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
  /** How many changes have not reached the API. */
  unsent: number;
  reachable: boolean;
  /** Whether changes made elsewhere arrive. */
  live: boolean;
  dispute: Dispute | null;
  notices: readonly Notice[];
  ended: "ended" | "suspended" | "another" | null;
}

interface Draft {
  id: string;
  apply: (task: Task | null) => Task | null;
}

export class TaskStore {
  readonly #api: Client;
  #state: State;
  readonly #listeners = new Set<() => void>();
  /** Everything that was heard of, whether or not it is shown. */
  readonly #known = new Map<string, Task>();
  #drafts: Draft[] = [];
  /** The last change of each task: the next one waits for it. */
  readonly #turns = new Map<string, Promise<unknown>>();
  #cursor: string | null = null;
  /** Where the pages that were read end; what sorts behind it is not known well enough to be shown. */
  #edge: Task | null = null;
  #reading = 0;
  #noticed = 0;
  #counting: ReturnType<typeof setTimeout> | null = null;
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
    this.#take(initial.page);
    this.#show();
  }

  readonly subscribe = (listener: () => void): (() => void) => {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  };

  readonly state = (): State => this.#state;

  /** Listen for changes made elsewhere until the returned function is called. */
  start(): () => void {
    this.#stop = new AbortController();
    const { signal } = this.#stop;
    const online = () => this.#set({ reachable: navigator.onLine });
    window.addEventListener("online", online, { signal });
    window.addEventListener("offline", online, { signal });
    void this.#listen(signal);
    return () => this.#stop.abort();
  }

  /** Show other tasks, or these in another order. */
  async ask(query: Query): Promise<void> {
    this.#set({ query, phase: "loading", tasks: [] });
    await this.reload();
  }

  /** Read what is shown anew. */
  async reload(): Promise<void> {
    const reading = ++this.#reading;
    const { query } = this.#state;
    const limit = Math.min(100, Math.max(PAGE, this.#state.tasks.length));
    try {
      const { data } = await this.#api.GET("/api/v1/tasks", { params: { query: { ...forApi(query), limit } } });
      if (reading !== this.#reading) return;
      this.#known.clear();
      this.#edge = null;
      this.#take(data);
      this.#set({ phase: "ready", loadingMore: false });
      this.#show();
      this.#countSoon(0);
    } catch (error) {
      if (reading !== this.#reading || this.#isOver(error)) return;
      if (this.#state.phase === "loading") this.#set({ phase: "failed" });
    }
  }

  async loadMore(): Promise<void> {
    const reading = this.#reading;
    if (this.#cursor === null || this.#state.loadingMore) return;
    this.#set({ loadingMore: true });
    try {
      const query = { ...forApi(this.#state.query), cursor: this.#cursor };
      const { data } = await this.#api.GET("/api/v1/tasks", { params: { query } });
      if (reading !== this.#reading) return;
      this.#take(data);
      this.#show();
    } catch (error) {
      if (!this.#isOver(error)) this.#notify("More tasks could not be loaded.", "failed");
    }
    if (reading === this.#reading) this.#set({ loadingMore: false });
  }

  /** Returns the id, which is made here: the task is there at once. */
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
        // There already: an answer that was lost.
        if (error instanceof ApiError && error.status === 412) return this.#get(id);
        throw error;
      }
    }, { failed: `“${task.title}” could not be added.` });
    return id;
  }

  /** seen: the task as it was when the person began; a later change by somebody else makes a dispute. */
  edit(seen: Task, changes: TaskChanges, { quiet = false, done = "Saved" }: { quiet?: boolean; done?: string } = {}): void {
    const before = Object.fromEntries(Object.keys(changes).map((name) => [name, seen[name as keyof TaskChanges]])) as TaskChanges;
    const undo = () => this.#withCurrent(seen.id, (task) => this.edit(task, before, { quiet: true }));
    void this.#change(seen.id, (task) => task && withChanges(task, changes), (current) => update(this.#api, newest(seen, current, this.#mine), changes), {
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

  /** resolved: what the task is to be; null leaves theirs. */
  settle(resolved: TaskChanges | null): void {
    const { dispute } = this.#state;
    this.#set({ dispute: null });
    if (dispute && resolved && Object.keys(resolved).length > 0) this.edit(dispute.theirs, resolved, { done: "Conflict resolved" });
  }

  /** The newest thing that can be undone. */
  undo(): void {
    const notice = this.#state.notices.findLast(({ undo }) => undo);
    if (!notice) return;
    this.dismiss(notice.id);
    notice.undo?.();
  }

  dismiss(id: number): void {
    this.#set({ notices: this.#state.notices.filter((notice) => notice.id !== id) });
  }

  /** Versions that this page made itself: to change one's own change is no conflict. */
  readonly #mine = new Map<string, number>();

  async #change(
    id: string,
    apply: Draft["apply"],
    send: (current: Task | null) => Promise<Task | null>,
    { failed, done, undo, wanted }: { failed: string; done?: string; undo?: () => void; wanted?: Omit<Dispute, "theirs"> },
  ): Promise<void> {
    const draft: Draft = { id, apply };
    this.#drafts.push(draft);
    this.#show();
    if (done) this.#notify(done, "done", undo);
    const turn = (this.#turns.get(id) ?? Promise.resolve()).then(() => this.#patiently(() => send(this.#known.get(id) ?? null)));
    this.#turns.set(id, turn.catch(() => {}));
    try {
      const task = await turn;
      if (task) {
        this.#put(task);
        this.#mine.set(id, task.version);
      }
    } catch (error) {
      if (error instanceof Conflict && error.current && wanted) {
        this.#put(error.current);
        this.#set({ dispute: { ...wanted, theirs: error.current }, notices: [] });
      } else if (error instanceof Conflict || (error instanceof ApiError && error.status === 404)) {
        this.#known.delete(id);
        this.#notify(`${failed} It has been deleted elsewhere.`, "failed");
      } else if (!this.#isOver(error)) {
        this.#notify(`${failed} ${reasonOf(error)}`.trim(), "failed");
      }
    }
    this.#drafts = this.#drafts.filter((other) => other !== draft);
    this.#show();
    this.#countSoon(0);
  }

  /** Again and again while nobody answers: what is sent does nothing twice. */
  async #patiently<T>(send: () => Promise<T>): Promise<T> {
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

  async #listen(signal: AbortSignal): Promise<void> {
    try {
      for await (const change of liveChanges(this.#api, { signal })) {
        this.#set({ live: true, reachable: navigator.onLine });
        if (change.type === "resync") {
          await this.reload();
        } else {
          this.#put(change.task);
          this.#show();
          this.#countSoon(400);
        }
      }
    } catch (error) {
      if (!signal.aborted && !this.#isOver(error)) this.#set({ live: false });
    }
  }

  async #get(id: string): Promise<Task> {
    return (await this.#api.GET("/api/v1/tasks/{id}", { params: { path: { id } } })).data;
  }

  #withCurrent(id: string, act: (task: Task) => void): void {
    const task = this.#drafted().find((drafted) => drafted.id === id);
    if (task) act(task);
  }

  #take(page: Page): void {
    for (const task of page.items) this.#put(task);
    this.#cursor = page.next_cursor;
    this.#edge = page.items.at(-1) ?? this.#edge;
  }

  /** Answers and live changes overtake one another: the higher version is the later one. */
  #put(task: Task): void {
    if (task.version >= (this.#known.get(task.id)?.version ?? 0)) this.#known.set(task.id, task);
  }

  #drafted(): Task[] {
    const tasks = new Map<string, Task | null>(this.#known);
    for (const { id, apply } of this.#drafts) tasks.set(id, apply(tasks.get(id) ?? null));
    return [...tasks.values()].filter((task) => task !== null);
  }

  #show(): void {
    const { query, phase } = this.#state;
    const compare = comparing(query.sort);
    const end = this.#cursor === null ? null : this.#edge;
    const now = Date.now();
    const tasks = this.#drafted()
      .filter((task) => matches(query, task, now) && (!end || compare(task, end) <= 0))
      .map((task) => (task.is_overdue === isOverdue(task, now) ? task : { ...task, is_overdue: isOverdue(task, now) }))
      .sort(compare);
    this.#set({ tasks: phase === "ready" ? tasks : [], more: this.#cursor !== null, unsent: this.#drafts.length });
  }

  /** Tags and numbers follow the tasks, a little later: many changes are one question. */
  #countSoon(milliseconds: number): void {
    if (this.#counting !== null) clearTimeout(this.#counting);
    this.#counting = setTimeout(() => {
      this.#counting = null;
      Promise.all([this.#api.GET("/api/v1/tags"), this.#api.GET("/api/v1/tasks/summary")]).then(
        ([tags, summary]) => this.#set({ tags: tags.data.items, summary: summary.data }),
        (error: unknown) => void this.#isOver(error),
      );
    }, milliseconds);
  }

  #notify(text: string, tone: Notice["tone"], undo: (() => void) | null = null): void {
    const notice = { id: ++this.#noticed, text, tone, undo };
    this.#set({ notices: [...this.#state.notices.slice(-2), notice] });
  }

  #isOver(error: unknown): boolean {
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

/** What was seen, unless this page itself has changed it since. */
function newest(seen: Task, current: Task | null, mine: ReadonlyMap<string, number>): Task {
  return current && (seen.version === 0 || mine.get(seen.id) === current.version) ? current : seen;
}

function reasonOf(error: unknown): string {
  if (!(error instanceof ApiError)) return "Something went wrong.";
  return error.errors[0]?.msg ?? error.message;
}

/** Until the browser says so, or for five seconds. */
async function reconnected(signal: AbortSignal): Promise<void> {
  const waking = new AbortController();
  window.addEventListener("online", () => waking.abort(), { signal: AbortSignal.any([signal, waking.signal]) });
  await sleep(navigator.onLine ? 1_000 : 5_000, AbortSignal.any([signal, waking.signal])).catch(() => signal.throwIfAborted());
}
