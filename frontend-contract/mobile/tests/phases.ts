/** One sync of a phone that has much to say and much to hear, with the network failing at each of its requests in turn. */
import assert from "node:assert/strict";
import { type Client, type components, createClient, pages, type Task, type TokenSource, uuid } from "../../client.ts";
import { Replica } from "../replica.ts";
import type { Store } from "../store.ts";
import { essence, type Fetch, Flash, torn } from "./world.ts";

/** When it fails, seen from the request; `dies`: the app does, too, and starts again with what it has kept. */
export const FAULTS = ["before it is sent", "before its answer", "in the middle of its answer"].flatMap((when) =>
  [false, true].map((dies) => ({ when, dies })),
);
export type Fault = (typeof FAULTS)[number];

class Lost extends TypeError {}

/** A network that fails at the requests that `plan` names by their numbers; what was asked for, in order. */
export class Network {
  readonly asked: string[] = [];
  readonly #fetch: Fetch;
  readonly #plan: ReadonlyMap<number, Fault>;
  /** Told that the app dies. */
  die = () => {};

  constructor(fetch: Fetch, plan: ReadonlyMap<number, Fault>) {
    this.#fetch = fetch;
    this.#plan = plan;
  }

  /** How many of the planned faults have struck. */
  get struck(): number {
    return [...this.#plan.keys()].filter((number) => number < this.asked.length).length;
  }

  readonly fetch: Fetch = async (input, init) => {
    const fault = this.#plan.get(this.asked.length);
    this.asked.push(`${init?.method ?? "GET"} ${new URL(input).pathname}`);
    if (fault?.when === "before it is sent") throw this.#lost(fault);
    const response = await this.#fetch(input, init);
    if (!fault) return response;
    if (fault.when === "before its answer") {
      await response.body?.cancel();
      throw this.#lost(fault);
    }
    return torn(response, () => this.#lost(fault));
  };

  #lost({ when, dies }: Fault): Lost {
    if (dies) this.die();
    return new Lost(when);
  }
}

export interface Place {
  baseUrl: string;
  /** The real network. */
  fetch: Fetch;
  /** How this phone gets its tokens, over its own network. */
  session(fetch: Fetch): TokenSource;
  /** Another device of the same person, always online. */
  web: Client;
  /** What the phone remembers from one journey to the next. */
  flash: Flash;
  /** How many tasks are made elsewhere meanwhile: more than go on a page. */
  news: number;
}

/**
 * Edits without a network, edits elsewhere, then sync until it is done. What was asked for of the network.
 *
 * Whatever fails on the way: all is done, once, and the phone is what the server is.
 */
export async function journey({ baseUrl, fetch, session, web, flash, news }: Place, plan: ReadonlyMap<number, Fault> = new Map()): Promise<string[]> {
  const network = new Network(fetch, plan);
  let alive = { yet: true };
  network.die = () => void (alive.yet = false);

  const start = () => {
    const mine = (alive = { yet: true });
    const store: Store = {
      load: flash.load,
      async commit(changes) {
        if (!mine.yet) throw new Lost("the app is dead");
        await flash.commit(changes);
      },
    };
    const source = session(network.fetch);
    // A new one for each request: so the swap, too, fails at every point.
    const token: TokenSource = { ...source, token: (options) => (source.clear(), source.token(options)) };
    return Replica.open({ client: createClient({ baseUrl, token, fetch: network.fetch, retries: 0 }), store, person: "p" });
  };

  const mark = uuid();
  const made = async (title: string) => (await web.POST("/api/v1/tasks", { body: { title: `${title} ${mark}` } })).data;
  const [shared, rival, doomed, gone] = [await made("shared"), await made("rival"), await made("doomed"), await made("gone")];
  const patch = (id: string, body: object) => web.PATCH("/api/v1/tasks/{id}", { params: { path: { id } }, body });

  const calm = await Replica.open({ client: web, store: flash, person: "p" });
  await calm.sync();
  const fresh = await calm.create({ title: `fresh ${mark}`, tags: ["a"] });
  await calm.update(shared.id, { priority: "high" });
  await calm.update(rival.id, { title: `ours ${mark}` });
  await calm.update(gone.id, { title: `too late ${mark}` });
  await calm.delete(doomed.id);
  await patch(shared.id, { description: "theirs" });
  await patch(rival.id, { title: `theirs ${mark}` });
  await web.DELETE("/api/v1/tasks/{id}", { params: { path: { id: gone.id } } });
  await inBatches(web, Array.from({ length: news }, (_, i) => ({ op: "create", task: { title: `news ${i}` } })));

  let phone = await start();
  for (let attempt = 0; ; attempt++) {
    assert.ok(attempt <= plan.size, "a failure is over when it is over");
    try {
      await phone.sync();
      break;
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      if (!alive.yet) phone = await start();
    }
  }

  assert.equal(network.struck, plan.size, "a fault that did not strike shows nothing");
  const server = new Map<string, Task>();
  for await (const task of pages(web, "/api/v1/tasks", { limit: 100 })) server.set(task.id, task);
  assert.deepEqual(essence(phone.tasks()), essence(server));
  assert.equal(phone.unsent, 0);
  const titled = [...server.values()].filter(({ title }) => title.endsWith(mark)).map(({ title }) => title.split(" ")[0]);
  assert.deepEqual(titled.sort(), ["fresh", "shared", "theirs"]);
  assert.deepEqual(server.get(fresh)!.tags, ["a"]);
  const both = server.get(shared.id)!;
  assert.deepEqual([both.priority, both.description, both.version], ["high", "theirs", 3]);
  const offers = phone.offers().map(({ id, reason, changes }) => [id, reason, changes.title]);
  const expected = [[rival.id, "changed", `ours ${mark}`], [gone.id, "deleted", `too late ${mark}`]];
  assert.deepEqual(offers.sort(), expected.sort());
  for (const offer of phone.offers()) await phone.dismiss(offer);
  await inBatches(web, [...server.keys()].map((id) => ({ op: "delete", id })));
  return network.asked;
}

async function inBatches(web: Client, operations: components["schemas"]["Batch"]["operations"]): Promise<void> {
  for (let at = 0; at < operations.length; at += 100) {
    await web.POST("/api/v1/tasks/batch", { body: { operations: operations.slice(at, at + 100) } });
  }
}

/** Each request of a sync, failing in each of these ways. What is asked for when none fails. */
export async function everyPhase(place: () => Place, faults: readonly Fault[], report: (phase: string) => void): Promise<string[]> {
  const asked = await journey(place());
  for (const [number, request] of asked.entries()) {
    for (const fault of faults) {
      report(`${request} (${number}) fails ${fault.when}${fault.dies ? ", and the app dies" : ""}`);
      await journey(place(), new Map([[number, fault]]));
    }
  }
  return asked;
}
