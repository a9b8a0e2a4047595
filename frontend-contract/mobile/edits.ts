/** Local edits of tasks: how they are displayed, combined, and merged with remote changes. */
import { type components, same, type Task, type TaskChanges } from "../client.ts";

export type NewTask = components["schemas"]["TaskCreate"];
/** The editable members of a task, with explicit values: defaults are never written as null. */
export type Members = Pick<Task, (typeof MEMBERS)[number]>;

export type Edit =
  | { op: "create"; id: string; task: Members }
  /** `base`: the values of the changed members before the edit. */
  | { op: "update"; id: string; changes: Partial<Members>; base: Partial<Members> }
  | { op: "delete"; id: string };

export const MEMBERS = ["title", "description", "status", "priority", "due_at", "tags"] as const;

const DEFAULTS: Omit<Members, "title"> = { description: null, status: "todo", priority: "normal", due_at: null, tags: [] };

/** The given members, with null replaced by the default value. */
export function members(task: NewTask | TaskChanges): Partial<Members> {
  const given = MEMBERS.filter((name) => task[name] !== undefined);
  const explicit = given.map((name) => [name, task[name] ?? (name === "title" ? null : DEFAULTS[name])]);
  return Object.fromEntries(explicit) as Partial<Members>;
}

/** All members of a new task, with defaults for missing ones. */
export const complete = (task: NewTask): Members => ({ ...DEFAULTS, title: task.title, ...members(task) });

/** The changes that differ from the task's current values. */
export function differing(task: Members, changes: Partial<Members>): Partial<Members> {
  return pick(changes, (name) => !same(name, task[name], changes[name]));
}

/** Combines two unsent edits of a task into one. */
export function combined(earlier: Edit, later: Edit): Edit {
  if (later.op !== "update") return later;
  if (earlier.op === "create") return { ...earlier, task: { ...earlier.task, ...later.changes } };
  if (earlier.op === "delete") return earlier;
  return { ...earlier, changes: { ...earlier.changes, ...later.changes }, base: { ...later.base, ...earlier.base } };
}

/**
 * Merges a local update with the current remote task, member by member.
 *
 * send: changed members whose remote value is still that of `base`. lost: members that were also changed remotely; the
 * remote value wins.
 */
export function merged(current: Members, edit: Edit & { op: "update" }): { send: Partial<Members>; lost: Partial<Members> } {
  const open = differing(current, edit.changes);
  const unchanged = (name: keyof Members) => same(name, current[name], edit.base[name]);
  return { send: pick(open, unchanged), lost: pick(open, (name) => !unchanged(name)) };
}

/** The task as displayed with a pending edit; undefined if it is deleted or missing. */
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
