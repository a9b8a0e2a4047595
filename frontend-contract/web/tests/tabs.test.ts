/** Several tabs of one browser, conflicts, and working offline. */
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import type { Browser, BrowserContext, Page, Route } from "playwright-core";
import { assertAccessible, add, API_URL, gone, launch, live, nextSecond, TIMEOUT, row, settled, shown, signUp, newPerson, title, visitor, WEB_URL } from "./browser.ts";

let browser: Browser;
before(async () => (browser = await launch()), { timeout: TIMEOUT });
after(() => browser.close());

async function twoTabs(name: string): Promise<{ context: BrowserContext; one: Page; other: Page }> {
  const context = await visitor(browser);
  const one = await signUp(context, newPerson(name));
  const other = await context.newPage();
  await other.goto("/");
  await live(other);
  return { context, one, other };
}

test("changes in one tab appear in the other", async () => {
  const { context, one, other } = await twoTabs("Tabs");
  await add(one, "Seen in both #shared");
  await shown(title(other, "Seen in both"));
  await shown(other.getByRole("link", { name: /^shared/ }));
  await other.getByLabel("Done: Seen in both").click();
  await one.locator("[data-status=done]").waitFor();
  await one.getByRole("button", { name: "Delete: Seen in both" }).click();
  await gone(title(other, "Seen in both"));
  await one.getByRole("button", { name: "Undo" }).click();
  await shown(title(other, "Seen in both"));
  await context.close();
});

test("a conflict between two tabs shows both versions and can be merged", async () => {
  const { context, one, other } = await twoTabs("Conflict");
  await add(one, "Plan the trip");
  await shown(title(other, "Plan the trip"));
  await settled(one);

  const editor = one.getByRole("dialog");
  await title(one, "Plan the trip").click();
  await editor.getByLabel("Title").fill("Plan the trip to Oslo");
  await editor.getByLabel("Notes").fill("By train");

  await title(other, "Plan the trip").click();
  await other.getByRole("dialog").getByLabel("Title").fill("Plan the trip to Rome");
  await other.getByRole("dialog").getByLabel("Urgent").check();
  await other.getByRole("dialog").getByRole("button", { name: "Save" }).click();
  await settled(other);

  await shown(editor.getByText("Changed elsewhere since you opened it"));
  const [refusal] = await Promise.all([
    one.waitForResponse((response) => response.request().method() === "PATCH"),
    editor.getByRole("button", { name: "Save" }).click(),
  ]);
  assert.equal(refusal.status(), 412);
  const conflict = one.getByRole("dialog", { name: "Conflicting changes" });
  await shown(conflict);
  for (const text of ["Yours: Plan the trip to Oslo", "Theirs: Plan the trip to Rome", "Yours: By train", "Theirs: Urgent"]) {
    await shown(conflict.getByLabel(text));
  }
  await assertAccessible(one, "conflict");
  // Take their title. Members changed on one side only are already selected.
  await conflict.getByRole("group", { name: "Title" }).getByLabel("Theirs: Plan the trip to Rome").check();
  await conflict.getByRole("button", { name: "Save this version" }).click();
  await gone(conflict);
  await settled(one);
  for (const page of [one, other]) {
    await shown(row(page, "Plan the trip to Rome").getByText("Urgent"));
    await title(page, "Plan the trip to Rome").click();
    await page.waitForFunction(() => document.querySelector("textarea")?.value === "By train");
    await page.keyboard.press("Escape");
  }
  await context.close();
});

test("changes made offline are sent after reconnecting", async () => {
  const { context, one, other } = await twoTabs("Offline");
  await add(one, "Made with a network");
  await settled(one);
  await context.setOffline(true);
  await shown(one.getByText("You are offline."));
  await add(one, "Made without a network");
  await one.getByLabel("Done: Made with a network").click();
  await shown(title(one, "Made without a network"));
  await shown(one.getByText("2 changes are waiting to be sent."));
  await assertAccessible(one, "offline");
  await context.setOffline(false);
  await gone(one.getByText("You are offline."));
  await settled(one);
  await shown(title(other, "Made without a network"));
  await other.locator("[data-status=done]").filter({ hasText: "Made with a network" }).waitFor();
  await context.close();
});

/** The names of the users in the tokens of a page's requests to the API. */
function senders(page: Page): Set<string> {
  const names = new Set<string>();
  page.on("request", (request) => {
    const [, payload] = request.headers()["authorization"]?.split(".") ?? [];
    if (payload) names.add((JSON.parse(Buffer.from(payload, "base64url").toString()) as { name: string }).name);
  });
  return names;
}

test("unsent changes are discarded when another account signs in in another tab", async () => {
  const context = await visitor(browser);
  const [alice, bob] = [newPerson("Alice"), newPerson("Bob")];
  const one = await signUp(context, alice);
  await add(one, "Alice's task");
  await settled(one);
  await one.route(`${API_URL}/**`, (route) => route.abort());
  for (const line of ["Alice's draft", "Alice's other draft"]) await add(one, line);
  await shown(one.getByText("2 changes are waiting to be sent."));

  const other = await context.newPage();
  await other.goto("/");
  await live(other);
  await other.getByRole("button", { name: "Sign out" }).click();
  await other.waitForURL("**/sign-in");
  await nextSecond();
  await other.close();
  const bobs = await signUp(context, bob);
  const names = senders(one);
  await one.unroute(`${API_URL}/**`);

  await Promise.race([one.waitForURL("**/sign-in?reason=*"), settled(one)]);
  assert.ok(!names.has("Bob"), "the page sent something as Bob");
  await one.waitForURL("**/sign-in?reason=another");
  await shown(one.getByText("This browser is now signed in to a different account."));
  await shown(one.getByRole("link", { name: "Continue as Bob" }));
  await assertAccessible(one, "a change of account");
  assert.ok(!names.has("Bob"), "the page sent something as Bob");
  await bobs.reload();
  await live(bobs);
  await shown(bobs.getByText("No tasks yet"));
  await one.getByRole("link", { name: "Continue as Bob" }).click();
  await live(one);
  await shown(one.getByText("No tasks yet"));
  assert.ok(!(await one.content()).includes("Alice"));
  await context.close();
});

test("a page rendered for one account sends no request as another", async () => {
  const context = await visitor(browser);
  const [alice, bob] = [newPerson("Alice"), newPerson("Bob")];
  await (await signUp(context, bob)).close();
  await context.clearCookies();
  const one = await signUp(context, alice);
  await add(one, "Alice's task");
  await settled(one);
  // Bob's sign-in replaces the cookie after the server has rendered the page and before the page gets its first token.
  const names = senders(one);
  const replaceCookie = async (route: Route): Promise<void> => {
    const { email, password } = bob;
    const response = await context.request.post("/api/auth/sign-in/email", { data: { email, password }, headers: { Origin: WEB_URL } });
    assert.ok(response.ok(), await response.text());
    await route.continue();
  };
  await one.route("**/api/auth/token", replaceCookie, { times: 1 });
  await one.reload();
  await Promise.race([one.waitForURL("**/sign-in?reason=*"), live(one)]);
  assert.deepEqual([...names], []);
  await one.waitForURL("**/sign-in?reason=another");
  await context.close();
});
