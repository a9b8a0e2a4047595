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
  /** When the change began: the order in which a person's changes are told. */
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

type Reads = Pick<DBAdapter, "create" | "findMany" | "findOne">;
type Writes = Reads & Pick<DBAdapter, "update" | "updateMany" | "delete" | "deleteMany" | "consumeOne">;

const MODEL = "securityEvent";
/** Milliseconds. */
const LEASE = 10_000;
const REQUEST = 5_000;
const POLL = 5_000;
const PROBE = 500;
/** How long a change's answer waits for the API to have heard of it. */
const PATIENCE = 300;
const FIRST_RETRY = 250;
const LONGEST_RETRY = 15_000;
const LONGEST_RETRY_IF_REFUSED = 300_000;
/** Failures in a row after which the API counts as down. */
const DOWN = 3;
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
  private alarm: { at: number; id: ReturnType<typeof setTimeout> } | undefined;
  private delivering: Promise<void> | undefined;
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
    await this.soon(new Set(begun.map(({ userId }) => userId)));
  }

  async merged(from: string, into: string): Promise<void> {
    const toe = now();
    const data = row("account-merged", from, { mergedInto: into, toe, dueAt: toe });
    await this.adapter.create({ model: MODEL, data });
    await this.soon(new Set([from]));
  }

  async waiting(): Promise<number> {
    return this.adapter.count({ model: MODEL });
  }

  private async soon(people: Set<string>): Promise<void> {
    if (this.timer && this.down) return this.wake(Date.now());
    const sending = inTurns([...people], (userId) => this.tell(userId)).catch((error: unknown) => void this.failed(error));
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

  /** Send whatever is due. While the API is down that is one change at a time, to see whether it still is. */
  async deliver(): Promise<void> {
    this.delivering ??= this.sendDue()
      .catch((error: unknown) => void this.failed(error))
      .finally(() => {
        this.delivering = undefined;
        this.wake(Date.now() + POLL * (0.5 + Math.random() / 2));
      });
    return this.delivering;
  }

  private async sendDue(): Promise<void> {
    for (;;) {
      const probing = this.down;
      const rows = await this.adapter.findMany<Row>({
        model: MODEL,
        where: [{ field: "dueAt", operator: "lte", value: new Date() }],
        sortBy: { field: "dueAt", direction: "asc" },
        limit: probing ? 1 : BATCH,
      });
      await inTurns([...new Set(rows.map(({ userId }) => userId))], (userId) => this.tell(userId));
      if (this.down || (rows.length < BATCH && !probing)) return;
    }
  }

  /** Send what is to be told of this person, oldest first, until nothing is left or something has to wait. */
  private async tell(userId: string): Promise<void> {
    const others = new Set<string>();
    while (await this.tellNext(userId, others));
    for (const other of others) if (other !== userId) await this.tell(other);
  }

  /** Whether there may be more; `others` is given those who may have waited for what was told. */
  private async tellNext(userId: string, others: Set<string>): Promise<boolean> {
    const rows = await this.about(userId);
    const row = rows[0] && (await this.oldest(rows[0]));
    if (!row) return false;
    const free = row.dueAt.getTime() <= Date.now() || (row.attempts === 0 && row.toe !== null);
    if (!free) {
      await this.wait(rows, row.dueAt);
      return false;
    }
    if (!(await this.claim(row))) return false; // another has it, and will look for more when it is through
    const outcome = outdated(row, rows) ? "done" : await this.send(row).catch((error: unknown) => this.failed(error));
    if (outcome === "done") {
      await this.adapter.deleteMany({ model: MODEL, where: [{ field: "jti", value: row.jti }] });
      for (const other of [row.userId, row.mergedInto]) if (other) others.add(other);
      return true;
    }
    const longest = outcome === "refused" ? LONGEST_RETRY_IF_REFUSED : LONGEST_RETRY;
    const pause = Math.min(longest, FIRST_RETRY * 2 ** Math.min(row.attempts, 20)) * (0.5 + Math.random() / 2);
    const dueAt = new Date(Date.now() + pause);
    await this.wait([row, ...rows], dueAt);
    this.wake(dueAt.getTime());
    return false;
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

  private about(userId: string): Promise<Row[]> {
    const where: Where[] = [
      { field: "userId", value: userId, connector: "OR" },
      { field: "mergedInto", value: userId, connector: "OR" },
    ];
    return this.adapter.findMany<Row>({ model: MODEL, where, sortBy: { field: "begunAt", direction: "asc" }, limit: BATCH });
  }

  /** A merge concerns two people, and waits for what came before it to either. */
  private async oldest(first: Row): Promise<Row> {
    for (let row = first; ; ) {
      if (!row.mergedInto) return row;
      const [[before], [beforeOther]] = await Promise.all([this.about(row.userId), this.about(row.mergedInto)]);
      const older = [before, beforeOther].find((other) => other && other.begunAt < row.begunAt);
      if (!older) return row;
      row = older;
    }
  }

  private async wait(rows: Row[], until: Date): Promise<void> {
    const jtis = rows.filter(({ dueAt, toe }) => toe !== null && dueAt < until).map(({ jti }) => jti);
    if (jtis.length === 0) return;
    const update = { dueAt: until, claimedAt: null };
    await this.adapter.updateMany({ model: MODEL, where: [{ field: "jti", operator: "in", value: jtis }], update });
  }

  /** done: the API knows, or there is nothing to tell. refused: it says that the event is wrong. */
  private async send(row: Row): Promise<"done" | "refused" | "failed"> {
    const toe = row.toe ?? now();
    const user = await this.adapter.findOne<User>({ model: "user", where: [{ field: "id", value: row.userId }] });
    if (!row.toe) {
      if (!(await this.wasMade(row, user))) return "done";
      await this.adapter.updateMany({ model: MODEL, where: [{ field: "jti", value: row.jti }], update: { toe } });
      row.toe = toe;
    }
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
        toe: toe.getTime() / 1000,
        sub_id: { format: "iss_sub", iss, sub: row.userId },
        events: { [TYPES[row.type]]: event },
      },
    });
    return this.post(token, row);
  }

  private async post(token: string, row: Row): Promise<"done" | "refused" | "failed"> {
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
      await this.succeeded();
      return "done";
    }
    const seconds = Math.min(Number(headers.get("retry-after")) || 0, LONGEST_RETRY / 1000);
    if ([429, 502, 503, 504].includes(status)) return this.unanswered(row, `status ${status}`, seconds);
    this.context.logger.error(`[security-events] ${row.type} was refused (attempt ${row.attempts}): status ${status} ${body}`);
    return status === 400 ? "refused" : "failed";
  }

  private unanswered({ type, attempts }: Row, why: string, seconds = 0): "failed" {
    this.failures += 1;
    this.silentUntil = Math.max(this.silentUntil, Date.now() + (this.down ? PROBE : 0), Date.now() + seconds * 1000);
    this.context.logger.warn(`[security-events] ${type} was not delivered (attempt ${attempts}), and will be: ${why}`);
    return "failed";
  }

  private async succeeded(): Promise<void> {
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

  /** Whether a change was made whose maker did not live to say so. */
  private async wasMade({ type, sign }: Row, user: User | null): Promise<boolean> {
    if (type === "account-purged") return !user;
    if (type === "account-disabled") return Boolean(user?.banned);
    if (type === "account-enabled") return Boolean(user && !user.banned);
    if (type === "token-claims-change") return Boolean(user && (user.role ?? null) === sign);
    const session = await this.adapter.findOne<Session>({ model: "session", where: [{ field: "id", value: sign }] });
    return !session || over(session.expiresAt);
  }

  private failed(error: unknown): "failed" {
    this.context.logger.error("[security-events] nothing could be sent; it will be tried again", error);
    return "failed";
  }
}

/** What is true of this person now; null when the change was undone since, which has a row of its own. */
function told({ type, mergedInto }: Row, user: User | null, iss: string): object | null {
  if (type === "account-disabled") return user?.banned ? {} : null;
  if (type === "account-enabled") return user && !user.banned ? {} : null;
  if (type === "account-purged") return user ? null : {};
  if (type === "account-merged") return { into: { format: "iss_sub", iss, sub: mergedInto } };
  if (type === "token-claims-change") return user ? { claims: { role: user.role ?? null } } : null;
  return {};
}

/** Whether a later change of the same kind, made as well, says all that this one would. */
function outdated({ type, userId, begunAt, toe }: Row, rows: Row[]): boolean {
  const kinds: EventType[] = ["session-revoked", "token-claims-change"];
  return (
    toe !== null &&
    kinds.includes(type) &&
    rows.some((other) => other.type === type && other.userId === userId && other.toe !== null && other.begunAt > begunAt)
  );
}

async function inTurns<T>(items: T[], work: (item: T) => Promise<void>): Promise<void> {
  const queue = items.values();
  await Promise.all(
    Array.from({ length: Math.min(AT_ONCE, items.length) }, async () => {
      for (const item of queue) await work(item);
    }),
  );
}
