/** Takes the screenshots for the README from a running app: `make web`, then `npm run screenshots`. */
import { fileURLToPath } from "node:url";
import type { Page } from "playwright-core";
import { API_URL, launch, live, settled, shown, signUp, newPerson, title, tokenOf, visitor } from "./browser.ts";

const FOLDER = fileURLToPath(new URL("../../../docs/images/", import.meta.url));

function at(days: number, hour: number): string {
  const date = new Date();
  date.setDate(date.getDate() + days);
  date.setHours(hour, 0, 0, 0);
  return date.toISOString();
}

const TASKS = [
  { title: "Renew the library card", tags: ["home"], status: "done" },
  { title: "Compare offers for the new bicycle", tags: ["home"], priority: "low" },
  { title: "Read “Notes by the Translator”, chapter G", tags: ["reading"], status: "in_progress" },
  { title: "Book the train to Turin", tags: ["travel"], due_at: at(4, 12) },
  { title: "Answer Charles about the mill", tags: ["work"], due_at: at(1, 17), priority: "high" },
  { title: "Send the punched cards to the printer", tags: ["work"], due_at: at(-1, 18), priority: "urgent" },
  { title: "Draft the table of Bernoulli numbers", description: "Check the signs of B7 twice.", tags: ["reading", "work"], due_at: at(2, 9), priority: "high", status: "in_progress" },
  { title: "Pick up flowers for Mary", tags: ["home"], due_at: at(1, 10) },
];

async function picture(page: Page, name: string): Promise<void> {
  await page.mouse.move(0, 0);
  await page.evaluate(() => document.fonts.ready);
  await page.screenshot({ path: `${FOLDER}${name}.png` });
}

const browser = await launch();
const context = await visitor(browser, { viewport: { width: 1200, height: 760 } });
const page = await signUp(context, { ...newPerson("Ada"), name: "Ada Lovelace", email: `ada@${Date.now().toString(36)}.example` });
const response = await fetch(`${API_URL}/api/v1/tasks/batch`, {
  method: "POST",
  headers: { Authorization: `Bearer ${await tokenOf(context)}`, "Content-Type": "application/json" },
  body: JSON.stringify({ operations: TASKS.map((task) => ({ op: "create", task })) }),
});
if (!response.ok) throw new Error(await response.text());
await page.reload();
await live(page);
await shown(page.getByRole("link", { name: /^All tasks 8/ }));
await picture(page, "web-light");
await page.emulateMedia({ colorScheme: "dark" });
await title(page, "Draft the table of Bernoulli numbers").click();
await shown(page.getByRole("dialog"));
await picture(page, "web-dark");
await page.keyboard.press("Escape");
await page.emulateMedia({ colorScheme: "light" });

const phone = await visitor(browser, { viewport: { width: 390, height: 720 }, deviceScaleFactor: 1.5, hasTouch: true, storageState: await context.storageState() });
const small = await phone.newPage();
await small.goto("/");
await live(small);
await small.getByLabel("Done: Pick up flowers for Mary").tap();
await settled(small);
await shown(small.getByRole("button", { name: "Undo" }));
await picture(small, "web-phone");
await browser.close();
