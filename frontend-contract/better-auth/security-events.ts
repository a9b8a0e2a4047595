/** A Better Auth plugin that sends bans, sign-outs, role changes, deletions and account merges to the API immediately. */
import type { AuthContext, BetterAuthPlugin, DBAdapter, GenericEndpointContext, Where } from "better-auth";
import { BetterAuthError } from "better-auth";
import { createAuthEndpoint } from "better-auth/api";
import type { AnonymousOptions, JwtOptions } from "better-auth/plugins";
import { signJWT } from "better-auth/plugins";

export interface SecurityEventsOptions {
  /** URL of the API's endpoint for security events, such as `https://api.example.com/api/v1/security-events`. */
  endpoint: string;
  /** The API's `SECURITY_EVENTS_AUDIENCE`. Defaults to `endpoint`. */
  audience?: string;
  /**
   * Whether a timer retries deliveries. Set to false in serverless environments, and call
   * `auth.api.deliverSecurityEvents()` from a cron job. Default: true.
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

/** A row of the outbox: a change that the API has not confirmed. */
interface Row {
  jti: string;
  type: EventType;
  userId: string;
  /** For account-merged: the id of the account that the anonymous one was linked to. */
  mergedInto: string | null;
  /** Evidence to check, after a crash, whether the change was made: the new role, or the id of the ended session. */
  sign: string | null;
  /** Time before the change. Orders the events of one user and lane. */
  begunAt: Date;
  /** Time of the change; null while it is unknown whether it was made. */
  toe: Date | null;
  attempts: number;
  /** Start of the current delivery attempt; null between attempts. */
  claimedAt: Date | null;
  /** Time of the next attempt; until then the row is leased to the process that makes the change or sends the event. */
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
 * A group of event types with its own delivery queue, so that bans do not wait for sign-outs. Only merges wait for events
 * of other lanes.
 */
class Lane {
  readonly types: EventType[];
  /** The latest event of a user replaces earlier ones. */
  readonly latest: boolean;
  /** The user keeps access until the event is delivered, so a long `Retry-After` is not waited for. */
  readonly urgent: boolean;
  /** Number of users whose events are being sent. */
  sending = 0;
  draining: Promise<void> | undefined;
  /** Events may have become due while the lane was being drained. */
  rerun = false;
  /** End of a pause after a 429 response. */
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
const REQUEST_TIMEOUT = 5_000;
const POLL_INTERVAL = 5_000;
/** Interval of attempts while the API is down. */
const PROBE_INTERVAL = 500;
/** Maximum pause after a 502, 503 or 504, regardless of `Retry-After`. */
const MAX_OUTAGE_PAUSE = 1_000;
/** Maximum pause of an urgent lane, and of another lane, after a 429. */
const MAX_URGENT_PAUSE = 1_000;
const MAX_PAUSE = 60_000;
/** Maximum time for which the response to a change waits for the delivery of its events. */
const MAX_RESPONSE_DELAY = 300;
const FIRST_RETRY = 250;
const MAX_RETRY = 15_000;
const MAX_RETRY_AFTER_REJECTION = 300_000;
/** Failures in a row after which the API counts as down. */
const FAILURES_UNTIL_DOWN = 3;
/** Number of users per lane whose events are sent concurrently. */
const CONCURRENCY = 8;
const BATCH = 100;
// Without a limit, Better Auth returns 100 rows only.
const ALL_ROWS = 1_000_000;

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
      wrapAdapter(context.adapter, outbox);
      reportMerges(context, outbox);
      if (options.timer ?? true) outbox.wake(Date.now() + PROBE_INTERVAL);
    },
    endpoints: {
      /** Sends all due events, for a cron job. Returns the number of unconfirmed events as `waiting`. */
      deliverSecurityEvents: createAuthEndpoint.serverOnly({ method: "POST" }, async () => {
        await outbox?.deliver();
        return { waiting: (await outbox?.waiting()) ?? 0 };
      }),
    },
  } satisfies BetterAuthPlugin;
}

/**
 * Wraps the adapter's methods: writes an outbox row before each relevant change, and sends the event after it.
 *
 * `databaseHooks` are not sufficient: `user.update.before` gets the new values without the user's id, and some plugins
 * bypass the hooks. The adapter is modified in place, because Better Auth caches its schema check by the object.
 */
function wrapAdapter(adapter: DBAdapter, outbox: Outbox): void {
  wrapWrites(adapter, (begun) => outbox.changed(begun));
  const transaction = adapter.transaction.bind(adapter) as DBAdapter["transaction"];
  adapter.transaction = async (work) => {
    let begun: Row[] = [];
    const result = await transaction((inner) => {
      begun = []; // the adapter may retry the transaction
      // An adapter without transactions passes itself, already wrapped.
      if ((inner as unknown) !== adapter) wrapWrites(inner as Writes, async (more) => void begun.push(...more));
      return work(inner);
    });
    await outbox.changed(begun);
    return result;
  };
}

function wrapWrites(adapter: Writes, changed: (begun: Row[]) => Promise<void>): void {
  const wrap = <C extends Change, R>(write: (change: C) => Promise<R>) => {
    return async (change: C): Promise<R> => {
      const begun = await recordChange(adapter, change);
      const result = await write.call(adapter, change);
      await changed(begun);
      return result;
    };
  };
  adapter.update = wrap(adapter.update) as Writes["update"];
  adapter.updateMany = wrap(adapter.updateMany);
  adapter.delete = wrap(adapter.delete);
  adapter.deleteMany = wrap(adapter.deleteMany);
  adapter.consumeOne = wrap(adapter.consumeOne) as Writes["consumeOne"];
}

/** Writes the outbox rows of a change that is about to be made, within its transaction. */
async function recordChange(adapter: Reads, change: Change): Promise<Row[]> {
  const rows = await eventsOf(adapter, change);
  for (const data of rows) await adapter.create({ model: MODEL, data });
  return rows;
}

/** The events that a change will cause. */
async function eventsOf(adapter: Reads, { model, where, update }: Change): Promise<Row[]> {
  if (model === "user" && (!update || "banned" in update || "role" in update)) {
    const users = await adapter.findMany<User>({ model, where, limit: ALL_ROWS });
    return users.flatMap((user) => {
      if (!update) return newRow("account-purged", user.id);
      const { banned, role } = update as Partial<User>;
      const rows = [];
      if (banned !== undefined && Boolean(banned) !== Boolean(user.banned)) {
        rows.push(newRow(banned ? "account-disabled" : "account-enabled", user.id));
      }
      if (role !== undefined && role !== (user.role ?? null)) rows.push(newRow("token-claims-change", user.id, { sign: role }));
      return rows;
    });
  }
  if (model === "session" && (!update || isPast(update["expiresAt"]))) {
    const sessions = await adapter.findMany<Session>({ model, where, limit: ALL_ROWS });
    const ended = sessions.filter(({ expiresAt }) => !isPast(expiresAt)); // expired sessions are only cleaned up
    const lastSessions = new Map(ended.map(({ userId, id }) => [userId, id]));
    return Array.from(lastSessions, ([userId, sign]) => newRow("session-revoked", userId, { sign }));
  }
  return [];
}

function newRow(type: EventType, userId: string, more: Partial<Row> = {}): Row {
  const begunAt = now();
  const dueAt = new Date(begunAt.getTime() + LEASE);
  const jti = crypto.randomUUID();
  return { jti, type, userId, mergedInto: null, sign: null, begunAt, toe: null, attempts: 0, claimedAt: null, dueAt, ...more };
}

const isPast = (expiresAt: unknown): boolean => expiresAt instanceof Date && expiresAt.getTime() <= Date.now();

let lastTime = 0;

/** The current time, strictly increasing within this process. */
function now(): Date {
  lastTime = Math.max(Date.now(), lastTime + 1);
  return new Date(lastTime);
}

/** Records merges of anonymous accounts. Only `onLinkAccount` gets both user ids. */
function reportMerges(context: AuthContext, outbox: Outbox): void {
  const plugin = context.getPlugin("anonymous") as BetterAuthPlugin | null;
  if (!plugin) return;
  const anonymous = plugin.options as AnonymousOptions | undefined;
  if (!anonymous) throw new BetterAuthError("securityEvents needs the options of the anonymous plugin: write `anonymous({})`");
  const configured = anonymous.onLinkAccount;
  anonymous.onLinkAccount = async (link) => {
    await configured?.(link);
    const { anonymousUser, newUser } = link;
    if (anonymousUser.user.id !== newUser.user.id) await outbox.merged(anonymousUser.user.id, newUser.user.id);
  };
}

/** The outbox in Better Auth's database, and the delivery of its events to the API (RFC 8935). */
class Outbox {
  private readonly adapter: DBAdapter;
  private readonly context: AuthContext;
  private readonly endpoint: string;
  private readonly audience: string;
  private readonly jwt: JwtOptions;
  private readonly timer: boolean;
  private readonly mergesAndPurges = new Lane(["account-merged", "account-purged"]);
  /** In order of urgency. */
  private readonly lanes = [
    new Lane(["account-disabled", "account-enabled"]),
    new Lane(["token-claims-change"], { latest: true }),
    this.mergesAndPurges,
    new Lane(["session-revoked"], { latest: true, urgent: false }),
  ];
  private alarm: { at: number; id: ReturnType<typeof setTimeout> } | undefined;
  private probing: Promise<boolean> | undefined;
  private failures = 0;
  private pausedUntil = 0;

  constructor(context: AuthContext, { endpoint, audience = endpoint, timer = true }: SecurityEventsOptions) {
    if (!URL.canParse(endpoint)) throw new BetterAuthError(`securityEvents: the endpoint "${endpoint}" is not a URL`);
    const jwt = context.getPlugin("jwt") as BetterAuthPlugin | null;
    if (!jwt) throw new BetterAuthError("securityEvents requires the jwt plugin, whose keys sign the events");
    this.jwt = (jwt.options as JwtOptions | undefined) ?? {};
    if (this.jwt.jwt?.getSubject) throw new BetterAuthError("securityEvents sends the user's id as subject and does not support the jwt plugin's getSubject");
    if (context.options.secondaryStorage && !context.options.session?.storeSessionInDatabase) {
      context.logger.warn("[security-events] ended sessions are not reported unless they are in the database: set storeSessionInDatabase");
    }
    this.adapter = context.adapter;
    this.context = context;
    this.endpoint = endpoint;
    this.audience = audience;
    this.timer = timer;
  }

  /** Marks changes as made and sends their events. Waits for the delivery for MAX_RESPONSE_DELAY at most. */
  async changed(begun: Row[]): Promise<void> {
    if (begun.length === 0) return;
    try {
      const toe = now();
      const jtis = begun.map(({ jti }) => jti);
      const where: Where[] = [{ field: "jti", operator: "in", value: jtis }];
      const update = { toe, dueAt: toe };
      if ((await this.adapter.updateMany({ model: MODEL, where, update })) !== begun.length) {
        // The change took longer than the lease, and another process removed the row.
        const left = await this.adapter.findMany<Row>({ model: MODEL, where });
        const gone = begun.filter(({ jti }) => !left.some((row) => row.jti === jti));
        for (const row of gone) await this.adapter.create({ model: MODEL, data: { ...row, ...update } });
      }
    } catch (error) {
      // The change was made. The rows are processed when their lease expires.
      this.context.logger.error("[security-events] could not mark a change as made; its event will be sent later", error);
      return;
    }
    await this.sendNow(begun);
  }

  async merged(from: string, into: string): Promise<void> {
    const toe = now();
    const data = newRow("account-merged", from, { mergedInto: into, toe, dueAt: toe });
    await this.adapter.create({ model: MODEL, data });
    await this.sendNow([data]);
  }

  async waiting(): Promise<number> {
    return this.adapter.count({ model: MODEL });
  }

  private async sendNow(rows: Row[]): Promise<void> {
    if (this.timer && this.isDown) return this.wake(Date.now());
    const sending = Promise.all(
      this.lanes.map((lane) => {
        const users = new Set(rows.filter(({ type }) => lane.types.includes(type)).map(({ userId }) => userId));
        if (users.size === 0) return;
        // Limit the number of concurrent requests to a slow API.
        if (this.timer && (lane.isPaused || lane.sending >= CONCURRENCY)) return this.wake(Math.max(Date.now(), lane.pausedUntil));
        // Without a timer, only this attempt can detect that the API is back.
        return forEachConcurrently([...users], (userId) => this.sendAll(lane, userId, !this.timer));
      }),
    ).catch((error: unknown) => void this.logFailure(error));
    this.context.runInBackground(sending);
    if (this.isDown) return;
    let timeout;
    await Promise.race([sending, new Promise((resolve) => (timeout = setTimeout(resolve, MAX_RESPONSE_DELAY)))]);
    clearTimeout(timeout);
  }

  /** Schedules `deliver` at the given time, unless it is scheduled earlier. */
  wake(at: number): void {
    if (!this.timer) return;
    const soonest = Math.max(at, this.pausedUntil);
    if (this.alarm && this.alarm.at <= soonest) return;
    clearTimeout(this.alarm?.id);
    const id = setTimeout(() => {
      this.alarm = undefined;
      // A pause may have started after the timer was set.
      if (Date.now() < this.pausedUntil) this.wake(this.pausedUntil);
      else void this.deliver();
    }, soonest - Date.now());
    id.unref?.(); // do not keep the process alive: the rows stay in the database
    this.alarm = { at: soonest, id };
  }

  /** Sends all due events. While the API is down, sends one event as a probe. */
  async deliver(): Promise<void> {
    // Schedule the next run first, so that new events do not wait for the slowest lane.
    this.wake(Date.now() + POLL_INTERVAL * (0.5 + Math.random() / 2));
    try {
      if (this.isDown) {
        this.probing ??= this.probe().finally(() => (this.probing = undefined));
        if ((await this.probing) && this.isDown) return this.wake(Date.now() + PROBE_INTERVAL);
      }
      if (!this.isDown) await Promise.all(this.lanes.map((lane) => this.drain(lane)));
    } catch (error) {
      this.logFailure(error);
    }
  }

  /** Sends one event: the most urgent due one, else the next one. Returns false if there is none. */
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
    await this.resolveUnknown([next]);
    for (const lane of this.lanes) if (lane.types.includes(type)) await this.sendAll(lane, userId, true);
    return true;
  }

  private drain(lane: Lane): Promise<void> {
    lane.rerun = true;
    lane.draining ??= this.sendDue(lane).finally(() => (lane.draining = undefined));
    return lane.draining;
  }

  private async sendDue(lane: Lane): Promise<void> {
    let rows: Row[] = [];
    while (!this.isDown && (lane.rerun || rows.length === BATCH)) {
      if (lane.isPaused) return this.wake(lane.pausedUntil);
      lane.rerun = false;
      rows = await this.due(lane, BATCH);
      await this.resolveUnknown(rows);
      await forEachConcurrently([...new Set(rows.map(({ userId }) => userId))], (userId) => this.sendAll(lane, userId));
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

  /** For rows whose process crashed or failed: checks whether the change was made, and deletes the row if not. */
  private async resolveUnknown(rows: Row[]): Promise<void> {
    for (const row of rows) {
      if (row.toe || !(await this.claim(row))) continue;
      const where: Where[] = [{ field: "jti", value: row.jti }];
      if (await this.wasMade(row)) {
        await this.adapter.updateMany({ model: MODEL, where, update: { toe: now(), claimedAt: null, dueAt: new Date() } });
      } else await this.adapter.deleteMany({ model: MODEL, where });
    }
  }

  /** Sends a user's events of a lane until none is left or one has to wait. */
  private async sendAll(lane: Lane, userId: string, probe = false): Promise<void> {
    lane.sending += 1;
    try {
      const sent: Row[] = [];
      for (let row; (row = await this.sendNext(lane, userId, probe)); ) if (row.type !== "session-revoked") sent.push(row);
      for (const row of sent) {
        for (const merge of await this.mergesAfter(row)) await this.sendAll(this.mergesAndPurges, merge.userId);
      }
    } finally {
      lane.sending -= 1;
    }
  }

  /** Sends a user's next event. Returns it if it was delivered. With `probe`, sends even while the API is down. */
  private async sendNext(lane: Lane, userId: string, probe: boolean): Promise<Row | undefined> {
    const row = await this.next(lane, userId);
    const isProbe = probe && this.isDown;
    if (!row || (!isProbe && (this.isDown || lane.isPaused))) return;
    const earlier = row.mergedInto ? await this.firstBefore(row) : undefined;
    const isFree =
      row.toe !== null && (row.dueAt.getTime() <= Date.now() || row.attempts === 0 || (isProbe && row.claimedAt === null));
    if (earlier || !isFree) {
      const until = earlier ? Math.max(earlier.dueAt.getTime(), Date.now() + FIRST_RETRY) : row.dueAt.getTime();
      await this.postpone(lane, userId, new Date(until));
      return;
    }
    if (!(await this.claim(row))) return; // another process is sending it, and will continue with the next
    const outcome = await this.send(lane, row).catch((error: unknown) => this.logFailure(error));
    if (outcome === "done") {
      const where: Where[] = lane.latest
        ? [...ofUser(lane, userId), { field: "toe", operator: "lte", value: row.toe }]
        : [{ field: "jti", value: row.jti }];
      await this.adapter.deleteMany({ model: MODEL, where });
      return row;
    }
    const longest = outcome === "refused" ? MAX_RETRY_AFTER_REJECTION : MAX_RETRY;
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

  /** The user's next event in a lane. */
  private async next(lane: Lane, userId: string): Promise<Row | undefined> {
    const [row] = lane.latest
      ? await this.adapter.findMany<Row>({
          model: MODEL,
          where: [...ofUser(lane, userId), { field: "toe", operator: "ne", value: null }],
          sortBy: { field: "toe", direction: "desc" },
          limit: 1,
        })
      : await this.first(ofUser(lane, userId));
    return row;
  }

  /** An earlier event of either account of a merge, for which the merge has to wait. */
  private async firstBefore({ userId, mergedInto, begunAt }: Row): Promise<Row | undefined> {
    const earlier: Where = { field: "begunAt", operator: "lt", value: begunAt };
    const isUrgent: Where = { field: "type", operator: "ne", value: "session-revoked" };
    const [row] = [
      ...(await this.first([{ field: "userId", value: userId }, isUrgent, earlier])),
      ...(await this.first([{ field: "userId", value: mergedInto }, isUrgent, earlier])),
      ...(await this.first([{ field: "mergedInto", value: userId }, earlier])),
    ];
    return row;
  }

  /** Merges that may have waited for this event. */
  private async mergesAfter({ userId, mergedInto }: Row): Promise<Row[]> {
    const type: Where = { field: "type", value: "account-merged" };
    if (mergedInto) return this.first([{ field: "userId", value: mergedInto }, type]);
    return [...(await this.first([{ field: "userId", value: userId }, type])), ...(await this.first([{ field: "mergedInto", value: userId }, type]))];
  }

  private first(where: Where[]): Promise<Row[]> {
    return this.adapter.findMany<Row>({ model: MODEL, where, sortBy: { field: "begunAt", direction: "asc" }, limit: 1 });
  }

  /** Delays a user's events of a lane, except one being sent, until the given time. */
  private async postpone(lane: Lane, userId: string, until: Date): Promise<void> {
    const where: Where[] = [
      ...ofUser(lane, userId),
      { field: "toe", operator: "ne", value: null },
      { field: "claimedAt", value: null },
      { field: "dueAt", operator: "lt", value: until },
    ];
    await this.adapter.updateMany({ model: MODEL, where, update: { dueAt: until } });
    this.wake(until.getTime());
  }

  /** Signs an event and sends it, unless the change was undone. */
  private async send(lane: Lane, row: Row): Promise<Outcome> {
    const isSignOut = row.type === "session-revoked";
    const user = isSignOut ? null : await this.user(row.userId);
    const iss = this.jwt.jwt?.issuer ?? this.context.options.baseURL;
    if (typeof iss !== "string" || !iss) throw new BetterAuthError("securityEvents requires `baseURL`, or the jwt plugin's `issuer`");
    const event = eventPayload(row, user, iss);
    if (!event) return "done";
    const iat = Math.floor(Date.now() / 1000);
    // signJWT only reads `context`, the only part that exists outside of a request.
    const token = await signJWT({ context: this.context } as GenericEndpointContext, {
      options: this.jwt,
      header: { typ: "secevent+jwt" },
      payload: {
        iss,
        aud: this.audience,
        iat,
        exp: iat + 300, // optional in RFC 8417, but signJWT always sets one
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
        signal: AbortSignal.timeout(REQUEST_TIMEOUT),
      });
    } catch (error) {
      return this.unavailable(row, String((error as Error).cause ?? error));
    }
    const { status, headers } = response;
    const body = (await response.text().catch(() => "")).slice(0, 500);
    if (status === 202) {
      await this.available();
      return "done";
    }
    const retryAfter = 1000 * (Number(headers.get("retry-after")) || 0);
    if (status === 429) {
      await this.available();
      return this.pause(lane, row, retryAfter);
    }
    if ([502, 503, 504].includes(status)) return this.unavailable(row, `status ${status}`, retryAfter);
    this.context.logger.error(`[security-events] the API rejected ${row.type} (attempt ${row.attempts}): status ${status} ${body}`);
    return status === 400 ? "refused" : "failed";
  }

  private pause(lane: Lane, { type, attempts }: Row, retryAfter: number): "limited" {
    const pause = FIRST_RETRY * 2 ** Math.min(attempts - 1, 20);
    lane.pausedUntil = Date.now() + (lane.urgent ? Math.min(MAX_URGENT_PAUSE, pause) : Math.min(MAX_PAUSE, Math.max(retryAfter, pause)));
    this.context.logger.warn(`[security-events] ${type} was not delivered (attempt ${attempts}) and will be retried: status 429`);
    return "limited";
  }

  private unavailable({ type, attempts }: Row, reason: string, retryAfter = 0): "failed" {
    this.failures += 1;
    const pause = Math.max(this.isDown ? PROBE_INTERVAL : 0, Math.min(retryAfter, MAX_OUTAGE_PAUSE));
    this.pausedUntil = Math.max(this.pausedUntil, Date.now() + pause);
    if (this.isDown) this.wake(this.pausedUntil);
    this.context.logger.warn(`[security-events] ${type} was not delivered (attempt ${attempts}) and will be retried: ${reason}`);
    return "failed";
  }

  /** After a response: if the API was down, makes all waiting events due. */
  private async available(): Promise<void> {
    const wasDown = this.isDown;
    this.failures = this.pausedUntil = 0;
    if (!wasDown) return;
    const where: Where[] = [
      { field: "toe", operator: "ne", value: null },
      { field: "claimedAt", value: null },
      { field: "dueAt", operator: "gt", value: new Date() },
    ];
    await this.adapter.updateMany({ model: MODEL, where, update: { dueAt: new Date() } });
    this.wake(Date.now());
  }

  private get isDown(): boolean {
    return this.failures >= FAILURES_UNTIL_DOWN;
  }

  private user(id: string): Promise<User | null> {
    return this.adapter.findOne<User>({ model: "user", where: [{ field: "id", value: id }] });
  }

  private async wasMade({ type, sign, userId }: Row): Promise<boolean> {
    if (type === "session-revoked") {
      const session = await this.adapter.findOne<Session>({ model: "session", where: [{ field: "id", value: sign }] });
      return !session || isPast(session.expiresAt);
    }
    const user = await this.user(userId);
    if (type === "account-purged") return !user;
    if (type === "account-disabled") return Boolean(user?.banned);
    if (type === "account-enabled") return Boolean(user && !user.banned);
    return Boolean(user && (user.role ?? null) === sign);
  }

  private logFailure(error: unknown): "failed" {
    this.context.logger.error("[security-events] delivery failed and will be retried", error);
    return "failed";
  }
}

/**
 * done: delivered, or the change was undone. refused: the API rejected the event (400). limited: 429. failed: any other error.
 */
type Outcome = "done" | "refused" | "failed" | "limited";

const ofUser = (lane: Lane, userId: string): Where[] => [
  { field: "userId", value: userId },
  { field: "type", operator: "in", value: lane.types },
];

/** The event's payload from the user's current state; null if the change was undone since, which is a separate event. */
function eventPayload({ type, mergedInto }: Row, user: User | null, iss: string): object | null {
  if (type === "account-disabled") return user?.banned ? {} : null;
  if (type === "account-enabled") return user && !user.banned ? {} : null;
  if (type === "account-purged") return user ? null : {};
  if (type === "account-merged") return { into: { format: "iss_sub", iss, sub: mergedInto } };
  if (type === "token-claims-change") return user ? { claims: { role: user.role ?? null } } : null;
  return {};
}

async function forEachConcurrently<T>(items: T[], work: (item: T) => Promise<void>): Promise<void> {
  const queue = items.values();
  await Promise.all(
    Array.from({ length: Math.min(CONCURRENCY, items.length) }, async () => {
      for (const item of queue) await work(item);
    }),
  );
}
