/** The signed-in user and an API client, for server components. */
import { createClient, cookieSession, type Client } from "@frontend-contract/client";
import { headers } from "next/headers";
import { cache } from "react";
import { auth } from "./instance.ts";

export interface Person {
  id: string;
  name: string;
  email: string;
}

/** The signed-in user, or null without a session. Looked up once per request. */
export const person = cache(async (): Promise<Person | null> => {
  const session = await (await auth()).api.getSession({ headers: await headers() });
  return session && { id: session.user.id, name: session.user.name, email: session.user.email };
});

/** An API client for the user of the current request. */
export async function apiOfPerson(): Promise<Client> {
  const { handler, options } = await auth();
  const token = cookieSession({
    authUrl: `${options.baseURL}/api/auth`,
    cookie: (await headers()).get("cookie") ?? "",
    // Better Auth runs in this process, so no network request is needed.
    fetch: (input, init) => handler(new Request(input, init)),
  });
  return createClient({ baseUrl: apiUrl(), token, retries: 1, timeout: 10_000 });
}

/** Address of the API, for this server and the browser. Read at run time, so that builds do not depend on it. */
export const apiUrl = (): string => process.env["API_URL"] || "http://127.0.0.1:8000";
