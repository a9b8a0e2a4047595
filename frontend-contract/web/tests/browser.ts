/** Helpers for the browser tests, which run Chromium against the real servers. */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { type Browser, type BrowserContext, type BrowserContextOptions, chromium, type Locator, type Page } from "playwright-core";

/** Addresses of the app and the API, and the path of the browser. */
export const { WEB_URL = "", API_URL = "", CHROMIUM = "" } = process.env;

const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];
/** Milliseconds. Generous, since the machine may be busy. */
export const TIMEOUT = 60_000;
const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

export const launch = (): Promise<Browser> => chromium.launch({ executablePath: CHROMIUM, headless: true, args: FLAGS, timeout: TIMEOUT });

/** A new browser context, with its own cookies. */
export async function visitor(browser: Browser, options: BrowserContextOptions = {}): Promise<BrowserContext> {
  const context = await browser.newContext({ baseURL: WEB_URL, locale: "en-GB", reducedMotion: "reduce", ...options });
  context.setDefaultTimeout(TIMEOUT);
  return context;
}

export interface Person {
  name: string;
  email: string;
  password: string;
}

let made = 0;
const run = Math.random().toString(36).slice(2, 10);

export const newPerson = (name: string): Person => ({
  name,
  email: `${name.toLowerCase()}-${run}-${made++}@example.com`,
  password: "long-enough-for-a-test",
});

/** Signs up with the form and waits for the task list. */
export async function signUp(context: BrowserContext, person: Person): Promise<Page> {
  const page = await context.newPage();
  await page.goto("/sign-up");
  await page.getByLabel("Name").fill(person.name);
  await page.getByLabel("Email").fill(person.email);
  await page.getByLabel("Password").fill(person.password);
  await page.getByRole("button", { name: "Create account" }).click();
  await live(page);
  return page;
}

export async function signIn(page: Page, { email, password }: Person): Promise<void> {
  await page.goto("/sign-in");
  await page.getByLabel("Email").fill(email);
  await page.getByLabel("Password").fill(password);
  await page.getByRole("button", { name: "Sign in" }).click();
  await live(page);
}

/** Waits for the next second: a sign-out also revokes the tokens issued within the same second. */
export const nextSecond = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, 1000 - (Date.now() % 1000)));

/** Waits until the page is connected to the change stream. */
export const live = (page: Page): Promise<void> => page.getByText("Live", { exact: true }).waitFor();

export async function add(page: Page, line: string): Promise<void> {
  await page.getByLabel("New task").fill(line);
  await page.getByLabel("New task").press("Enter");
}

export const row = (page: Page, title: string): Locator => page.getByRole("listitem").filter({ hasText: title });
export const title = (page: Page, text: string): Locator => page.getByRole("button", { name: text, exact: true });

/** Waits until the page has sent all changes. */
export const settled = (page: Page): Promise<void> => page.locator("[data-unsent='0']").waitFor();

export const shown = (locator: Locator): Promise<void> => locator.first().waitFor({ state: "visible" });
export const gone = (locator: Locator): Promise<void> => locator.first().waitFor({ state: "hidden" });

interface Found {
  violations: { id: string; nodes: { html: string; failureSummary: string }[] }[];
}

const STANDARDS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];
/** Rules that depend on colours. */
const COLOURS = ["color-contrast", "link-in-text-block"];

/** Asserts that axe-core finds no violation on the page, in the light and the dark theme. */
export async function assertAccessible(page: Page, view: string): Promise<void> {
  if (!(await page.evaluate("'axe' in window"))) await page.evaluate(AXE);
  for (const [colorScheme, runOnly] of [["light", STANDARDS], ["dark", COLOURS]] as const) {
    await page.emulateMedia({ colorScheme, reducedMotion: "reduce" });
    const found = (await page.evaluate(`axe.run({ runOnly: ${JSON.stringify(runOnly)} })`)) as Found;
    const faults = found.violations.flatMap(({ id, nodes }) => nodes.map(({ html, failureSummary }) => `${id}: ${html}\n  ${failureSummary}`));
    assert.deepEqual(faults, [], `${view}, ${colorScheme}`);
  }
  await page.emulateMedia({ colorScheme: "light" });
}

/** A JWT of the user who is signed in. */
export async function tokenOf(context: BrowserContext): Promise<string> {
  const response = await context.request.get("/api/auth/token");
  return ((await response.json()) as { token: string }).token;
}
