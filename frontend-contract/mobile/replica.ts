/** A local copy of a user's tasks that can be read and edited offline and is synchronized with the server. */
import { AnotherPerson, ApiError, backoff, type Client, type components, type Data, type paths, type ProblemError, SignedOut, sleep, type Task, type TaskChanges, uuid } from "../client.ts";
import { combined, complete, differing, type Edit, type Members, members, merged, type NewTask, shown } from "./edits.ts";
import type { Store } from "./store.ts";

/** A local edit that could not be applied. Kept until the user accepts or dismisses it. */
export interface Offer {
  id: string;
  /**
   * `changed`: the members were also changed remotely, and the remote values were kept. `deleted`: the task was deleted
   * remotely. `refused`: the API rejected the edit; see `errors`.
   */
  reason: "changed" | "deleted" | "refused";
  /** The local values that were not applied. */
  changes: Partial<Members>;
  errors: readonly ProblemError[];
}

export interface Shown extends Task {
  /** Whether an edit has not been confirmed by the server. */
  pending: boolean;
}

/** The replica has no task with this id. */
export class NotHere extends Error {
  override readonly name = "NotHere";
}

type Operation = components["schemas"]["Batch"]["operations"][number];

/** A batch request that may have been sent. Repeated unchanged, with the same key, until the response is known. */
interface Shipment {
  key: string;
  operations: Operation[];
  /** The numbers of the edits in this batch. */
  writes: number[];
  /** The outcome. The shipment is kept until the change feed, which contains its effects, has been read to the end. */
  answer: "done" | "refused" | null;
}

interface State {
  person: string;
  /** Sync token of the change feed; null: read from the start. */
  token: string | null;
  /** Number of full reads of the feed. When one ends, tasks that it did not contain are removed. */
  reading: number;
  complete: boolean;
  nextWrite: number;
  shipment: Shipment | null;
}

type Feed = Data<paths["/api/v1/tasks/changes"]["get"]>;
type Changes = Map<string, unknown>;

const MAX_OPERATIONS = 100;
/** Characters of a batch. Each takes at most three bytes, and a batch may have 1 MiB. */
const MAX_LENGTH = 300_000;
/** Rejected batches in a row after which `sync` gives up. */
const MAX_REJECTIONS = 50;

export class Replica {
  #client: Client;
  readonly #store: Store;
  #state!: State;
  readonly #tasks = new Map<string, { task: Task; reading: number }>();
  readonly #writes = new Map<number, Edit>();
  readonly #offers = new Map<string, Offer>();
  #lastCommit: Promise<unknown> = Promise.resolve();
  #syncing: Promise<void> | null = null;
  #shown: ReadonlyMap<string, Shown> | null = null;
  readonly #listeners = new Set<() => void>();

  private constructor(client: Client, store: Store) {
    this.#client = client;
    this.#store = store;
  }

  /**
   * Opens the replica in a store. Use one store per user.
   *
   * client: created with `session.tokenOf(person)`, so that edits cannot be sent as a different user.
   * person: the user's id.
   * Throws AnotherPerson if the store contains another user's data.
   */
  static async open({ client, store, person }: { client: Client; store: Store; person: string }): Promise<Replica> {
    const replica = new Replica(client, store);
    const stored = [...(await store.load())];
    // Order edits by number, that is, in the order in which they were made.
    stored.sort(([one], [other]) => one.localeCompare(other, "en", { numeric: true }));
    for (const [key, text] of stored) replica.#apply(key, JSON.parse(text));
    replica.#state ??= { person, token: null, reading: 1, complete: false, nextWrite: 1, shipment: null };
    if (replica.#state.person !== person) throw new AnotherPerson("the store belongs to a different user");
    return replica;
  }

  /** All tasks with pending edits applied, unordered. Returns the same object until something changes. */
  tasks(): ReadonlyMap<string, Shown> {
    if (!this.#shown) {
      const tasks = new Map<string, Shown>();
      for (const [id, { task }] of this.#tasks) tasks.set(id, { ...task, pending: false });
      for (const edit of this.#writes.values()) {
        const task = shown(tasks.get(edit.id), edit);
        if (task) tasks.set(edit.id, { ...task, pending: true });
        else tasks.delete(edit.id);
      }
      this.#shown = tasks;
    }
    return this.#shown;
  }

  /** The edits that could not be applied. */
  offers(): Offer[] {
    return [...this.#offers.values()];
  }

  /** Number of edits that the server has not confirmed. */
  get unsent(): number {
    return this.#writes.size;
  }

  /** Calls `listener` after each change. Returns a function that unsubscribes. */
  subscribe(listener: () => void): () => void {
    this.#listeners.add(listener);
    return () => void this.#listeners.delete(listener);
  }

  /** Creates a task and returns its permanent id. The edit is stored when the promise resolves. */
  async create(task: NewTask): Promise<string> {
    const id = uuid();
    await this.#commit(() => this.#addEdit({ op: "create", id, task: complete(task) }));
    return id;
  }

  /** Changes members of a task. Throws NotHere. */
  async update(id: string, changes: TaskChanges): Promise<void> {
    await this.#commit(() => {
      const task = this.#find(id);
      const wanted = differing(task, members(changes));
      const base = Object.fromEntries(Object.keys(wanted).map((name) => [name, task[name as keyof Members]]));
      return Object.keys(wanted).length ? this.#addEdit({ op: "update", id, changes: wanted, base }) : new Map();
    });
  }

  /** Deletes a task. Throws NotHere. */
  async delete(id: string): Promise<void> {
    await this.#commit(() => {
      this.#find(id);
      return this.#addEdit({ op: "delete", id }).set(`offer/${id}`, null);
    });
  }

  /** Applies an offer over the remote values. Creates a deleted task again. */
  async accept(offer: Offer): Promise<void> {
    if (this.tasks().has(offer.id)) await this.update(offer.id, offer.changes);
    else await this.create({ title: "", ...offer.changes });
    await this.dismiss(offer);
  }

  /** Discards an offer. */
  async dismiss({ id }: Pick<Offer, "id">): Promise<void> {
    await this.#commit(() => new Map([[`offer/${id}`, null]]));
  }

  /**
   * Moves tasks and edits to another account, after an anonymous account was linked to it.
   *
   * client: for the new account, since the previous client now throws AnotherPerson.
   */
  async adopt(person: string, client: Client): Promise<void> {
    await this.#commit(() => new Map([["state", { ...this.#state, person }]]));
    this.#client = client;
  }

  /**
   * Fetches remote changes and sends local edits until both sides are equal. Concurrent calls share one run.
   *
   * Throws the errors of the client. No edits are lost then, and the next call continues.
   */
  sync({ signal }: { signal?: AbortSignal } = {}): Promise<void> {
    this.#syncing ??= this.#sync(signal).finally(() => (this.#syncing = null));
    return this.#syncing;
  }

  /**
   * Syncs after each edit, and every `every` milliseconds, until `signal` is aborted. Retries after errors.
   *
   * Throws SignedOut, AnotherPerson, and ApiError with status 403.
   */
  async keepSynced({ signal, every = 15_000 }: { signal: AbortSignal; every?: number }): Promise<void> {
    for (let failures = 0; !signal.aborted; ) {
      try {
        await this.sync({ signal });
        failures = 0;
      } catch (error) {
        if (signal.aborted) return;
        if (error instanceof SignedOut || error instanceof AnotherPerson) throw error;
        if (error instanceof ApiError && error.status === 403) throw error;
        failures++;
      }
      if (signal.aborted || (failures === 0 && this.unsent)) continue;
      const rest = new AbortController();
      const wake = () => rest.abort();
      const unsubscribe = this.subscribe(() => void (failures === 0 && this.unsent && wake()));
      signal.addEventListener("abort", wake);
      await sleep(failures ? backoff(failures, 1_000, 60_000) : every, rest.signal).catch(() => {});
      signal.removeEventListener("abort", wake);
      unsubscribe();
    }
  }

  async #sync(signal: AbortSignal | undefined): Promise<void> {
    for (let rejections = 0; ; ) {
      await this.#pull(signal);
      const shipment = await this.#nextShipment();
      if (!shipment) return;
      const sent = await this.#send(shipment, signal);
      rejections = sent ? 0 : rejections + 1;
      if (rejections > MAX_REJECTIONS) throw new Error(`the server rejected ${rejections} batches in a row`);
    }
  }

  async #pull(signal: AbortSignal | undefined): Promise<void> {
    for (let more = true; more; ) {
      const { token } = this.#state;
      let feed: Feed;
      try {
        const params = { query: token === null ? {} : { since: token } };
        feed = (await this.#client.GET("/api/v1/tasks/changes", { params, ...(signal && { signal }) })).data;
      } catch (error) {
        const isTokenLost = error instanceof ApiError && ["sync_token_expired", "invalid_sync_token"].includes(error.code);
        if (!isTokenLost || token === null) throw error;
        const reading = this.#state.reading + 1;
        await this.#commit(() => new Map([["state", { ...this.#state, token: null, reading, complete: false }]]));
        continue;
      }
      more = feed.more;
      await this.#commit(() => this.#applyPage(feed));
    }
  }

  /** The changes of state that follow from a page of the feed. */
  #applyPage({ items, next, more }: Feed): Changes {
    const changes: Changes = new Map();
    if (next === this.#state.token && !items.length && this.#state.complete && !this.#state.shipment) return changes;
    const state = { ...this.#state, token: next };
    for (const task of items) changes.set(`task/${task.id}`, task.deleted_at ? null : { task, reading: state.reading });
    if (!more) {
      if (!state.complete) {
        const stale = [...this.#tasks].filter(([id, { reading }]) => reading < state.reading && !changes.has(`task/${id}`));
        for (const [id] of stale) changes.set(`task/${id}`, null);
      }
      state.complete = true;
      if (state.shipment?.answer === "done") {
        for (const number of state.shipment.writes) changes.set(`write/${number}`, null);
      }
      if (state.shipment?.answer) state.shipment = null;
    }
    return changes.set("state", state);
  }

  /** The batch to send next: the previous one if its response is unknown, else a new one; null without edits to send. */
  async #nextShipment(): Promise<Shipment | null> {
    await this.#commit(() => {
      if (this.#state.shipment) return new Map();
      const changes: Changes = new Map();
      const operations: Operation[] = [];
      const writes: number[] = [];
      const seen = new Set<string>();
      let length = 0;
      for (const [number, edit] of this.#writes) {
        // A second edit of a task depends on the result of the first.
        if (seen.has(edit.id)) continue;
        const operation = this.#operation(number, edit, changes);
        if (!operation) continue;
        length += JSON.stringify(operation).length;
        if (operations.length && (operations.length === MAX_OPERATIONS || length > MAX_LENGTH)) break;
        operations.push(operation);
        writes.push(number);
        seen.add(edit.id);
      }
      if (!operations.length) return changes;
      const shipment: Shipment = { key: uuid(), operations, writes, answer: null };
      return changes.set("state", { ...this.#state, shipment });
    });
    return this.#state.shipment;
  }

  /** The operation for an edit, merged with the remote task; null if nothing is to be sent. Adds offers to `changes`. */
  #operation(number: number, edit: Edit, changes: Changes): Operation | null {
    const current = this.#tasks.get(edit.id)?.task;
    if (edit.op === "create" && !current) return { op: "create", id: edit.id, task: edit.task };
    if (edit.op === "delete" && current) return { op: "delete", id: edit.id };
    if (edit.op === "update" && current) {
      const { send, lost } = merged(current, edit);
      if (Object.keys(lost).length) this.#addOffer(changes, { id: edit.id, reason: "changed", changes: lost, errors: [] });
      if (Object.keys(send).length) {
        // Stop displaying the values that lost.
        changes.set(`write/${number}`, { ...edit, changes: send });
        return { op: "update", id: edit.id, changes: send, if_match: `"${current.version}"` };
      }
    }
    if (edit.op === "update" && !current) {
      this.#addOffer(changes, { id: edit.id, reason: "deleted", changes: { ...edit.base, ...edit.changes }, errors: [] });
    }
    // Otherwise the remote task already has the result of the edit.
    changes.set(`write/${number}`, null);
    return null;
  }

  /** Sends a batch. Returns false if it was rejected; its cause is removed here or by the next read of the feed. */
  async #send(shipment: Shipment, signal: AbortSignal | undefined): Promise<boolean> {
    try {
      await this.#client.POST("/api/v1/tasks/batch", {
        params: { header: { "Idempotency-Key": shipment.key } },
        body: { operations: shipment.operations },
        ...(signal && { signal }),
      });
    } catch (error) {
      if (!(error instanceof ApiError) || ![404, 412, 422].includes(error.status)) throw error;
      await this.#commit(() => this.#reject(shipment, error));
      return false;
    }
    await this.#commit(() => new Map([["state", { ...this.#state, shipment: { ...shipment, answer: "done" } }]]));
    return true;
  }

  #reject(shipment: Shipment, error: ApiError): Changes {
    const changes: Changes = new Map([["state", { ...this.#state, shipment: { ...shipment, answer: "refused" } }]]);
    const loc = error.errors[0]?.loc ?? [];
    const number = loc[1] === "operations" ? shipment.writes[Number(loc[2])] : undefined;
    const edit = number === undefined ? undefined : this.#writes.get(number);
    if (!edit) return changes;
    if (error.status === 422) {
      const wanted = edit.op === "create" ? edit.task : edit.op === "update" ? edit.changes : {};
      this.#addOffer(changes, { id: edit.id, reason: "refused", changes: wanted, errors: error.errors });
      changes.set(`write/${number}`, null);
    } else if (edit.op !== "update") {
      // A create of a task that already exists or is in the trash, or a delete of a purged task: nothing left to do.
      changes.set(`write/${number}`, null);
    }
    return changes;
  }

  /** Adds an edit to the queue, or combines it with an unsent edit of the same task. */
  #addEdit(edit: Edit): Changes {
    const sent = new Set(this.#state.shipment?.writes);
    const waiting = [...this.#writes].find(([number, { id }]) => id === edit.id && !sent.has(number));
    const number = this.#state.nextWrite;
    const changes: Changes = new Map([["state", { ...this.#state, nextWrite: number + 1 }]]);
    if (!waiting) return changes.set(`write/${number}`, edit);
    return changes.set(`write/${waiting[0]}`, combined(waiting[1], edit));
  }

  #addOffer(changes: Changes, offer: Offer): void {
    const earlier = this.#offers.get(offer.id)?.changes;
    changes.set(`offer/${offer.id}`, { ...offer, changes: { ...earlier, ...offer.changes } });
  }

  #find(id: string): Shown {
    const task = this.tasks().get(id);
    if (!task) throw new NotHere("the replica has no task with this id");
    return task;
  }

  /** Applies changes one at a time: `decide` sees the result of earlier ones, and memory is updated after the store. */
  #commit(decide: () => Changes): Promise<void> {
    const commit = this.#lastCommit.then(async () => {
      const changes = decide();
      if (!changes.size) return;
      const texts = [...changes].map(([key, value]) => [key, value === null ? null : JSON.stringify(value)] as const);
      await this.#store.commit(new Map(texts));
      for (const [key, value] of changes) this.#apply(key, value);
      for (const listener of this.#listeners) listener();
    });
    this.#lastCommit = commit.catch(() => {});
    return commit;
  }

  #apply(key: string, value: unknown): void {
    this.#shown = null;
    const [kind, id = ""] = key.split("/");
    if (kind === "state") this.#state = value as State;
    else if (kind === "task") put(this.#tasks, id, value);
    else if (kind === "offer") put(this.#offers, id, value);
    else if (kind === "write") put(this.#writes, Number(id), value);
  }
}

function put<K, V>(map: Map<K, V>, key: K, value: unknown): void {
  if (value === null) map.delete(key);
  else map.set(key, value as V);
}
