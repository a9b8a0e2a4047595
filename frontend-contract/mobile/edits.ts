/** What a person does to a task before the server knows: how it looks meanwhile, and how it meets what others did. */
import { type components, same, type Task, type TaskChanges } from "../client.ts";

export type NewTask = components["schemas"]["TaskCreate"];
/** Members with their values spelled out: no null that stands for a default. */
export type Members = Pick<Task, (typeof MEMBERS)[number]>;

export type Edit =
  | { op: "create"; id: string; task: Members }
  /** `base` is what each changed member was when the person saw it. */
  | { op: "update"; id: string; changes: Partial<Members>; base: Partial<Members> }
  | { op: "delete"; id: string };

export const MEMBERS = ["title", "description", "status", "priority", "due_at", "tags"] as const;

const DEFAULTS: Omit<Members, "title"> = { description: null, status: "todo", priority: "normal", due_at: null, tags: [] };

export function members(task: NewTask | TaskChanges): Partial<Members> {
  const given = MEMBERS.filter((name) => task[name] !== undefined);
  const spelled = given.map((name) => [name, task[name] ?? (name === "title" ? null : DEFAULTS[name])]);
  return Object.fromEntries(spelled) as Partial<Members>;
}

export const complete = (task: NewTask): Members => ({ ...DEFAULTS, title: task.title, ...members(task) });

/** What would change: the members whose value is another one. */
export function differing(task: Members, changes: Partial<Members>): Partial<Members> {
  return pick(changes, (name) => !same(name, task[name], changes[name]));
}

/** The earlier of two edits of one task with the later one in it. A delete of what was never made costs no request. */
export function combined(earlier: Edit, later: Edit): Edit {
  if (later.op !== "update") return later;
  if (earlier.op === "create") return { ...earlier, task: { ...earlier.task, ...later.changes } };
  if (earlier.op === "delete") return earlier;
  return { ...earlier, changes: { ...earlier.changes, ...later.changes }, base: { ...later.base, ...earlier.base } };
}

/**
 * A local change beside what the task has become: the members to send, and those where somebody else was first.
 *
 * Member by member: who changed one that nobody else touched gets it; where both did, the server's value stays.
 */
export function merged(current: Members, edit: Edit & { op: "update" }): { send: Partial<Members>; lost: Partial<Members> } {
  const open = differing(current, edit.changes);
  const untouched = (name: keyof Members) => same(name, current[name], edit.base[name]);
  return { send: pick(open, untouched), lost: pick(open, (name) => !untouched(name)) };
}

/** How a task looks with an edit that is on its way. */
export function shown(task: Task | undefined, edit: Edit, now = Date.now()): Task | undefined {
  if (edit.op === "delete") return undefined;
  const changes = edit.op === "create" ? edit.task : edit.changes;
  const instant = new Date(now).toISOString();
  const before: Task | undefined = edit.op === "create"
    ? { ...edit.task, id: edit.id, is_overdue: false, completed_at: null, created_at: instant, updated_at: instant, deleted_at: null, version: 0 }
    : task;
  if (!before) return undefined;
  const after = { ...before, ...changes };
  const completed_at = after.status === "done" ? (before.completed_at ?? instant) : null;
  const is_overdue = after.status !== "done" && after.due_at !== null && Date.parse(after.due_at) < now;
  return { ...after, completed_at, is_overdue };
}

function pick(changes: Partial<Members>, wanted: (name: keyof Members) => boolean): Partial<Members> {
  return Object.fromEntries(Object.entries(changes).filter(([name]) => wanted(name as keyof Members)));
}
