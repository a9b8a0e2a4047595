/** A real Chromium against the real servers: pages of people who have just signed up, and what every view is held to. */
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { type Browser, type BrowserContext, type BrowserContextOptions, chromium, type Locator, type Page } from "playwright-core";

/** WEB_URL: the app. API_URL: the API. CHROMIUM: the browser. */
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
/** Milliseconds until something that has to happen has not: generous, since the machine may have much else to do. */
export const PATIENCE = 60_000;
const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

export const launch = (): Promise<Browser> => chromium.launch({ executablePath: CHROMIUM, headless: true, args: FLAGS, timeout: PATIENCE });

/** A browser of its own for one person: cookies are shared with nobody. */
export async function visitor(browser: Browser, options: BrowserContextOptions = {}): Promise<BrowserContext> {
  const context = await browser.newContext({ baseURL: WEB_URL, locale: "en-GB", reducedMotion: "reduce", ...options });
  context.setDefaultTimeout(PATIENCE);
  return context;
}

export interface Person {
  name: string;
  email: string;
  password: string;
}

let made = 0;
const run = Math.random().toString(36).slice(2, 10);

export const somebody = (name: string): Person => ({
  name,
  email: `${name.toLowerCase()}-${run}-${made++}@example.com`,
  password: "long-enough-for-a-test",
});

/** Signs up by the form; the page shows the person's tasks. */
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

/** A sign-out ends the tokens of its own second, too, so a sign-in within it would get one that is over. */
export const nextSecond = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, 1000 - (Date.now() % 1000)));

/** The page listens for changes made elsewhere. */
export const live = (page: Page): Promise<void> => page.getByText("Live", { exact: true }).waitFor();

export async function add(page: Page, line: string): Promise<void> {
  await page.getByLabel("New task").fill(line);
  await page.getByLabel("New task").press("Enter");
}

export const row = (page: Page, title: string): Locator => page.getByRole("listitem").filter({ hasText: title });
export const title = (page: Page, text: string): Locator => page.getByRole("button", { name: text, exact: true });

/** Waits until the page has told the API everything. */
export const settled = (page: Page): Promise<void> => page.locator("[data-unsent='0']").waitFor();

export const shown = (locator: Locator): Promise<void> => locator.first().waitFor({ state: "visible" });
export const gone = (locator: Locator): Promise<void> => locator.first().waitFor({ state: "hidden" });

interface Found {
  violations: { id: string; nodes: { html: string; failureSummary: string }[] }[];
}

const STANDARDS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];
/** What dark colours can change. */
const COLOURS = ["color-contrast", "link-in-text-block"];

/** Fails when axe-core finds anything on the page as it stands, in light or in dark. */
export async function accessible(page: Page, view: string): Promise<void> {
  if (!(await page.evaluate("'axe' in window"))) await page.evaluate(AXE);
  for (const [colorScheme, runOnly] of [["light", STANDARDS], ["dark", COLOURS]] as const) {
    await page.emulateMedia({ colorScheme, reducedMotion: "reduce" });
    const found = (await page.evaluate(`axe.run({ runOnly: ${JSON.stringify(runOnly)} })`)) as Found;
    const faults = found.violations.flatMap(({ id, nodes }) => nodes.map(({ html, failureSummary }) => `${id}: ${html}\n  ${failureSummary}`));
    assert.deepEqual(faults, [], `${view}, ${colorScheme}`);
  }
  await page.emulateMedia({ colorScheme: "light" });
}

/** A JWT of the person whose browser it is. */
export async function tokenOf(context: BrowserContext): Promise<string> {
  const response = await context.request.get("/api/auth/token");
  return ((await response.json()) as { token: string }).token;
}
