/** Isolation of users, and bans and key rotation during a session. */
import assert from "node:assert/strict";
import { DatabaseSync } from "node:sqlite";
import { after, before, test } from "node:test";
import type { Browser, Page } from "playwright-core";
import { add, launch, live, TIMEOUT, settled, shown, signUp, newPerson, title, visitor, WEB_URL } from "./browser.ts";

/** ISSUER_DATABASE: Better Auth's SQLite file. ADMIN_EMAIL: the address whose account is an administrator. */
const { ISSUER_DATABASE = "", ADMIN_EMAIL = "" } = process.env;

let browser: Browser;
before(async () => (browser = await launch()), { timeout: TIMEOUT });
after(() => browser.close());

test("users do not see each other's tasks", async () => {
  const [ada, grace] = [await visitor(browser), await visitor(browser)];
  const [adas, graces] = [await signUp(ada, newPerson("Ada")), await signUp(grace, newPerson("Grace"))];
  await add(adas, "Ada's secret #ada");
  await add(graces, "Grace's secret #grace");
  await Promise.all([settled(adas), settled(graces)]);
  for (const [page, own, foreign] of [[adas, "Ada's", "Grace's"], [graces, "Grace's", "Ada's"]] as const) {
    // As rendered in the browser, and as rendered on the server.
    for (const prepare of [async () => {}, () => page.reload()]) {
      await prepare();
      await live(page);
      await shown(title(page, `${own} secret`));
      assert.ok(!(await page.content()).includes(`${foreign} secret`));
    }
    await page.getByLabel("Search").fill("secret");
    await page.waitForURL("**q=secret");
    await shown(title(page, `${own} secret`));
    assert.equal(await page.locator("[data-task]").count(), 1);
  }
  await Promise.all([ada.close(), grace.close()]);
});

async function asAdministrator(path: string, body?: object): Promise<Response> {
  const admin = { name: "Root", email: ADMIN_EMAIL, password: "long-enough-for-a-test" };
  const signedUp = await post("/sign-up/email", admin);
  const signedIn = signedUp.ok ? signedUp : await post("/sign-in/email", admin);
  return post(path, body, signedIn.headers.get("set-auth-token") ?? "");
}

const post = (path: string, body?: object, bearer?: string): Promise<Response> =>
  fetch(`${WEB_URL}/api/auth${path}`, {
    method: body ? "POST" : "GET",
    headers: { "Content-Type": "application/json", Origin: WEB_URL, ...(bearer && { Authorization: `Bearer ${bearer}` }) },
    ...(body && { body: JSON.stringify(body) }),
  });

test("a banned user is signed out immediately and cannot sign in again", async () => {
  const context = await visitor(browser);
  const eve = newPerson("Eve");
  const page = await signUp(context, eve);
  await add(page, "One last task");
  await settled(page);
  const found = await asAdministrator(`/admin/list-users?searchField=email&searchValue=${encodeURIComponent(eve.email)}`);
  const { users } = (await found.json()) as { users: { id: string }[] };
  const banned = await asAdministrator("/admin/ban-user", { userId: users[0]!.id });
  assert.equal(banned.status, 200, await banned.text());

  await page.waitForURL("**/sign-in?reason=*");
  await shown(page.getByText(/account has been suspended|session has ended/));
  await page.getByLabel("Email").fill(eve.email);
  await page.getByLabel("Password").fill(eve.password);
  await page.getByRole("button", { name: "Sign in" }).click();
  await shown(page.getByRole("alert").getByText(/banned/i));
  await context.close();
});

/** The `kid` of the token in the next request to the API. */
async function keyOfNext(page: Page, act: () => Promise<unknown>): Promise<string> {
  const [request] = await Promise.all([page.waitForRequest((request) => Boolean(request.headers()["authorization"])), act()]);
  const [head = ""] = (request.headers()["authorization"] ?? "").replace("Bearer ", "").split(".");
  return (JSON.parse(Buffer.from(head, "base64url").toString()) as { kid: string }).kid;
}

test("a session continues when the signing keys are rotated", async () => {
  const context = await visitor(browser);
  const page = await signUp(context, newPerson("Kay"));
  const before = await keyOfNext(page, () => add(page, "Before the rotation"));
  await settled(page);
  const database = new DatabaseSync(ISSUER_DATABASE);
  database.exec("UPDATE jwks SET expiresAt = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-1 second')");
  database.close();
  await add(page, "With the old token");
  await settled(page);
  const after = await keyOfNext(page, () => page.reload());
  assert.notEqual(after, before);
  await live(page);
  await add(page, "With the new key");
  await settled(page);
  await page.reload();
  for (const text of ["Before the rotation", "With the old token", "With the new key"]) await shown(title(page, text));
  await context.close();
});
