/** Iteration over paginated listings. */
import type { Client, Data, paths } from "../client.ts";

type Page = { items: readonly unknown[]; next_cursor: string | null };
/** The paths with a paginated GET. */
export type Paged = { [P in keyof paths]: paths[P] extends { get: infer O } ? (Data<O> extends Page ? P : never) : never }[keyof paths];
type Get<P extends Paged> = paths[P] extends { get: infer O } ? O : never;
type Item<P extends Paged> = Data<Get<P>> extends { items: (infer I)[] } ? I : never;
type Query<P extends Paged> = Get<P> extends { parameters: { query?: infer Q } } ? NonNullable<Q> : never;

/**
 * Yields every item of a listing. Fetches each page when it is reached.
 *
 * query: filters, sort, and `limit`, the page size. Throws the same errors as `client.GET`.
 */
export async function* pages<P extends Paged>(
  client: Client,
  path: P,
  query: Omit<Query<P>, "cursor" | "count"> = {} as Query<P>,
  { signal }: { signal?: AbortSignal } = {},
): AsyncGenerator<Item<P>, void, undefined> {
  // The compiler cannot resolve the response type of a generic path.
  const get = client.GET as (path: P, init: object) => Promise<{ data: Page }>;
  let cursor: string | null = null;
  do {
    const { data } = await get(path, { params: { query: { ...query, ...(cursor !== null && { cursor }) } }, signal });
    yield* data.items as Item<P>[];
    cursor = data.next_cursor;
  } while (cursor !== null);
}
