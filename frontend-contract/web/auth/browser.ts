/** Better Auth, and the API in the name of whoever is signed in, from the browser. */
import { cookieSession, createClient, type Client, type TokenSource } from "@frontend-contract/client";
import { createAuthClient } from "better-auth/client";

export const authClient = createAuthClient();

/** For one page and one person: whoever signs in next loads the page anew. */
export function apiOfBrowser(baseUrl: string): { api: Client; token: TokenSource } {
  const token = cookieSession({ authUrl: "/api/auth" });
  return { api: createClient({ baseUrl, token }), token };
}
