/** Changing a task only if nobody else has changed it since it was read. */
import type { Client, components } from "../client.ts";
import { ApiError, Conflict, type Task } from "./errors.ts";

export type TaskChanges = components["schemas"]["TaskUpdate"];

/**
 * The task with the changes made.
 *
 * task: as it was read; its version goes with the request as If-Match.
 * Throws Conflict, with the task as it is now, when somebody else was there first. An answer that was lost is no conflict:
 * what is found to be just as it should be counts as done.
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
    if (current && agrees(current, changes)) return current;
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

function agrees(task: Task, changes: TaskChanges): boolean {
  return Object.entries(changes).every(([name, value]) => {
    const member = name as keyof TaskChanges;
    return same(member, task[member], value ?? DEFAULTS[member] ?? null);
  });
}

/** Whether two values of a member are one to the API: times in any zone, tags in any order and case. */
export function same(member: keyof TaskChanges, one: unknown, other: unknown): boolean {
  if (member === "due_at" && one && other) return Date.parse(one as string) === Date.parse(other as string);
  if (member === "tags") return tagSet(one) === tagSet(other);
  return one === other;
}

const tagSet = (tags: unknown): string =>
  JSON.stringify([...new Set(((tags ?? []) as string[]).map((tag) => tag.toLowerCase()))].sort());
