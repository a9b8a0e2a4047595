/** Follows a person's changes and prints what happens, a JSON value a line. Asks for each token, and reads it, on the same way. */
import { createInterface } from "node:readline";
import { changes, createClient, tokenSource } from "../../client.ts";

const say = (value: object) => console.log(JSON.stringify(value));
const answers = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

const client = createClient({
  baseUrl: process.env["API_URL"]!,
  token: tokenSource(async () => {
    say({ wants: "token" });
    return (await answers.next()).value as string;
  }),
  async fetch(input, init) {
    const since = new Headers(init?.headers).get("Last-Event-ID");
    const response = await fetch(input, init);
    say({ status: response.status, since });
    return response;
  },
});

try {
  for await (const change of changes(client)) {
    say(change.type === "task" ? { title: change.task.title, gone: change.task.deleted_at !== null, token: change.token } : { title: null });
  }
} catch (error) {
  const { name, code } = error as Error & { code?: string };
  say({ name, code });
}
process.exit();
