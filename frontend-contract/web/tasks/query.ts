/** Filters and order of the task list: as a page URL, as API parameters, and applied to tasks in the browser. */
import type { paths, Task } from "@frontend-contract/client";

type ApiQuery = NonNullable<paths["/api/v1/tasks"]["get"]["parameters"]["query"]>;
export type Sort = NonNullable<ApiQuery["sort"]>;
export type Status = Task["status"];
export type Priority = Task["priority"];

export interface Query {
  status: Status | null;
  priority: Priority | null;
  tag: string | null;
  overdue: boolean;
  deleted: boolean;
  q: string;
  sort: Sort;
}

export const STATUSES = { todo: "To do", in_progress: "In progress", done: "Done" } as const satisfies Record<Status, string>;
export const PRIORITIES = { urgent: "Urgent", high: "High", normal: "Normal", low: "Low" } as const satisfies Record<Priority, string>;
export const SORTS: Partial<Record<Sort, string>> = {
  "-created_at": "Newest first",
  created_at: "Oldest first",
  due_at: "Due soonest first",
  "-priority": "Highest priority first",
  "-updated_at": "Recently changed first",
  title: "By title",
};
export const EVERYTHING: Query = { status: null, priority: null, tag: null, overdue: false, deleted: false, q: "", sort: "-created_at" };
export const PAGE = 50;

const pick = <K extends string>(from: object, text: string | null): K | null => (text !== null && Object.hasOwn(from, text) ? (text as K) : null);

export function readQuery(search: URLSearchParams): Query {
  return {
    status: pick<Status>(STATUSES, search.get("status")),
    priority: pick<Priority>(PRIORITIES, search.get("priority")),
    tag: search.get("tag") || null,
    overdue: search.get("overdue") === "true",
    deleted: search.get("deleted") === "true",
    q: (search.get("q") ?? "").slice(0, 200),
    sort: pick<Sort>(SORTS, search.get("sort")) ?? EVERYTHING.sort,
  };
}

/** The page URL for a query, without parameters that have their default value. */
export function href(query: Query): string {
  const search = new URLSearchParams(
    Object.entries(query).flatMap(([name, value]) => (value === EVERYTHING[name as keyof Query] ? [] : [[name, String(value)]])),
  );
  return search.size > 0 ? `/?${search}` : "/";
}

export function forApi({ status, priority, tag, overdue, deleted, q, sort }: Query): ApiQuery {
  return {
    limit: PAGE,
    sort,
    ...(status && { status }),
    ...(priority && { priority }),
    ...(tag && { tag: [tag] }),
    ...(overdue && { overdue }),
    ...(deleted && { deleted }),
    ...(q && { q }),
  };
}

/** Whether the API would list the task. Applies the filters to a changed task without another request. */
export function matches(query: Query, task: Task, now: number): boolean {
  const text = query.q.toLowerCase();
  const tag = query.tag?.toLowerCase();
  return (
    query.deleted === (task.deleted_at !== null) &&
    (!query.status || task.status === query.status) &&
    (!query.priority || task.priority === query.priority) &&
    (!tag || task.tags.some((name) => name.toLowerCase() === tag)) &&
    (!query.overdue || isOverdue(task, now)) &&
    (!text || task.title.toLowerCase().includes(text) || (task.description ?? "").toLowerCase().includes(text))
  );
}

export const isOverdue = (task: Task, now: number): boolean =>
  task.status !== "done" && task.due_at !== null && Date.parse(task.due_at) < now;

const RANK: Record<Priority, number> = { low: 0, normal: 1, high: 2, urgent: 3 };

/** Compares two tasks in the API's order. */
export function comparing(sort: Sort): (one: Task, other: Task) => number {
  const name = sort.replace("-", "") as "created_at" | "updated_at" | "due_at" | "priority" | "title";
  const direction = sort.startsWith("-") ? -1 : 1;
  const key = (task: Task): string | number => {
    if (name === "priority") return RANK[task.priority];
    if (name === "title") return task.title;
    // Tasks without a due date come last in both directions.
    return task[name] === null ? direction * Infinity : Date.parse(task[name]);
  };
  return (one, other) => direction * (order(key(one), key(other)) || order(one.id, other.id));
}

const order = (one: string | number, other: string | number): number => (one < other ? -1 : one > other ? 1 : 0);
