import { redirect } from "next/navigation";
import { ApiError } from "@frontend-contract/client";
import { apiOfPerson, apiUrl, person } from "@/auth/session.ts";
import { Suspended } from "@/auth/suspended.tsx";
import { Board } from "@/tasks/board.tsx";
import { forApi, readQuery } from "@/tasks/query.ts";
import type { Initial } from "@/tasks/store.ts";

type Search = Promise<Record<string, string | string[] | undefined>>;

/** The tasks, rendered on the server as the person who asks; from then on the browser speaks to the API itself. */
export default async function Page({ searchParams }: { searchParams: Search }) {
  const somebody = await person();
  if (!somebody) redirect("/sign-in");
  const words = Object.entries(await searchParams).filter((entry): entry is [string, string] => typeof entry[1] === "string");
  const query = readQuery(new URLSearchParams(words));
  const initial = await read(query);
  // A person whom the API turns away, though Better Auth knows them: suspended there.
  if (!initial) return <Suspended />;
  return <Board person={somebody} apiUrl={apiUrl()} query={query} initial={initial} rendered={now()} />;
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
