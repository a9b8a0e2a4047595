/** Several tabs of one browser, and a network that goes away. */
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import type { Browser, BrowserContext, Page, Route } from "playwright-core";
import { accessible, add, API_URL, gone, launch, live, nextSecond, PATIENCE, row, settled, shown, signUp, somebody, title, visitor, WEB_URL } from "./browser.ts";

let browser: Browser;
before(async () => (browser = await launch()), { timeout: PATIENCE });
after(() => browser.close());

async function twoTabs(name: string): Promise<{ context: BrowserContext; one: Page; other: Page }> {
  const context = await visitor(browser);
  const one = await signUp(context, somebody(name));
  const other = await context.newPage();
  await other.goto("/");
  await live(other);
  return { context, one, other };
}

test("what one tab does, the other shows", async () => {
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

test("two tabs that edit one task: both versions are shown, and merged", async () => {
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
  const dispute = one.getByRole("dialog", { name: "Two versions of one task" });
  await shown(dispute);
  for (const text of ["Yours: Plan the trip to Oslo", "Theirs: Plan the trip to Rome", "Yours: By train", "Theirs: Urgent"]) {
    await shown(dispute.getByLabel(text));
  }
  await accessible(one, "conflict");
  // Theirs for the title; what only one of them touched is already as that one wanted it.
  await dispute.getByRole("group", { name: "Title" }).getByLabel("Theirs: Plan the trip to Rome").check();
  await dispute.getByRole("button", { name: "Save this version" }).click();
  await gone(dispute);
  await settled(one);
  for (const page of [one, other]) {
    await shown(row(page, "Plan the trip to Rome").getByText("Urgent"));
    await title(page, "Plan the trip to Rome").click();
    await page.waitForFunction(() => document.querySelector("textarea")?.value === "By train");
    await page.keyboard.press("Escape");
  }
  await context.close();
});

test("without a network the person is told, goes on, and loses nothing", async () => {
  const { context, one, other } = await twoTabs("Offline");
  await add(one, "Made with a network");
  await settled(one);
  await context.setOffline(true);
  await shown(one.getByText("You are offline."));
  await add(one, "Made without a network");
  await one.getByLabel("Done: Made with a network").click();
  await shown(title(one, "Made without a network"));
  await shown(one.getByText("2 changes wait to be sent."));
  await accessible(one, "offline");
  await context.setOffline(false);
  await gone(one.getByText("You are offline."));
  await settled(one);
  await shown(title(other, "Made without a network"));
  await other.locator("[data-status=done]").filter({ hasText: "Made with a network" }).waitFor();
  await context.close();
});

/** The people in whose names a page has sent something to the API. */
function senders(page: Page): Set<string> {
  const names = new Set<string>();
  page.on("request", (request) => {
    const [, payload] = request.headers()["authorization"]?.split(".") ?? [];
    if (payload) names.add((JSON.parse(Buffer.from(payload, "base64url").toString()) as { name: string }).name);
  });
  return names;
}

test("what one person has not sent is not sent as the next who signs in in another tab", async () => {
  const context = await visitor(browser);
  const [alice, bob] = [somebody("Alice"), somebody("Bob")];
  const one = await signUp(context, alice);
  await add(one, "Alice's task");
  await settled(one);
  await one.route(`${API_URL}/**`, (route) => route.abort());
  for (const line of ["Alice's draft", "Alice's other draft"]) await add(one, line);
  await shown(one.getByText("2 changes wait to be sent."));

  const other = await context.newPage();
  await other.goto("/");
  await live(other);
  await other.getByRole("button", { name: "Sign out" }).click();
  await other.waitForURL("**/sign-in");
  await nextSecond();
  await other.close();
  const his = await signUp(context, bob);
  const names = senders(one);
  await one.unroute(`${API_URL}/**`);

  await Promise.race([one.waitForURL("**/sign-in?reason=*"), settled(one)]);
  assert.ok(!names.has("Bob"), "the page sent something as Bob");
  await one.waitForURL("**/sign-in?reason=another");
  await shown(one.getByText("A different account has signed in in this browser."));
  await shown(one.getByRole("link", { name: "Continue as Bob" }));
  await accessible(one, "another person");
  assert.ok(!names.has("Bob"), "the page sent something as Bob");
  await his.reload();
  await live(his);
  await shown(his.getByText("Nothing to do"));
  await one.getByRole("link", { name: "Continue as Bob" }).click();
  await live(one);
  await shown(one.getByText("Nothing to do"));
  assert.ok(!(await one.content()).includes("Alice"));
  await context.close();
});

test("a page that was made for one person does not become another's", async () => {
  const context = await visitor(browser);
  const [alice, bob] = [somebody("Alice"), somebody("Bob")];
  await (await signUp(context, bob)).close();
  await context.clearCookies();
  const one = await signUp(context, alice);
  await add(one, "Alice's task");
  await settled(one);
  // Bob's sign-in replaces the cookie after the server has rendered the page, and before the page takes a token.
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
