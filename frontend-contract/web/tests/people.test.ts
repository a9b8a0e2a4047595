/** Who may see what, and what becomes of somebody who is signed in when that changes. */
import assert from "node:assert/strict";
import { DatabaseSync } from "node:sqlite";
import { after, before, test } from "node:test";
import type { Browser, Page } from "playwright-core";
import { add, launch, live, PATIENCE, settled, shown, signUp, somebody, title, visitor, WEB_URL } from "./browser.ts";

/** ISSUER_DATABASE: Better Auth's SQLite file. ADMIN_EMAIL: who signs up with it is an administrator. */
const { ISSUER_DATABASE = "", ADMIN_EMAIL = "" } = process.env;

let browser: Browser;
before(async () => (browser = await launch()), { timeout: PATIENCE });
after(() => browser.close());

test("two people in two browsers never see each other's tasks", async () => {
  const [ada, grace] = [await visitor(browser), await visitor(browser)];
  const [hers, others] = [await signUp(ada, somebody("Ada")), await signUp(grace, somebody("Grace"))];
  await add(hers, "Ada's secret #hers");
  await add(others, "Grace's secret #others");
  await Promise.all([settled(hers), settled(others)]);
  for (const [page, own, foreign] of [[hers, "Ada's", "Grace's"], [others, "Grace's", "Ada's"]] as const) {
    // As the browser shows it, and as the server renders it.
    for (const again of [async () => {}, () => page.reload()]) {
      await again();
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

test("whoever is banned while signed in is shown out at once, and cannot come back", async () => {
  const context = await visitor(browser);
  const eve = somebody("Eve");
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

/** The id of the key that signed the token of the next request to the API. */
async function keyOfNext(page: Page, act: () => Promise<unknown>): Promise<string> {
  const [request] = await Promise.all([page.waitForRequest((request) => Boolean(request.headers()["authorization"])), act()]);
  const [head = ""] = (request.headers()["authorization"] ?? "").replace("Bearer ", "").split(".");
  return (JSON.parse(Buffer.from(head, "base64url").toString()) as { kid: string }).kid;
}

test("whoever is signed in notices nothing when the keys are rotated", async () => {
  const context = await visitor(browser);
  const page = await signUp(context, somebody("Kay"));
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
