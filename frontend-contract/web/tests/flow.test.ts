/** The main features of the app, as one user. */
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import type { Browser, BrowserContext, Page } from "playwright-core";
import { add, gone, launch, live, nextSecond, TIMEOUT, row, settled, shown, signIn, signUp, newPerson, title, tokenOf, visitor, API_URL } from "./browser.ts";

let browser: Browser;
before(async () => (browser = await launch()), { timeout: TIMEOUT });
after(() => browser.close());

const view = (page: Page, name: string) => page.getByRole("navigation").getByRole("link", { name: new RegExp(`^${name}`) });
const titles = (page: Page): Promise<string[]> => page.locator("[data-open]").allTextContents();

/** Waits until the list shows these titles. */
async function lists(page: Page, ...wanted: string[]): Promise<void> {
  await page.waitForFunction(
    (wanted) => JSON.stringify([...document.querySelectorAll("[data-open]")].map(({ textContent }) => textContent)) === wanted,
    JSON.stringify(wanted),
  ).catch(async () => assert.deepEqual(await titles(page), wanted));
}

/** Undoes the newest change. */
const undo = (page: Page) => page.getByRole("status", { name: "Notices" }).getByRole("button", { name: "Undo" }).last().click();

async function makeMany(context: BrowserContext, many: number): Promise<void> {
  const operations = Array.from({ length: many }, (_, i) => ({ op: "create", task: { title: `Number ${i}` } }));
  const response = await fetch(`${API_URL}/api/v1/tasks/batch`, {
    method: "POST",
    headers: { Authorization: `Bearer ${await tokenOf(context)}`, "Content-Type": "application/json" },
    body: JSON.stringify({ operations }),
  });
  assert.equal(response.status, 200);
}

test("tasks can be added, filtered, edited, deleted and restored between sign-up and the next sign-in", async () => {
  const ada = newPerson("Ada");
  const context = await visitor(browser);
  const page = await signUp(context, ada);
  await shown(page.getByText("No tasks yet"));

  await add(page, "Buy milk #home !high");
  await add(page, "Write the report #work @tomorrow");
  await add(page, "Call Grace #work !urgent");
  await lists(page, "Call Grace", "Write the report", "Buy milk");
  await settled(page);

  await page.getByLabel("Sort").selectOption("Highest priority first");
  await lists(page, "Call Grace", "Buy milk", "Write the report");
  await page.getByLabel("Priority").selectOption("High");
  await lists(page, "Buy milk");
  await page.getByLabel("Priority").selectOption("Any priority");
  await view(page, "work").click();
  await lists(page, "Call Grace", "Write the report");
  assert.match(page.url(), /tag=work/);
  await page.goBack();
  await lists(page, "Call Grace", "Buy milk", "Write the report");
  await page.getByLabel("Search").fill("REPORT");
  await lists(page, "Write the report");
  await page.getByLabel("Search").fill("no such task");
  await page.getByRole("button", { name: "Show all tasks" }).click();
  await lists(page, "Call Grace", "Buy milk", "Write the report");

  await title(page, "Buy milk").click();
  const editor = page.getByRole("dialog");
  await editor.getByLabel("Title").fill("Buy oat milk");
  await editor.getByLabel("Notes").fill("Two litres");
  await editor.getByLabel("In progress").check();
  await editor.getByLabel("Due").fill("2020-02-03T10:00");
  await editor.getByLabel("Tags").fill("shop");
  await editor.getByRole("button", { name: "Save" }).click();
  await shown(row(page, "Buy oat milk").getByText("Overdue"));
  await shown(row(page, "Buy oat milk").getByLabel("Tag shop"));
  await settled(page);
  await view(page, "Overdue").click();
  await lists(page, "Buy oat milk");
  await shown(view(page, "Overdue 1"));

  await page.getByLabel("Done: Buy oat milk").click();
  await shown(page.getByText("No overdue tasks"));
  await undo(page);
  await lists(page, "Buy oat milk");

  await view(page, "All tasks").click();
  await page.getByRole("button", { name: "Delete: Call Grace" }).click();
  await lists(page, "Buy oat milk", "Write the report");
  await undo(page);
  await lists(page, "Call Grace", "Buy oat milk", "Write the report");
  await page.getByRole("button", { name: "Delete: Call Grace" }).click();
  await settled(page);
  await view(page, "Trash").click();
  await lists(page, "Call Grace");
  await page.getByRole("button", { name: "Restore: Call Grace" }).click();
  await shown(page.getByText("The trash is empty"));
  await settled(page);

  await page.getByRole("button", { name: "Sign out" }).click();
  await page.waitForURL("**/sign-in");
  await nextSecond();
  await page.goto("/");
  await page.waitForURL("**/sign-in");
  await page.getByLabel("Email").fill(ada.email);
  await page.getByLabel("Password").fill("wrong-password");
  await page.getByRole("button", { name: "Sign in" }).click();
  await shown(page.getByRole("alert").getByText("Invalid email or password"));
  await signIn(page, ada);
  await lists(page, "Call Grace", "Write the report", "Buy oat milk");
  await context.close();
});

test("the server renders the first page with the tasks", async () => {
  const context = await visitor(browser);
  const page = await signUp(context, newPerson("Grace"));
  await add(page, "Rendered on the server");
  await settled(page);
  assert.match(await (await context.request.get("/")).text(), />Rendered on the server</);
  await context.close();
});

test("further pages are loaded on demand and in order", async () => {
  const context = await visitor(browser);
  const page = await signUp(context, newPerson("Many"));
  await makeMany(context, 70);
  await page.reload();
  await live(page);
  assert.equal((await titles(page)).length, 50);
  await page.getByRole("button", { name: "Load more" }).click();
  await gone(page.getByRole("button", { name: /Load/ }));
  assert.deepEqual(await titles(page), Array.from({ length: 70 }, (_, i) => `Number ${69 - i}`));
  await context.close();
});
