import { redirect } from "next/navigation";
import { ApiError } from "@frontend-contract/client";
import { apiOfPerson, apiUrl, person } from "@/auth/session.ts";
import { Suspended } from "@/auth/suspended.tsx";
import { Board } from "@/tasks/board.tsx";
import { forApi, readQuery } from "@/tasks/query.ts";
import type { Initial } from "@/tasks/store.ts";

type Search = Promise<Record<string, string | string[] | undefined>>;

/** Renders the user's tasks on the server. From then on the browser calls the API directly. */
export default async function Page({ searchParams }: { searchParams: Search }) {
  const user = await person();
  if (!user) redirect("/sign-in");
  const parameters = Object.entries(await searchParams).filter((entry): entry is [string, string] => typeof entry[1] === "string");
  const query = readQuery(new URLSearchParams(parameters));
  const initial = await read(query);
  // Better Auth accepts the session, but the API returns 403: the account is suspended.
  if (!initial) return <Suspended />;
  return <Board person={user} apiUrl={apiUrl()} query={query} initial={initial} rendered={now()} />;
}

async function read(query: ReturnType<typeof readQuery>): Promise<Initial | null> {
  const api = await apiOfPerson();
  try {
    const [tasks, tags, summary] = await Promise.all([
      api.GET("/api/v1/tasks", { params: { query: forApi(query) } }),
      api.GET("/api/v1/tags"),
      api.GET("/api/v1/tasks/summary"),
    ]);
    return { page: tasks.data, tags: tags.data.items, summary: summary.data };
  } catch (error) {
    if (error instanceof ApiError && error.status === 403) return null;
    throw error;
  }
}

const now = (): number => Date.now();
