/** A Better Auth plugin that tells the API who was banned, signed out, given another role, deleted or merged, at once. */
import type { AuthContext, BetterAuthPlugin, DBAdapter, GenericEndpointContext, Where } from "better-auth";
import { BetterAuthError } from "better-auth";
import { createAuthEndpoint } from "better-auth/api";
import type { AnonymousOptions, JwtOptions } from "better-auth/plugins";
import { signJWT } from "better-auth/plugins";

export interface SecurityEventsOptions {
  /** Where the API takes security events: `https://api.example.com/api/v1/security-events`. */
  endpoint: string;
  /** The API's `SECURITY_EVENTS_AUDIENCE`; `endpoint` unless given. */
  audience?: string;
  /**
   * false where no process lives on between requests (serverless): then nothing is sent again by itself, and a cron job
   * calls `auth.api.deliverSecurityEvents()`.
   */
  timer?: boolean;
}

const RISC = "https://schemas.openid.net/secevent/risc/event-type";
const CAEP = "https://schemas.openid.net/secevent/caep/event-type";
const TYPES = {
  "account-disabled": `${RISC}/account-disabled`,
  "account-enabled": `${RISC}/account-enabled`,
  "account-purged": `${RISC}/account-purged`,
  "account-merged": "urn:better-auth-resource-server:event-type:account-merged",
  "session-revoked": `${CAEP}/session-revoked`,
  "token-claims-change": `${CAEP}/token-claims-change`,
} as const;
type EventType = keyof typeof TYPES;

/** One change that the API has not confirmed yet. */
interface Row {
  jti: string;
  type: EventType;
  userId: string;
  /** The account that an anonymous one became. */
  mergedInto: string | null;
  /** What tells whether the change was made, if this process does not live to say so: the new role, the ended session. */
  sign: string | null;
  /** When the change began: the order in which a person's changes of one lane are told. */
  begunAt: Date;
  /** When the change was made; null while nobody knows that it was. */
  toe: Date | null;
  attempts: number;
  /** When somebody began to send it; null between attempts. */
  claimedAt: Date | null;
  /** Until then the row belongs to whoever makes the change, or sends it, or waits for the next attempt. */
  dueAt: Date;
}

interface User {
  id: string;
  banned?: boolean | null;
  role?: string | null;
}

interface Session {
  id: string;
  userId: string;
  expiresAt: Date;
}

interface Change {
  model: string;
  where: Where[];
  update?: Record<string, unknown>;
}

/**
 * Events that wait for no others, however many of those there are: a ban does not wait for sign-outs. Only a merge waits
 * for other lanes.
 */
class Lane {
  readonly types: EventType[];
  /** The last change says all that the ones before it would. */
  readonly latest: boolean;
  /** The user keeps access until the API knows: a `Retry-After` of a minute is not waited for. */
  readonly urgent: boolean;
  /** People whose events are being sent. */
  sending = 0;
  draining: Promise<void> | undefined;
  /** Something may have become due while the lane was drained. */
  again = false;
  /** Until then the API wants no more events of this lane (429). */
  pausedUntil = 0;

  constructor(types: EventType[], { latest = false, urgent = true } = {}) {
    this.types = types;
    this.latest = latest;
    this.urgent = urgent;
  }

  get isPaused(): boolean {
    return this.pausedUntil > Date.now();
  }
}

type Reads = Pick<DBAdapter, "create" | "findMany" | "findOne">;
type Writes = Reads & Pick<DBAdapter, "update" | "updateMany" | "delete" | "deleteMany" | "consumeOne">;

const MODEL = "securityEvent";
/** Milliseconds. */
const LEASE = 10_000;
const REQUEST = 5_000;
const POLL = 5_000;
const PROBE = 500;
/** How long an API that is down is left alone. A longer `Retry-After` does not extend it. */
const LONGEST_SILENCE = 1_000;
/** How long the events of a lane wait after a 429 at most: an urgent one, and another. */
const LONGEST_URGENT_PAUSE = 1_000;
const LONGEST_PAUSE = 60_000;
/** How long a change's answer waits for the API to have heard of it. */
const PATIENCE = 300;
const FIRST_RETRY = 250;
const LONGEST_RETRY = 15_000;
const LONGEST_RETRY_IF_REFUSED = 300_000;
/** Failures in a row after which the API counts as down. */
const DOWN = 3;
/** People of one lane whose events are sent at the same time. */
const AT_ONCE = 8;
const BATCH = 100;
// Better Auth's own limit is 100: the 101st would go unnoticed.
const EVERYBODY = 1_000_000;

export function securityEvents(options: SecurityEventsOptions) {
  let outbox: Outbox | undefined;
  return {
    id: "security-events",
    schema: {
      [MODEL]: {
        fields: {
          jti: { type: "string", required: true, unique: true },
          type: { type: "string", required: true },
          userId: { type: "string", required: true, index: true },
          mergedInto: { type: "string", required: false, index: true },
          sign: { type: "string", required: false },
          begunAt: { type: "date", required: true },
          toe: { type: "date", required: false },
          attempts: { type: "number", required: true },
          claimedAt: { type: "date", required: false },
          dueAt: { type: "date", required: true, index: true },
        },
      },
    },
    init(context) {
      outbox = new Outbox(context, options);
      watch(context.adapter, outbox);
      tellOfMerges(context, outbox);
      if (options.timer ?? true) outbox.wake(Date.now() + PROBE);
    },
    endpoints: {
      /** Sends what is due, for a cron job; answers how many changes the API has yet to confirm. */
      deliverSecurityEvents: createAuthEndpoint.serverOnly({ method: "POST" }, async () => {
        await outbox?.deliver();
        return { waiting: (await outbox?.waiting()) ?? 0 };
      }),
    },
  } satisfies BetterAuthPlugin;
}

/**
 * Writes down each change before it is made, and tells of it when it was.
 *
 * `databaseHooks` would not do: `user.update.before` is given the new values, and not whose they are. The adapter below
 * them sees every change, those of plugins that pass by the hooks, too. It is changed in place, since Better Auth files
 * its schema check under the object itself.
 */
function watch(adapter: DBAdapter, outbox: Outbox): void {
  observe(adapter, (begun) => outbox.happened(begun));
  const transaction = adapter.transaction.bind(adapter) as DBAdapter["transaction"];
  adapter.transaction = async (work) => {
    let begun: Row[] = [];
    const result = await transaction((inner) => {
      begun = []; // an adapter may run the work again
      // One without transactions hands out itself.
      if ((inner as unknown) !== adapter) observe(inner as Writes, async (more) => void begun.push(...more));
      return work(inner);
    });
    await outbox.happened(begun);
    return result;
  };
}

function observe(adapter: Writes, happened: (begun: Row[]) => Promise<void>): void {
  const around = <C extends Change, R>(write: (change: C) => Promise<R>) => {
    return async (change: C): Promise<R> => {
      const begun = await begin(adapter, change);
      const result = await write.call(adapter, change);
      await happened(begun);
      return result;
    };
  };
  adapter.update = around(adapter.update) as Writes["update"];
  adapter.updateMany = around(adapter.updateMany);
  adapter.delete = around(adapter.delete);
  adapter.deleteMany = around(adapter.deleteMany);
  adapter.consumeOne = around(adapter.consumeOne) as Writes["consumeOne"];
}

/** Writes into the outbox what this change would be, if it is one to tell of; through the transaction that makes it. */
async function begin(adapter: Reads, change: Change): Promise<Row[]> {
  const rows = await changes(adapter, change);
  for (const data of rows) await adapter.create({ model: MODEL, data });
  return rows;
}

async function changes(adapter: Reads, { model, where, update }: Change): Promise<Row[]> {
  if (model === "user" && (!update || "banned" in update || "role" in update)) {
    const users = await adapter.findMany<User>({ model, where, limit: EVERYBODY });
    return users.flatMap((user) => {
      if (!update) return row("account-purged", user.id);
      const { banned, role } = update as Partial<User>;
      const rows = [];
      if (banned !== undefined && Boolean(banned) !== Boolean(user.banned)) {
        rows.push(row(banned ? "account-disabled" : "account-enabled", user.id));
      }
      if (role !== undefined && role !== (user.role ?? null)) rows.push(row("token-claims-change", user.id, { sign: role }));
      return rows;
    });
  }
  if (model === "session" && (!update || over(update["expiresAt"]))) {
    const sessions = await adapter.findMany<Session>({ model, where, limit: EVERYBODY });
    const ended = sessions.filter(({ expiresAt }) => !over(expiresAt)); // the others are cleaned up
    const people = new Map(ended.map(({ userId, id }) => [userId, id]));
    return Array.from(people, ([userId, sign]) => row("session-revoked", userId, { sign }));
  }
  return [];
}

function row(type: EventType, userId: string, more: Partial<Row> = {}): Row {
  const begunAt = now();
  const dueAt = new Date(begunAt.getTime() + LEASE);
  const jti = crypto.randomUUID();
  return { jti, type, userId, mergedInto: null, sign: null, begunAt, toe: null, attempts: 0, claimedAt: null, dueAt, ...more };
}

const over = (expiresAt: unknown): boolean => expiresAt instanceof Date && expiresAt.getTime() <= Date.now();

let last = 0;

/** The time, and never the same twice: it orders what one process does. */
function now(): Date {
  last = Math.max(Date.now(), last + 1);
  return new Date(last);
}

/** Linking an anonymous account makes a new user id; nobody but `onLinkAccount` sees both. */
function tellOfMerges(context: AuthContext, outbox: Outbox): void {
  const plugin = context.getPlugin("anonymous") as BetterAuthPlugin | null;
  if (!plugin) return;
  const anonymous = plugin.options as AnonymousOptions | undefined;
  if (!anonymous) throw new BetterAuthError("securityEvents has to see accounts being linked: write `anonymous({})`");
  const theirs = anonymous.onLinkAccount;
  anonymous.onLinkAccount = async (link) => {
    await theirs?.(link);
    const { anonymousUser, newUser } = link;
    if (anonymousUser.user.id !== newUser.user.id) await outbox.merged(anonymousUser.user.id, newUser.user.id);
  };
}

/** The changes that the API has yet to confirm, in Better Auth's own database, and their delivery (RFC 8935). */
class Outbox {
  private readonly adapter: DBAdapter;
  private readonly context: AuthContext;
  private readonly endpoint: string;
  private readonly audience: string;
  private readonly jwt: JwtOptions;
  private readonly timer: boolean;
  private readonly ends = new Lane(["account-merged", "account-purged"]);
  /** The most urgent first. */
  private readonly lanes = [
    new Lane(["account-disabled", "account-enabled"]),
    new Lane(["token-claims-change"], { latest: true }),
    this.ends,
    new Lane(["session-revoked"], { latest: true, urgent: false }),
  ];
  private alarm: { at: number; id: ReturnType<typeof setTimeout> } | undefined;
  private probing: Promise<boolean> | undefined;
  private failures = 0;
  private silentUntil = 0;

  constructor(context: AuthContext, { endpoint, audience = endpoint, timer = true }: SecurityEventsOptions) {
    if (!URL.canParse(endpoint)) throw new BetterAuthError(`securityEvents: "${endpoint}" is no address`);
    const jwt = context.getPlugin("jwt") as BetterAuthPlugin | null;
    if (!jwt) throw new BetterAuthError("securityEvents signs with the keys of the jwt plugin, which is missing");
    this.jwt = (jwt.options as JwtOptions | undefined) ?? {};
    if (this.jwt.jwt?.getSubject) throw new BetterAuthError("securityEvents knows people by their id, not by getSubject");
    if (context.options.secondaryStorage && !context.options.session?.storeSessionInDatabase) {
      context.logger.warn("[security-events] sessions that are not in the database end unnoticed: set storeSessionInDatabase");
    }
    this.adapter = context.adapter;
    this.context = context;
    this.endpoint = endpoint;
    this.audience = audience;
    this.timer = timer;
  }

  /** These changes were made: say so, and do not hold up whoever made them for long. */
  async happened(begun: Row[]): Promise<void> {
    if (begun.length === 0) return;
    try {
      const toe = now();
      const jtis = begun.map(({ jti }) => jti);
      const where: Where[] = [{ field: "jti", operator: "in", value: jtis }];
      const update = { toe, dueAt: toe };
      if ((await this.adapter.updateMany({ model: MODEL, where, update })) !== begun.length) {
        // The change took longer than the lease, and somebody found that it had not been made.
        const left = await this.adapter.findMany<Row>({ model: MODEL, where });
        const gone = begun.filter(({ jti }) => !left.some((row) => row.jti === jti));
        for (const row of gone) await this.adapter.create({ model: MODEL, data: { ...row, ...update } });
      }
    } catch (error) {
      // The change itself was made. The rows are looked at when their lease is over.
      this.context.logger.error("[security-events] a change is told of later", error);
      return;
    }
    await this.soon(begun);
  }

  async merged(from: string, into: string): Promise<void> {
    const toe = now();
    const data = row("account-merged", from, { mergedInto: into, toe, dueAt: toe });
    await this.adapter.create({ model: MODEL, data });
    await this.soon([data]);
  }

  async waiting(): Promise<number> {
    return this.adapter.count({ model: MODEL });
  }

  private async soon(rows: Row[]): Promise<void> {
    if (this.timer && this.down) return this.wake(Date.now());
    const sending = Promise.all(
      this.lanes.map((lane) => {
        const people = new Set(rows.filter(({ type }) => lane.types.includes(type)).map(({ userId }) => userId));
        if (people.size === 0) return;
        // A slow API is not asked for more at once than it can answer.
        if (this.timer && (lane.isPaused || lane.sending >= AT_ONCE)) return this.wake(Math.max(Date.now(), lane.pausedUntil));
        // Without a timer no other code finds out that the API is back.
        return inTurns([...people], (userId) => this.tell(lane, userId, !this.timer));
      }),
    ).catch((error: unknown) => void this.failed(error));
    this.context.runInBackground(sending);
    if (this.down) return;
    let timeout;
    await Promise.race([sending, new Promise((resolve) => (timeout = setTimeout(resolve, PATIENCE)))]);
    clearTimeout(timeout);
  }

  /** Have a look at what is due at that time, or sooner. */
  wake(at: number): void {
    if (!this.timer) return;
    const soonest = Math.max(at, this.silentUntil);
    if (this.alarm && this.alarm.at <= soonest) return;
    clearTimeout(this.alarm?.id);
    const id = setTimeout(() => {
      this.alarm = undefined;
      // It may have been set before the API asked for silence.
      if (Date.now() < this.silentUntil) this.wake(this.silentUntil);
      else void this.deliver();
    }, soonest - Date.now());
    id.unref?.(); // a process that has nothing else to do may end: the rows stay
    this.alarm = { at: soonest, id };
  }

  /** Send what is due. While the API is down that is one change at a time, to see whether it still is. */
  async deliver(): Promise<void> {
    // Set first: what fell due meanwhile does not wait for the slowest lane.
    this.wake(Date.now() + POLL * (0.5 + Math.random() / 2));
    try {
      if (this.down) {
        this.probing ??= this.probe().finally(() => (this.probing = undefined));
        if ((await this.probing) && this.down) return this.wake(Date.now() + PROBE);
      }
      if (!this.down) await Promise.all(this.lanes.map((lane) => this.drain(lane)));
    } catch (error) {
      this.failed(error);
    }
  }

  /** Send one change, the most urgent that is due, or else the next that will be; whether there was one. */
  private async probe(): Promise<boolean> {
    let next: Row | undefined;
    for (const lane of this.lanes) next ??= (await this.due(lane, 1))[0];
    const where: Where[] = [
      { field: "toe", operator: "ne", value: null },
      { field: "claimedAt", value: null },
    ];
    next ??= (await this.adapter.findMany<Row>({ model: MODEL, where, sortBy: { field: "dueAt", direction: "asc" }, limit: 1 }))[0];
    if (!next) return false;
    const { type, userId } = next;
    await this.settle([next]);
    for (const lane of this.lanes) if (lane.types.includes(type)) await this.tell(lane, userId, true);
    return true;
  }

  private drain(lane: Lane): Promise<void> {
    lane.again = true;
    lane.draining ??= this.sendDue(lane).finally(() => (lane.draining = undefined));
    return lane.draining;
  }

  private async sendDue(lane: Lane): Promise<void> {
    let rows: Row[] = [];
    while (!this.down && (lane.again || rows.length === BATCH)) {
      if (lane.isPaused) return this.wake(lane.pausedUntil);
      lane.again = false;
      rows = await this.due(lane, BATCH);
      await this.settle(rows);
      await inTurns([...new Set(rows.map(({ userId }) => userId))], (userId) => this.tell(lane, userId));
    }
  }

  private async due(lane: Lane, limit: number): Promise<Row[]> {
    if (lane.isPaused) return [];
    const where: Where[] = [
      { field: "type", operator: "in", value: lane.types },
      { field: "dueAt", operator: "lte", value: new Date() },
    ];
    return this.adapter.findMany<Row>({ model: MODEL, where, sortBy: { field: "dueAt", direction: "asc" }, limit });
  }

  /** Find out which of these changes were made, where the process that began them did not live to say so. */
  private async settle(rows: Row[]): Promise<void> {
    for (const row of rows) {
      if (row.toe || !(await this.claim(row))) continue;
      const where: Where[] = [{ field: "jti", value: row.jti }];
      if (await this.wasMade(row)) {
        await this.adapter.updateMany({ model: MODEL, where, update: { toe: now(), claimedAt: null, dueAt: new Date() } });
      } else await this.adapter.deleteMany({ model: MODEL, where });
    }
  }

  /** Send what this lane has to tell of this person, until nothing is left or something has to wait. */
  private async tell(lane: Lane, userId: string, probe = false): Promise<void> {
    lane.sending += 1;
    try {
      const all: Row[] = [];
      for (let row; (row = await this.tellNext(lane, userId, probe)); ) if (row.type !== "session-revoked") all.push(row);
      for (const row of all) {
        for (const merge of await this.mergesAfter(row)) await this.tell(this.ends, merge.userId);
      }
    } finally {
      lane.sending -= 1;
    }
  }

  /** The change that was told, if there may be more. With `probe`, also while the API is down. */
  private async tellNext(lane: Lane, userId: string, probe: boolean): Promise<Row | undefined> {
    const row = await this.next(lane, userId);
    const isProbe = probe && this.down;
    if (!row || (!isProbe && (this.down || lane.isPaused))) return;
    const earlier = row.mergedInto ? await this.before(row) : undefined;
    const isFree =
      row.toe !== null && (row.dueAt.getTime() <= Date.now() || row.attempts === 0 || (isProbe && row.claimedAt === null));
    if (earlier || !isFree) {
      const until = earlier ? Math.max(earlier.dueAt.getTime(), Date.now() + FIRST_RETRY) : row.dueAt.getTime();
      await this.postpone(lane, userId, new Date(until));
      return;
    }
    if (!(await this.claim(row))) return; // another has it, and will look for more when it is through
    const outcome = await this.send(lane, row).catch((error: unknown) => this.failed(error));
    if (outcome === "done") {
      const where: Where[] = lane.latest
        ? [...about(lane, userId), { field: "toe", operator: "lte", value: row.toe }]
        : [{ field: "jti", value: row.jti }];
      await this.adapter.deleteMany({ model: MODEL, where });
      return row;
    }
    const longest = outcome === "refused" ? LONGEST_RETRY_IF_REFUSED : LONGEST_RETRY;
    const pause = Math.min(longest, FIRST_RETRY * 2 ** Math.min(row.attempts, 20)) * (0.5 + Math.random() / 2);
    const dueAt = new Date(outcome === "limited" ? lane.pausedUntil : Date.now() + pause);
    await this.adapter.updateMany({ model: MODEL, where: [{ field: "jti", value: row.jti }], update: { dueAt, claimedAt: null } });
    await this.postpone(lane, userId, dueAt);
    return;
  }

  private async claim(row: Row): Promise<boolean> {
    const where: Where[] = [
      { field: "jti", value: row.jti },
      { field: "attempts", value: row.attempts },
    ];
    const [claimedAt, dueAt] = [new Date(), new Date(Date.now() + LEASE)];
    const set = { claimedAt, dueAt };
    if (!(await this.adapter.incrementOne({ model: MODEL, where, increment: { attempts: 1 }, set }))) return false;
    row.attempts += 1;
    return true;
  }

  /** What this lane has to tell of a person first. */
  private async next(lane: Lane, userId: string): Promise<Row | undefined> {
    const [row] = lane.latest
      ? await this.adapter.findMany<Row>({
          model: MODEL,
          where: [...about(lane, userId), { field: "toe", operator: "ne", value: null }],
          sortBy: { field: "toe", direction: "desc" },
          limit: 1,
        })
      : await this.first(about(lane, userId));
    return row;
  }

  /** A merge concerns two people, and waits for what came before it to either; any of that. */
  private async before({ userId, mergedInto, begunAt }: Row): Promise<Row | undefined> {
    const earlier: Where = { field: "begunAt", operator: "lt", value: begunAt };
    const isUrgent: Where = { field: "type", operator: "ne", value: "session-revoked" };
    const [row] = [
      ...(await this.first([{ field: "userId", value: userId }, isUrgent, earlier])),
      ...(await this.first([{ field: "userId", value: mergedInto }, isUrgent, earlier])),
      ...(await this.first([{ field: "mergedInto", value: userId }, earlier])),
    ];
    return row;
  }

  /** The merges that may have waited for this. */
  private async mergesAfter({ userId, mergedInto }: Row): Promise<Row[]> {
    const type: Where = { field: "type", value: "account-merged" };
    if (mergedInto) return this.first([{ field: "userId", value: mergedInto }, type]);
    return [...(await this.first([{ field: "userId", value: userId }, type])), ...(await this.first([{ field: "mergedInto", value: userId }, type]))];
  }

  private first(where: Where[]): Promise<Row[]> {
    return this.adapter.findMany<Row>({ model: MODEL, where, sortBy: { field: "begunAt", direction: "asc" }, limit: 1 });
  }

  /** What this lane has to tell of a person and is not being sent becomes due at that time, not sooner. */
  private async postpone(lane: Lane, userId: string, until: Date): Promise<void> {
    const where: Where[] = [
      ...about(lane, userId),
      { field: "toe", operator: "ne", value: null },
      { field: "claimedAt", value: null },
      { field: "dueAt", operator: "lt", value: until },
    ];
    await this.adapter.updateMany({ model: MODEL, where, update: { dueAt: until } });
    this.wake(until.getTime());
  }

  /** done: the API knows, or there is nothing to tell. refused: it says that the event is wrong. limited: not now. */
  private async send(lane: Lane, row: Row): Promise<Outcome> {
    const isSignOut = row.type === "session-revoked";
    const user = isSignOut ? null : await this.user(row.userId);
    const iss = this.jwt.jwt?.issuer ?? this.context.options.baseURL;
    if (typeof iss !== "string" || !iss) throw new BetterAuthError("securityEvents needs `baseURL`, or the jwt plugin's `issuer`");
    const event = told(row, user, iss);
    if (!event) return "done";
    const iat = Math.floor(Date.now() / 1000);
    // signJWT reads nothing but `context`, and outside of a request there is nothing else.
    const token = await signJWT({ context: this.context } as GenericEndpointContext, {
      options: this.jwt,
      header: { typ: "secevent+jwt" },
      payload: {
        iss,
        aud: this.audience,
        iat,
        exp: iat + 300, // RFC 8417 needs none, but signJWT always sets one
        jti: row.jti,
        toe: (row.toe ?? now()).getTime() / 1000,
        sub_id: { format: "iss_sub", iss, sub: row.userId },
        events: { [TYPES[row.type]]: event },
      },
    });
    return this.post(lane, token, row);
  }

  private async post(lane: Lane, token: string, row: Row): Promise<Outcome> {
    let response: Response;
    try {
      response = await fetch(this.endpoint, {
        method: "POST",
        headers: { "content-type": "application/secevent+jwt", accept: "application/json" },
        body: token,
        redirect: "manual",
        signal: AbortSignal.timeout(REQUEST),
      });
    } catch (error) {
      return this.unanswered(row, String((error as Error).cause ?? error));
    }
    const { status, headers } = response;
    const body = (await response.text().catch(() => "")).slice(0, 500);
    if (status === 202) {
      await this.answered();
      return "done";
    }
    const wished = 1000 * (Number(headers.get("retry-after")) || 0);
    if (status === 429) {
      await this.answered();
      return this.limited(lane, row, wished);
    }
    if ([502, 503, 504].includes(status)) return this.unanswered(row, `status ${status}`, wished);
    this.context.logger.error(`[security-events] ${row.type} was refused (attempt ${row.attempts}): status ${status} ${body}`);
    return status === 400 ? "refused" : "failed";
  }

  private limited(lane: Lane, { type, attempts }: Row, wished: number): "limited" {
    const pause = FIRST_RETRY * 2 ** Math.min(attempts - 1, 20);
    lane.pausedUntil = Date.now() + (lane.urgent ? Math.min(LONGEST_URGENT_PAUSE, pause) : Math.min(LONGEST_PAUSE, Math.max(wished, pause)));
    this.context.logger.warn(`[security-events] ${type} was not delivered (attempt ${attempts}), and will be: status 429`);
    return "limited";
  }

  private unanswered({ type, attempts }: Row, why: string, wished = 0): "failed" {
    this.failures += 1;
    const silence = Math.max(this.down ? PROBE : 0, Math.min(wished, LONGEST_SILENCE));
    this.silentUntil = Math.max(this.silentUntil, Date.now() + silence);
    if (this.down) this.wake(this.silentUntil);
    this.context.logger.warn(`[security-events] ${type} was not delivered (attempt ${attempts}), and will be: ${why}`);
    return "failed";
  }

  private async answered(): Promise<void> {
    const wasDown = this.down;
    this.failures = this.silentUntil = 0;
    if (!wasDown) return;
    const where: Where[] = [
      { field: "toe", operator: "ne", value: null },
      { field: "claimedAt", value: null },
      { field: "dueAt", operator: "gt", value: new Date() },
    ];
    await this.adapter.updateMany({ model: MODEL, where, update: { dueAt: new Date() } });
    this.wake(Date.now());
  }

  private get down(): boolean {
    return this.failures >= DOWN;
  }

  private user(id: string): Promise<User | null> {
    return this.adapter.findOne<User>({ model: "user", where: [{ field: "id", value: id }] });
  }

  private async wasMade({ type, sign, userId }: Row): Promise<boolean> {
    if (type === "session-revoked") {
      const session = await this.adapter.findOne<Session>({ model: "session", where: [{ field: "id", value: sign }] });
      return !session || over(session.expiresAt);
    }
    const user = await this.user(userId);
    if (type === "account-purged") return !user;
    if (type === "account-disabled") return Boolean(user?.banned);
    if (type === "account-enabled") return Boolean(user && !user.banned);
    return Boolean(user && (user.role ?? null) === sign);
  }

  private failed(error: unknown): "failed" {
    this.context.logger.error("[security-events] nothing could be sent; it will be tried again", error);
    return "failed";
  }
}

type Outcome = "done" | "refused" | "failed" | "limited";

const about = (lane: Lane, userId: string): Where[] => [
  { field: "userId", value: userId },
  { field: "type", operator: "in", value: lane.types },
];

/** What is true of this person now; null when the change was undone since, which has a row of its own. */
function told({ type, mergedInto }: Row, user: User | null, iss: string): object | null {
  if (type === "account-disabled") return user?.banned ? {} : null;
  if (type === "account-enabled") return user && !user.banned ? {} : null;
  if (type === "account-purged") return user ? null : {};
  if (type === "account-merged") return { into: { format: "iss_sub", iss, sub: mergedInto } };
  if (type === "token-claims-change") return user ? { claims: { role: user.role ?? null } } : null;
  return {};
}

async function inTurns<T>(items: T[], work: (item: T) => Promise<void>): Promise<void> {
  const queue = items.values();
  await Promise.all(
    Array.from({ length: Math.min(AT_ONCE, items.length) }, async () => {
      for (const item of queue) await work(item);
    }),
  );
}
