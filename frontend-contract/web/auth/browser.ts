/** Clients of Better Auth and of the API, for the browser. */
import { cookieSession, createClient, type Client, type TokenSource } from "@frontend-contract/client";
import { createAuthClient } from "better-auth/client";

export const authClient = createAuthClient();

/** A client that sends requests only as the user with the id `subject`. Reload the page after a sign-in. */
export function apiOfBrowser(baseUrl: string, subject: string): { api: Client; token: TokenSource } {
  const token = cookieSession({ authUrl: "/api/auth", subject });
  return { api: createClient({ baseUrl, token }), token };
}
