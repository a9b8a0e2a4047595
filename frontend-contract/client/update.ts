/** Updates of a task with conflict detection. */
import type { Client, components } from "../client.ts";
import { ApiError, Conflict, type Task } from "./errors.ts";

export type TaskChanges = components["schemas"]["TaskUpdate"];

/**
 * Changes a task if its version is still that of `task`, and returns the changed task.
 *
 * task: the task as it was read; its version is sent as If-Match.
 * Throws Conflict, with the current task, if it was changed or deleted since. If the current task already has the
 * requested values, for example after a lost response, it is returned instead.
 */
export async function update(
  client: Client,
  task: Pick<Task, "id" | "version">,
  changes: TaskChanges,
  { signal }: { signal?: AbortSignal } = {},
): Promise<Task> {
  const path = { id: task.id };
  const options = signal ? { signal } : {};
  try {
    const params = { path, header: { "If-Match": `"${task.version}"` } };
    return (await client.PATCH("/api/v1/tasks/{id}", { ...options, params, body: changes })).data;
  } catch (error) {
    if (!(error instanceof ApiError) || (error.status !== 412 && error.status !== 404)) throw error;
    const current = error.status === 404 ? null : await read(client, path, options);
    if (current && hasValues(current, changes)) return current;
    throw new Conflict(error, current);
  }
}

async function read(client: Client, path: { id: string }, options: { signal?: AbortSignal }): Promise<Task | null> {
  try {
    return (await client.GET("/api/v1/tasks/{id}", { ...options, params: { path } })).data;
  } catch (error) {
    if (error instanceof ApiError && error.status === 404) return null;
    throw error;
  }
}

const DEFAULTS: Partial<Task> = { status: "todo", priority: "normal", tags: [], description: null, due_at: null };

function hasValues(task: Task, changes: TaskChanges): boolean {
  return Object.entries(changes).every(([name, value]) => {
    const member = name as keyof TaskChanges;
    return same(member, task[member], value ?? DEFAULTS[member] ?? null);
  });
}

/** Whether the API treats two values of a member as equal: times in any time zone, tags in any order and case. */
export function same(member: keyof TaskChanges, one: unknown, other: unknown): boolean {
  if (member === "due_at" && one && other) return Date.parse(one as string) === Date.parse(other as string);
  if (member === "tags") return tagSet(one) === tagSet(other);
  return one === other;
}

const tagSet = (tags: unknown): string =>
  JSON.stringify([...new Set(((tags ?? []) as string[]).map((tag) => tag.toLowerCase()))].sort());
