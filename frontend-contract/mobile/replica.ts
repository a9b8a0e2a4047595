/** One person's tasks on a phone: readable and editable without a network, and in the end what the server has. */
import { AnotherPerson, ApiError, backoff, type Client, type components, type Data, type paths, type ProblemError, SignedOut, sleep, type Task, type TaskChanges, uuid } from "../client.ts";
import { combined, complete, differing, type Edit, type Members, members, merged, type NewTask, shown } from "./edits.ts";
import type { Store } from "./store.ts";

/** What could not be done as the person wanted, kept until they decide. */
export interface Offer {
  id: string;
  /** `changed`: somebody else was first, and theirs stands. `deleted`: the task is gone. `refused`: `errors` says why. */
  reason: "changed" | "deleted" | "refused";
  /** What they wanted. */
  changes: Partial<Members>;
  errors: readonly ProblemError[];
}

export interface Shown extends Task {
  /** Not yet known to be at the server. */
  pending: boolean;
}

/** There is no such task here. */
export class NotHere extends Error {
  override readonly name = "NotHere";
}

type Operation = components["schemas"]["Batch"]["operations"][number];

/** A request that was, or is about to be, sent: the same each time, under the same key, until its answer is known. */
interface Shipment {
  key: string;
  operations: Operation[];
  /** The numbers of the writes that it carries. */
  writes: number[];
  /** What was answered. It stays until the change feed, which tells what became of it, has been read to the end. */
  answer: "done" | "refused" | null;
}

interface State {
  person: string;
  /** Of the change feed; null: from the start. */
  token: string | null;
  /** Counts the readings from the start. Tasks that the present one has not brought go when it ends. */
  reading: number;
  complete: boolean;
  nextWrite: number;
  shipment: Shipment | null;
}

type Feed = Data<paths["/api/v1/tasks/changes"]["get"]>;
type Changes = Map<string, unknown>;

const LARGEST = 100;
/** Characters; at most three bytes each, which keeps below the 1 MiB that a batch may have. */
const LONGEST = 300_000;
/** Refusals in a row that change nothing here: then something else is wrong. */
const PATIENCE = 50;

export class Replica {
  #client: Client;
  readonly #store: Store;
  #state!: State;
  readonly #tasks = new Map<string, { task: Task; reading: number }>();
  readonly #writes = new Map<number, Edit>();
  readonly #offers = new Map<string, Offer>();
  #turn: Promise<unknown> = Promise.resolve();
  #syncing: Promise<void> | null = null;
  #shown: ReadonlyMap<string, Shown> | null = null;
  readonly #listeners = new Set<() => void>();

  private constructor(client: Client, store: Store) {
    this.#client = client;
    this.#store = store;
  }

  /**
   * What the store has of this person. A store for each person keeps their edits apart.
   *
   * client: with `session.tokenOf(person)`, so that edits cannot be sent as a different person.
   * Throws AnotherPerson when the store holds the data of another person.
   */
  static async open({ client, store, person }: { client: Client; store: Store; person: string }): Promise<Replica> {
    const replica = new Replica(client, store);
    const kept = [...(await store.load())];
    // In the order of their numbers, which for writes is that in which they were made.
    kept.sort(([one], [other]) => one.localeCompare(other, "en", { numeric: true }));
    for (const [key, text] of kept) replica.#apply(key, JSON.parse(text));
    replica.#state ??= { person, token: null, reading: 1, complete: false, nextWrite: 1, shipment: null };
    if (replica.#state.person !== person) throw new AnotherPerson("the store belongs to a different person");
    return replica;
  }

  /** All tasks as the person left them, in no order; the same object until something changes. */
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

  offers(): Offer[] {
    return [...this.#offers.values()];
  }

  /** How many edits have not been answered yet. */
  get unsent(): number {
    return this.#writes.size;
  }

  /** Call `listener` after each change; returns what ends that. */
  subscribe(listener: () => void): () => void {
    this.#listeners.add(listener);
    return () => void this.#listeners.delete(listener);
  }

  /** Kept when the promise resolves, whatever happens to the app then. Returns the id, which is for good. */
  async create(task: NewTask): Promise<string> {
    const id = uuid();
    await this.#change(() => this.#queue({ op: "create", id, task: complete(task) }));
    return id;
  }

  /** Throws NotHere. */
  async update(id: string, changes: TaskChanges): Promise<void> {
    await this.#change(() => {
      const task = this.#find(id);
      const wanted = differing(task, members(changes));
      const base = Object.fromEntries(Object.keys(wanted).map((name) => [name, task[name as keyof Members]]));
      return Object.keys(wanted).length ? this.#queue({ op: "update", id, changes: wanted, base }) : new Map();
    });
  }

  /** Throws NotHere. */
  async delete(id: string): Promise<void> {
    await this.#change(() => {
      this.#find(id);
      return this.#queue({ op: "delete", id }).set(`offer/${id}`, null);
    });
  }

  /** Do what was not done, over what others did; a task that is gone is made anew. */
  async accept(offer: Offer): Promise<void> {
    if (this.tasks().has(offer.id)) await this.update(offer.id, offer.changes);
    else await this.create({ title: "", ...offer.changes });
    await this.dismiss(offer);
  }

  async dismiss({ id }: Pick<Offer, "id">): Promise<void> {
    await this.#change(() => new Map([[`offer/${id}`, null]]));
  }

  /**
   * After an anonymous person's account was linked: tasks and edits belong to the new account from now on.
   *
   * client: for the new account, since the previous one throws AnotherPerson from now on.
   */
  async adopt(person: string, client: Client): Promise<void> {
    await this.#change(() => new Map([["state", { ...this.#state, person }]]));
    this.#client = client;
  }

  /**
   * Fetch what others did, send what was done here, until both sides are equal. One at a time: who calls meanwhile waits
   * for it.
   *
   * Throws what the client throws; then nothing is lost, and the next call goes on from there.
   */
  sync({ signal }: { signal?: AbortSignal } = {}): Promise<void> {
    this.#syncing ??= this.#sync(signal).finally(() => (this.#syncing = null));
    return this.#syncing;
  }

  /** Sync after each edit, and every `every` milliseconds, until aborted. Throws SignedOut, AnotherPerson, and ApiError for good. */
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
    for (let refusals = 0; ; ) {
      await this.#pull(signal);
      const shipment = await this.#load();
      if (!shipment) return;
      const sent = await this.#send(shipment, signal);
      refusals = sent ? 0 : refusals + 1;
      if (refusals > PATIENCE) throw new Error("the server keeps refusing what it should accept");
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
        const lost = error instanceof ApiError && ["sync_token_expired", "invalid_sync_token"].includes(error.code);
        if (!lost || token === null) throw error;
        const reading = this.#state.reading + 1;
        await this.#change(() => new Map([["state", { ...this.#state, token: null, reading, complete: false }]]));
        continue;
      }
      more = feed.more;
      await this.#change(() => this.#take(feed));
    }
  }

  /** A page of the feed, with all that follows from it. */
  #take({ items, next, more }: Feed): Changes {
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

  /** The request to send next: the one that was sent before if its answer is not known; none if there is nothing to say. */
  async #load(): Promise<Shipment | null> {
    await this.#change(() => {
      if (this.#state.shipment) return new Map();
      const changes: Changes = new Map();
      const operations: Operation[] = [];
      const writes: number[] = [];
      const seen = new Set<string>();
      let length = 0;
      for (const [number, edit] of this.#writes) {
        // The second edit of a task is decided on when it is known what the first has made of it.
        if (seen.has(edit.id)) continue;
        const operation = this.#operation(number, edit, changes);
        if (!operation) continue;
        length += JSON.stringify(operation).length;
        if (operations.length && (operations.length === LARGEST || length > LONGEST)) break;
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

  /** An edit as it has to be sent now that the server's side is known; nothing when there is nothing left of it. */
  #operation(number: number, edit: Edit, changes: Changes): Operation | null {
    const current = this.#tasks.get(edit.id)?.task;
    if (edit.op === "create" && !current) return { op: "create", id: edit.id, task: edit.task };
    if (edit.op === "delete" && current) return { op: "delete", id: edit.id };
    if (edit.op === "update" && current) {
      const { send, lost } = merged(current, edit);
      if (Object.keys(lost).length) this.#offer(changes, { id: edit.id, reason: "changed", changes: lost, errors: [] });
      if (Object.keys(send).length) {
        // What was given up is not to be shown any longer.
        changes.set(`write/${number}`, { ...edit, changes: send });
        return { op: "update", id: edit.id, changes: send, if_match: `"${current.version}"` };
      }
    }
    if (edit.op === "update" && !current) {
      this.#offer(changes, { id: edit.id, reason: "deleted", changes: { ...edit.base, ...edit.changes }, errors: [] });
    }
    // Otherwise it is as it should be: made already, gone already, changed to just that already.
    changes.set(`write/${number}`, null);
    return null;
  }

  /** Whether it was done. If not, what stood in the way is out of it, or will be after the next look at the feed. */
  async #send(shipment: Shipment, signal: AbortSignal | undefined): Promise<boolean> {
    try {
      await this.#client.POST("/api/v1/tasks/batch", {
        params: { header: { "Idempotency-Key": shipment.key } },
        body: { operations: shipment.operations },
        ...(signal && { signal }),
      });
    } catch (error) {
      if (!(error instanceof ApiError) || ![404, 412, 422].includes(error.status)) throw error;
      await this.#change(() => this.#refused(shipment, error));
      return false;
    }
    await this.#change(() => new Map([["state", { ...this.#state, shipment: { ...shipment, answer: "done" } }]]));
    return true;
  }

  #refused(shipment: Shipment, error: ApiError): Changes {
    const changes: Changes = new Map([["state", { ...this.#state, shipment: { ...shipment, answer: "refused" } }]]);
    const loc = error.errors[0]?.loc ?? [];
    const number = loc[1] === "operations" ? shipment.writes[Number(loc[2])] : undefined;
    const edit = number === undefined ? undefined : this.#writes.get(number);
    if (!edit) return changes;
    if (error.status === 422) {
      const wanted = edit.op === "create" ? edit.task : edit.op === "update" ? edit.changes : {};
      this.#offer(changes, { id: edit.id, reason: "refused", changes: wanted, errors: error.errors });
      changes.set(`write/${number}`, null);
    } else if (edit.op !== "update") {
      // To be made, and there already or in the bin by now; to be deleted, and gone for good. Both have happened.
      changes.set(`write/${number}`, null);
    }
    return changes;
  }

  /** Behind what is there, or into the edit of the same task that has not been sent. */
  #queue(edit: Edit): Changes {
    const sent = new Set(this.#state.shipment?.writes);
    const waiting = [...this.#writes].find(([number, { id }]) => id === edit.id && !sent.has(number));
    const number = this.#state.nextWrite;
    const changes: Changes = new Map([["state", { ...this.#state, nextWrite: number + 1 }]]);
    if (!waiting) return changes.set(`write/${number}`, edit);
    return changes.set(`write/${waiting[0]}`, combined(waiting[1], edit));
  }

  #offer(changes: Changes, offer: Offer): void {
    const earlier = this.#offers.get(offer.id)?.changes;
    changes.set(`offer/${offer.id}`, { ...offer, changes: { ...earlier, ...offer.changes } });
  }

  #find(id: string): Shown {
    const task = this.tasks().get(id);
    if (!task) throw new NotHere("there is no such task here");
    return task;
  }

  /** One change after the other, each decided on what the last one left, and seen here only when it is kept. */
  #change(decide: () => Changes): Promise<void> {
    const mine = this.#turn.then(async () => {
      const changes = decide();
      if (!changes.size) return;
      const texts = [...changes].map(([key, value]) => [key, value === null ? null : JSON.stringify(value)] as const);
      await this.#store.commit(new Map(texts));
      for (const [key, value] of changes) this.#apply(key, value);
      for (const listener of this.#listeners) listener();
    });
    this.#turn = mine.catch(() => {});
    return mine;
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
