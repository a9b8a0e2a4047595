/** A change feed made of listings, for as long as the API has none of its own: what differs from the last look has changed. */
import type { Task } from "../../client.ts";

type Fetch = (input: string, init?: RequestInit) => Promise<Response>;

export function withSnapshotFeed(fetch: Fetch): Fetch {
  const rows = new Map<string, Task & { n: number }>();
  let n = 0;
  let turn: Promise<unknown> = Promise.resolve();

  async function look(base: string, init: RequestInit | undefined): Promise<void> {
    const seen = new Set<string>();
    for (let cursor = ""; ; ) {
      const response = await fetch(`${base}?limit=100&sort=created_at${cursor}`, init);
      if (!response.ok) throw new TypeError(`${response.status}`);
      const page = (await response.json()) as { items: Task[]; next_cursor: string | null };
      for (const task of page.items) {
        seen.add(task.id);
        if (rows.get(task.id)?.version !== task.version) rows.set(task.id, { ...task, n: ++n });
      }
      if (page.next_cursor === null) break;
      cursor = `&cursor=${page.next_cursor}`;
    }
    for (const row of rows.values()) {
      if (!seen.has(row.id) && !row.deleted_at) rows.set(row.id, { ...row, deleted_at: row.updated_at, version: 0, n: ++n });
    }
  }

  return async (input, init) => {
    const [path, query] = input.split("?");
    if (!path!.endsWith("/changes")) return fetch(input, init);
    const mine = turn.then(() => look(path!.replace("/changes", ""), init));
    turn = mine.catch(() => {});
    await mine;
    const since = Number(new URLSearchParams(query).get("since") ?? 0);
    const changed = [...rows.values()].filter((row) => row.n > since).sort((one, other) => one.n - other.n);
    const items = changed.slice(0, 5);
    const more = changed.length > 5;
    return Response.json({ items, next: `${more ? items.at(-1)!.n : n}`, more });
  };
}
