/** One sync with local and remote changes, in which the network fails at each request in turn. */
import assert from "node:assert/strict";
import { type Client, type components, createClient, pages, type Task, type TokenSource, uuid } from "../../client.ts";
import { Replica } from "../replica.ts";
import type { Store } from "../store.ts";
import { essence, type Fetch, Flash, torn } from "./world.ts";

/** Points of a request at which the network fails. `dies`: the app is killed, too, and restarted from its store. */
export const FAULTS = ["before it is sent", "before its response", "in the middle of its response"].flatMap((when) =>
  [false, true].map((dies) => ({ when, dies })),
);
export type Fault = (typeof FAULTS)[number];

class Lost extends TypeError {}

/** A network that fails at the requests whose numbers are in `plan`. Records all requests. */
export class Network {
  readonly requests: string[] = [];
  readonly #fetch: Fetch;
  readonly #plan: ReadonlyMap<number, Fault>;
  /** Called when the app is killed. */
  die = () => {};

  constructor(fetch: Fetch, plan: ReadonlyMap<number, Fault>) {
    this.#fetch = fetch;
    this.#plan = plan;
  }

  /** Number of planned faults that have occurred. */
  get struck(): number {
    return [...this.#plan.keys()].filter((number) => number < this.requests.length).length;
  }

  readonly fetch: Fetch = async (input, init) => {
    const fault = this.#plan.get(this.requests.length);
    this.requests.push(`${init?.method ?? "GET"} ${new URL(input).pathname}`);
    if (fault?.when === "before it is sent") throw this.#lost(fault);
    const response = await this.#fetch(input, init);
    if (!fault) return response;
    if (fault.when === "before its response") {
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
  /** Creates the phone's token source, which uses the given network. */
  session(fetch: Fetch): TokenSource;
  /** Another device of the same user, always online. */
  web: Client;
  /** The phone's store, kept between journeys. */
  flash: Flash;
  /** Number of tasks created remotely, more than fit on a page. */
  news: number;
}

/**
 * Makes edits offline and remote changes, then syncs until it succeeds. Returns the requests.
 *
 * Asserts that every edit was applied once, and that phone and server are equal.
 */
export async function journey({ baseUrl, fetch, session, web, flash, news }: Place, plan: ReadonlyMap<number, Fault> = new Map()): Promise<string[]> {
  const network = new Network(fetch, plan);
  let app = { alive: true };
  network.die = () => void (app.alive = false);

  const start = () => {
    const thisApp = (app = { alive: true });
    const store: Store = {
      load: flash.load,
      async commit(changes) {
        if (!thisApp.alive) throw new Lost("the app was killed");
        await flash.commit(changes);
      },
    };
    const source = session(network.fetch);
    // Request a new token each time, so that the token request also fails at every point.
    const token: TokenSource = { ...source, token: (options) => (source.clear(), source.token(options)) };
    return Replica.open({ client: createClient({ baseUrl, token, fetch: network.fetch, retries: 0 }), store, person: "p" });
  };

  const mark = uuid();
  const made = async (title: string) => (await web.POST("/api/v1/tasks", { body: { title: `${title} ${mark}` } })).data;
  const [shared, rival, doomed, gone] = [await made("shared"), await made("rival"), await made("doomed"), await made("gone")];
  const patch = (id: string, body: object) => web.PATCH("/api/v1/tasks/{id}", { params: { path: { id } }, body });

  const offline = await Replica.open({ client: web, store: flash, person: "p" });
  await offline.sync();
  const fresh = await offline.create({ title: `fresh ${mark}`, tags: ["a"] });
  await offline.update(shared.id, { priority: "high" });
  await offline.update(rival.id, { title: `ours ${mark}` });
  await offline.update(gone.id, { title: `too late ${mark}` });
  await offline.delete(doomed.id);
  await patch(shared.id, { description: "theirs" });
  await patch(rival.id, { title: `theirs ${mark}` });
  await web.DELETE("/api/v1/tasks/{id}", { params: { path: { id: gone.id } } });
  await inBatches(web, Array.from({ length: news }, (_, i) => ({ op: "create", task: { title: `news ${i}` } })));

  let phone = await start();
  for (let attempt = 0; ; attempt++) {
    assert.ok(attempt <= plan.size, "a sync fails once per planned fault at most");
    try {
      await phone.sync();
      break;
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      if (!app.alive) phone = await start();
    }
  }

  assert.equal(network.struck, plan.size, "every planned fault must occur");
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
  return network.requests;
}

async function inBatches(web: Client, operations: components["schemas"]["Batch"]["operations"]): Promise<void> {
  for (let at = 0; at < operations.length; at += 100) {
    await web.POST("/api/v1/tasks/batch", { body: { operations: operations.slice(at, at + 100) } });
  }
}

/** Runs a journey for each request and fault. Returns the requests of a journey without faults. */
export async function everyPhase(place: () => Place, faults: readonly Fault[], report: (phase: string) => void): Promise<string[]> {
  const requests = await journey(place());
  for (const [number, request] of requests.entries()) {
    for (const fault of faults) {
      report(`${request} (${number}) fails ${fault.when}${fault.dies ? ", and the app is killed" : ""}`);
      await journey(place(), new Map([[number, fault]]));
    }
  }
  return requests;
}
