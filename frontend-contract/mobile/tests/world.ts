/** A randomized simulation: two phones and another client of one user, network failures, and apps killed at any time. */
import assert from "node:assert/strict";
import { ApiError, type Client, createClient, pages, type Task, type TokenSource } from "../../client.ts";
import { MEMBERS } from "../edits.ts";
import { NotHere, Replica } from "../replica.ts";
import type { Store } from "../store.ts";

export type Fetch = (input: string, init?: RequestInit) => Promise<Response>;

/** A seeded random generator (mulberry32). */
export function generator(seed: number) {
  const next = () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  return { chance: (p: number) => next() < p, pick: <T>(from: readonly T[]): T => from[Math.floor(next() * from.length)]! };
}

type Chance = ReturnType<typeof generator>;

class Killed extends Error {}

/** Number of occurrences of each fault, to assert that the simulations cover all of them. */
export const faults: Record<string, number> = {};
const countFault = (name: string) => void (faults[name] = (faults[name] ?? 0) + 1);

/** A response whose body fails after the first half. */
export async function torn(response: Response, error: () => Error): Promise<Response> {
  const bytes = new Uint8Array(await response.arrayBuffer());
  const half = new ReadableStream<Uint8Array>({
    start: (arrives) => arrives.enqueue(bytes.slice(0, bytes.length / 2)),
    pull: (arrives) => arrives.error(error()),
  });
  return new Response(half, { status: response.status, headers: response.headers });
}

/** A store that survives when the app is killed. */
export class Flash implements Store {
  readonly entries = new Map<string, string>();
  load = async () => new Map(this.entries);
  commit = async (changes: ReadonlyMap<string, string | null>) => {
    for (const [key, value] of changes) value === null ? this.entries.delete(key) : this.entries.set(key, value);
  };
}

export class Phone {
  readonly flash = new Flash();
  /** The member that only this phone edits: its last value must reach the server. */
  readonly own: "description" | "priority";
  readonly wanted = new Map<string, unknown>();
  replica!: Replica;
  online = true;
  faultRate = 0.25;
  #starting: Promise<void> | null = null;
  readonly #chance: Chance;
  readonly #fetch: Fetch;
  readonly #options: { baseUrl: string; token: TokenSource };

  constructor(own: Phone["own"], chance: Chance, fetch: Fetch, options: { baseUrl: string; token: TokenSource }) {
    this.own = own;
    this.#chance = chance;
    this.#fetch = fetch;
    this.#options = options;
  }

  /** Starts the app with the stored data. The previous app can no longer send or store anything. */
  async start(): Promise<void> {
    const life = { over: false };
    this.kill = () => void (life.over = true);
    const die = (where: string) => {
      countFault(`killed ${where}`);
      life.over = true;
      throw new Killed();
    };
    const alive = () => {
      if (life.over) throw new Killed();
    };
    const fault = (p: number) => this.faultRate > 0 && this.#chance.chance(p * this.faultRate);
    const store: Store = {
      load: this.flash.load,
      commit: async (changes) => {
        alive();
        if (fault(0.1)) die("before it was stored");
        await this.flash.commit(changes);
        if (fault(0.1)) die("after it was stored");
      },
    };
    const fetch: Fetch = async (input, init) => {
      alive();
      if (!this.online || fault(0.5)) {
        countFault("lost before the request");
        throw new TypeError("network");
      }
      if (fault(0.2)) die("before the request");
      const response = await this.#fetch(input, init);
      alive();
      if (fault(0.5)) {
        countFault("lost after the server acted");
        throw new TypeError("network");
      }
      if (fault(0.2)) die("after the server acted");
      if (fault(0.3)) {
        countFault("lost in the middle of the response");
        return torn(response, () => new TypeError("network"));
      }
      return response;
    };
    const client = createClient({ ...this.#options, fetch, retries: 0 });
    this.replica = await Replica.open({ client, store, person: "p" });
  }

  kill = () => {};

  /** Whether a batch may have been sent whose response is unknown. */
  get inDoubt(): boolean {
    return Boolean(JSON.parse(this.flash.entries.get("state") ?? "{}").shipment);
  }

  /** Runs `work` and returns whether it succeeded. Restarts the app if it is killed meanwhile. */
  async attempt(work: (replica: Replica) => Promise<unknown>): Promise<boolean> {
    const { replica } = this;
    try {
      await work(replica);
      return true;
    } catch (error) {
      // Several calls may fail when the app is killed; restart it only once.
      if (error instanceof Killed && replica === this.replica) await (this.#starting ??= this.start().finally(() => (this.#starting = null)));
      else if (!(error instanceof Killed || error instanceof TypeError || error instanceof NotHere)) throw error;
      return false;
    }
  }
}

export class World {
  readonly chance: Chance;
  readonly phones: readonly [Phone, Phone];
  readonly web: Client;
  readonly made = new Set<string>();
  readonly deleted = new Set<string>();
  readonly titles = new Map<string, Set<string>>();
  #names = 0;

  constructor(seed: number, fetch: Fetch, options: { baseUrl: string; token: TokenSource }) {
    this.chance = generator(seed);
    this.phones = [new Phone("description", this.chance, fetch, options), new Phone("priority", this.chance, fetch, options)];
    this.web = createClient({ ...options, fetch });
  }

  async run(steps: number, events: readonly (() => void)[] = []): Promise<void> {
    for (const phone of this.phones) await phone.start();
    for (let i = 0; i < steps; i++) {
      const phone = this.chance.pick(this.phones);
      const sync = this.chance.chance(0.5) ? phone.attempt((replica) => replica.sync()) : null;
      for (const act of [this.#create, this.#update, this.#update, this.#delete, this.#changeRemotely]) {
        if (this.chance.chance(0.3)) await act.call(this, this.chance.pick(this.phones));
      }
      await sync;
      if (this.chance.chance(0.1)) phone.online = !phone.online;
      if (this.chance.chance(0.05)) {
        phone.kill();
        await phone.start();
      }
      if (events.length && this.chance.chance(0.05)) this.chance.pick(events)();
    }
    await this.#converge();
  }

  async #create(phone: Phone): Promise<void> {
    const before = new Set(phone.replica.tasks().keys());
    const title = this.#title();
    await phone.attempt((replica) => replica.create({ title, [phone.own]: this.#value(phone) }));
    const mine = [...phone.replica.tasks().values()].filter((task) => !before.has(task.id) && task.title === title);
    for (const task of mine) {
      this.made.add(task.id);
      this.#note(task.id, title);
      phone.wanted.set(task.id, task[phone.own]);
    }
  }

  async #update(phone: Phone): Promise<void> {
    const id = this.#some(phone);
    if (!id) return;
    const title = this.chance.chance(0.5) ? { title: this.#title() } : {};
    if (title.title) this.#note(id, title.title);
    await phone.attempt((replica) => replica.update(id, { ...title, [phone.own]: this.#value(phone) }));
    const task = phone.replica.tasks().get(id);
    if (task) phone.wanted.set(id, task[phone.own]);
  }

  async #delete(phone: Phone): Promise<void> {
    const id = this.#some(phone);
    if (!id || !this.chance.chance(0.4)) return;
    await phone.attempt((replica) => replica.delete(id));
    if (!phone.replica.tasks().has(id)) this.deleted.add(id);
  }

  /** Changes a task with the other client, whose network does not fail. */
  async #changeRemotely(): Promise<void> {
    const tasks = await this.#remoteTasks();
    const task = this.chance.pick([...tasks.values()]);
    if (!task || this.chance.chance(0.3)) {
      const { data } = await this.web.POST("/api/v1/tasks", { body: { title: this.#title() } });
      this.made.add(data.id);
      this.#note(data.id, data.title);
    } else if (this.chance.chance(0.8)) {
      const title = this.#title();
      this.#note(task.id, title);
      const body = { title, tags: [title.slice(0, 3)], due_at: "2030-01-01T00:00:00Z" };
      await this.web.PATCH("/api/v1/tasks/{id}", { params: { path: { id: task.id } }, body }).catch(unlessGone);
    } else {
      await this.web.DELETE("/api/v1/tasks/{id}", { params: { path: { id: task.id } } }).catch(unlessGone);
      this.deleted.add(task.id);
    }
  }

  /** Syncs without faults. Asserts that phones and server are equal, and that all stored edits have arrived. */
  async #converge(): Promise<void> {
    for (const phone of this.phones) Object.assign(phone, { online: true, faultRate: 0 });
    for (const phone of [...this.phones, ...this.phones]) assert.ok(await phone.attempt((replica) => replica.sync()));
    const server = await this.#remoteTasks();
    for (const { replica, own, wanted } of this.phones) {
      assert.equal(replica.unsent, 0);
      assert.deepEqual(essence(replica.tasks()), essence(server));
      for (const [id, value] of wanted) if (server.has(id)) assert.equal(server.get(id)![own], value, `${own} of ${id}`);
      assert.deepEqual(replica.offers().filter(({ reason }) => reason === "refused"), []);
    }
    assert.deepEqual([...server.keys()].sort(), [...this.made].filter((id) => !this.deleted.has(id)).sort());
    for (const [id, { title }] of server) assert.ok(this.titles.get(id)!.has(title));
  }

  async #remoteTasks(): Promise<Map<string, Task>> {
    const tasks = new Map<string, Task>();
    for await (const task of pages(this.web, "/api/v1/tasks", { limit: 100 })) tasks.set(task.id, task);
    return tasks;
  }

  #some = (phone: Phone) => this.chance.pick([...phone.replica.tasks().keys()]);
  #title = () => `t${++this.#names}`;
  #note = (id: string, title: string) => void this.titles.set(id, (this.titles.get(id) ?? new Set()).add(title));
  #value = (phone: Phone) => (phone.own === "priority" ? this.chance.pick(["low", "normal", "high", "urgent"] as const) : `d${++this.#names}`);
}

/** Ignores a 404: a phone may have just deleted the task. */
function unlessGone(error: unknown): void {
  if (!(error instanceof ApiError && error.status === 404)) throw error;
}

export function essence(tasks: ReadonlyMap<string, Task>) {
  const rows = [...tasks.values()].map((task) => [task.id, task.version, ...MEMBERS.map((name) => task[name])]);
  return rows.sort(([one], [other]) => (one! < other! ? -1 : 1));
}
