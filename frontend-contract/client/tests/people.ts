/** Users of a real Better Auth server, for tests. */
import { uuid } from "../uuid.ts";

/** Signs up a new user. Returns the session cookie, the session token (`bearer`) and a function that signs out. */
export async function signUp(authUrl: string) {
  const headers = { "Content-Type": "application/json", Origin: new URL(authUrl).origin };
  const body = JSON.stringify({ email: `${uuid()}@example.com`, password: "long-enough-for-a-test", name: "Ada" });
  const response = await fetch(`${authUrl}/sign-up/email`, { method: "POST", headers, body });
  if (!response.ok) throw new Error(`sign-up: ${response.status} ${await response.text()}`);
  const cookie = response.headers.getSetCookie().map((line) => line.split(";")[0]).join("; ");
  const signOut = () => fetch(`${authUrl}/sign-out`, { method: "POST", headers: { ...headers, Cookie: cookie }, body: "{}" });
  return { cookie, bearer: response.headers.get("set-auth-token")!, signOut };
}
