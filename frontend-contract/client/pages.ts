/** Listings as what they are to a program: one item after the other, page by page. */
import type { Client, Data, paths } from "../client.ts";

type Page = { items: readonly unknown[]; next_cursor: string | null };
/** The paths whose GET answers in pages. */
export type Paged = { [P in keyof paths]: paths[P] extends { get: infer O } ? (Data<O> extends Page ? P : never) : never }[keyof paths];
type Get<P extends Paged> = paths[P] extends { get: infer O } ? O : never;
type Item<P extends Paged> = Data<Get<P>> extends { items: (infer I)[] } ? I : never;
type Query<P extends Paged> = Get<P> extends { parameters: { query?: infer Q } } ? NonNullable<Q> : never;

/**
 * Every item of a listing; the next page is fetched when it is reached.
 *
 * query: filters, sort, and `limit`: how many on a page. Throws like `client.GET`.
 */
export async function* pages<P extends Paged>(
  client: Client,
  path: P,
  query: Omit<Query<P>, "cursor" | "count"> = {} as Query<P>,
  { signal }: { signal?: AbortSignal } = {},
): AsyncGenerator<Item<P>, void, undefined> {
  // What the path says of it is lost on a compiler that cannot know which path it is.
  const get = client.GET as (path: P, init: object) => Promise<{ data: Page }>;
  let cursor: string | null = null;
  do {
    const { data } = await get(path, { params: { query: { ...query, ...(cursor !== null && { cursor }) } }, signal });
    yield* data.items as Item<P>[];
    cursor = data.next_cursor;
  } while (cursor !== null);
}
