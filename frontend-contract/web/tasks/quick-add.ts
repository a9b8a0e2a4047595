/** Parses a line such as `Call Ada #work !high @tomorrow` into a task. */
import { evening } from "./due.ts";
import { PRIORITIES, type Priority } from "./query.ts";
import type { NewTask } from "./store.ts";

const DAYS: Record<string, number> = { today: 0, tomorrow: 1 };
const MARKER = /(^|\s)([#!@])([\p{L}\p{N}_-]{1,50})(?=\s|$)/gu;

/** Returns null if the line has no title. Unknown markers, such as `!soon`, stay in the title. */
export function quickAdd(line: string): NewTask | null {
  const task: NewTask = { title: "" };
  const tags: string[] = [];
  const title = line.replace(MARKER, (whole, _space: string, kind: string, text: string) => {
    const name = text.toLowerCase();
    if (kind === "#") tags.push(text);
    else if (kind === "!" && Object.hasOwn(PRIORITIES, name)) task.priority = name as Priority;
    else if (kind === "@" && name in DAYS) task.due_at = evening(DAYS[name]!);
    else return whole;
    return "";
  });
  task.title = title.replace(/\s+/g, " ").trim();
  if (tags.length > 0) task.tags = tags;
  return task.title ? task : null;
}
