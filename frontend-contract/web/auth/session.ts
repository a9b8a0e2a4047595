/** Who is asking, for server components: their session, and the API in their name. */
import { createClient, cookieSession, type Client } from "@frontend-contract/client";
import { headers } from "next/headers";
import { cache } from "react";
import { auth } from "./instance.ts";

export interface Person {
  id: string;
  name: string;
  email: string;
}

/** Null: nobody is signed in. Looked up once for each request. */
export const person = cache(async (): Promise<Person | null> => {
  const session = await (await auth()).api.getSession({ headers: await headers() });
  return session && { id: session.user.id, name: session.user.name, email: session.user.email };
});

/** One for each request: it speaks for the person whose cookie the request brought. */
export async function apiOfPerson(): Promise<Client> {
  const { handler, options } = await auth();
  const token = cookieSession({
    authUrl: `${options.baseURL}/api/auth`,
    cookie: (await headers()).get("cookie") ?? "",
    // Better Auth is in this very process: no way over the network.
    fetch: (input, init) => handler(new Request(input, init)),
  });
  return createClient({ baseUrl: apiUrl(), token, retries: 1, timeout: 10_000 });
}

/** Where the API is, for this server and for the browser: read when asked for, so that one build serves anywhere. */
export const apiUrl = (): string => process.env["API_URL"] || "http://127.0.0.1:8000";
