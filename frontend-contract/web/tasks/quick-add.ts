/** One line into a task: `Call Ada #work !high @tomorrow`. */
import { evening } from "./due.ts";
import { PRIORITIES, type Priority } from "./query.ts";
import type { NewTask } from "./store.ts";

const DAYS: Record<string, number> = { today: 0, tomorrow: 1 };
const MARK = /(^|\s)([#!@])([\p{L}\p{N}_-]{1,50})(?=\s|$)/gu;

/** Null: there is no title in it. A mark that means nothing stays in the title. */
export function quickAdd(line: string): NewTask | null {
  const task: NewTask = { title: "" };
  const tags: string[] = [];
  const title = line.replace(MARK, (whole, _space: string, kind: string, word: string) => {
    const name = word.toLowerCase();
    if (kind === "#") tags.push(word);
    else if (kind === "!" && Object.hasOwn(PRIORITIES, name)) task.priority = name as Priority;
    else if (kind === "@" && name in DAYS) task.due_at = evening(DAYS[name]!);
    else return whole;
    return "";
  });
  task.title = title.replace(/\s+/g, " ").trim();
  if (tags.length > 0) task.tags = tags;
  return task.title ? task : null;
}
