/** Accessibility: every view passes axe-core in both themes, and the app can be used with the keyboard alone. */
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import type { Browser, Page } from "playwright-core";
import { assertAccessible, add, API_URL, gone, launch, live, TIMEOUT, settled, shown, signUp, newPerson, title, visitor } from "./browser.ts";

let browser: Browser;
before(async () => (browser = await launch()), { timeout: TIMEOUT });
after(() => browser.close());

test("every view passes axe-core", async () => {
  const context = await visitor(browser);
  const page = await context.newPage();
  for (const path of ["/sign-in", "/sign-in?reason=suspended", "/sign-up", "/nowhere"]) {
    await page.goto(path);
    await shown(page.getByRole("heading", { level: 1 }));
    await assertAccessible(page, path);
  }
  await page.goto("/sign-in");
  await page.getByLabel("Email").fill("unknown@example.com");
  await page.getByLabel("Password").fill("wrong-password");
  await page.getByRole("button", { name: "Sign in" }).click();
  await shown(page.getByRole("alert").getByText("Invalid"));
  await assertAccessible(page, "a failed sign-in");
  await page.close();

  const tasks = await signUp(context, newPerson("Axe"));
  await assertAccessible(tasks, "no tasks");
  for (const line of ["Urgent #a !urgent @today", "High #b !high @tomorrow", "Low !low", "Finished"]) await add(tasks, line);
  await settled(tasks);
  await tasks.getByLabel("Done: Finished").click();
  await assertAccessible(tasks, "tasks, and a notice");
  await title(tasks, "Urgent").click();
  await assertAccessible(tasks, "the editor");
  await tasks.keyboard.press("Escape");
  await tasks.getByRole("button", { name: "Keyboard shortcuts" }).click();
  await assertAccessible(tasks, "the shortcuts");
  await tasks.keyboard.press("Escape");
  await tasks.getByRole("button", { name: "Delete: Low" }).click();
  await settled(tasks);
  await tasks.goto("/?deleted=true");
  await shown(tasks.locator("[data-open]", { hasText: "Low" }));
  await assertAccessible(tasks, "the trash");
  await tasks.getByLabel("Search").fill("no such task");
  await shown(tasks.getByText("The trash is empty"));
  await assertAccessible(tasks, "the empty trash");

  // Delay the API's response to see the loading state, then fail it.
  await tasks.goto("/");
  await live(tasks);
  let fail = () => {};
  await tasks.route(`${API_URL}/api/v1/tasks?*`, async (route) => {
    await new Promise<void>((resolve) => (fail = resolve));
    await route.fulfill({ status: 500 });
  });
  await tasks.getByLabel("Sort").selectOption("By title");
  await shown(tasks.getByText("Loading…"));
  await assertAccessible(tasks, "loading");
  fail();
  await shown(tasks.getByText("The tasks could not be loaded"));
  await assertAccessible(tasks, "an error");
  await tasks.unroute(`${API_URL}/api/v1/tasks?*`);
  await tasks.getByRole("button", { name: "Try again" }).click();
  await shown(title(tasks, "Urgent"));

  await tasks.setViewportSize({ width: 390, height: 800 });
  await assertAccessible(tasks, "on a phone");
  assert.ok(await tasks.evaluate(() => document.documentElement.scrollWidth <= window.innerWidth), "the page scrolls horizontally on a phone");
  await context.close();
});

const focused = (page: Page): Promise<string> => page.evaluate(() => document.activeElement?.textContent ?? "");
const press = async (page: Page, ...keys: string[]): Promise<void> => {
  for (const key of keys) await page.keyboard.press(key);
};

test("the app can be used with the keyboard alone", async () => {
  const context = await visitor(browser);
  const page = await context.newPage();
  const kim = newPerson("Kim");
  await page.goto("/sign-up");
  await page.waitForFunction(() => document.activeElement?.getAttribute("name") === "name");
  await page.keyboard.type(kim.name);
  await press(page, "Tab");
  await page.keyboard.type(kim.email);
  await press(page, "Tab");
  await page.keyboard.type(kim.password);
  await press(page, "Enter");
  await live(page);

  await press(page, "Tab");
  assert.equal(await focused(page), "Skip to tasks");
  await press(page, "n");
  await page.keyboard.type("First");
  await press(page, "Enter");
  await page.keyboard.type("Second");
  await press(page, "Enter", "Escape");
  await settled(page);

  await press(page, "j");
  assert.equal(await focused(page), "Second");
  await press(page, "j");
  assert.equal(await focused(page), "First");
  await press(page, "x");
  await page.locator("[data-status=done]").waitFor();
  await press(page, "z");
  await page.locator("[data-status=done]").waitFor({ state: "hidden" });

  await press(page, "k", "Enter");
  await shown(page.getByRole("dialog"));
  await press(page, "Tab");
  assert.equal(await page.evaluate(() => document.activeElement?.getAttribute("name")), "title");
  await press(page, "ControlOrMeta+a");
  await page.keyboard.type("Second, edited");
  await press(page, "Control+Enter");
  await gone(page.getByRole("dialog"));
  await shown(title(page, "Second, edited"));
  assert.equal(await focused(page), "Second, edited");

  await press(page, "Delete");
  await gone(title(page, "Second, edited"));
  assert.equal(await focused(page), "First");
  await press(page, "z");
  await shown(title(page, "Second, edited"));

  await press(page, "?");
  await shown(page.getByRole("dialog", { name: "Keyboard shortcuts" }));
  // Single-character shortcuts can be disabled; the dialog is still reachable with Tab.
  await press(page, "Tab", "Space", "Escape");
  await gone(page.getByRole("dialog"));
  await press(page, "?", "n");
  assert.notEqual(await page.evaluate(() => document.activeElement?.getAttribute("aria-label")), "New task");
  assert.equal(await page.getByRole("dialog").count(), 0);
  await page.getByRole("button", { name: "Keyboard shortcuts" }).focus();
  await press(page, "Enter", "Tab", "Space", "Escape");
  await press(page, "/");
  await page.keyboard.type("edited");
  await gone(title(page, "First"));
  await context.close();
});
