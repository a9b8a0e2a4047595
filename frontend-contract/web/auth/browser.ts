/** Better Auth, and the API in the name of whoever is signed in, from the browser. */
import { cookieSession, createClient, type Client, type TokenSource } from "@frontend-contract/client";
import { createAuthClient } from "better-auth/client";

export const authClient = createAuthClient();

/** For one page and one person, whose id is `subject`: after a sign-in the page is loaded anew. */
export function apiOfBrowser(baseUrl: string, subject: string): { api: Client; token: TokenSource } {
  const token = cookieSession({ authUrl: "/api/auth", subject });
  return { api: createClient({ baseUrl, token }), token };
}
