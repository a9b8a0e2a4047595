/** Prints a user's changes as lines of JSON. Requests tokens on standard output and reads them from standard input. */
import { createInterface } from "node:readline";
import { changes, createClient, tokenSource } from "../../client.ts";

const print = (value: object) => console.log(JSON.stringify(value));
const answers = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

const client = createClient({
  baseUrl: process.env["API_URL"]!,
  token: tokenSource(async () => {
    print({ wants: "token" });
    return (await answers.next()).value as string;
  }),
  async fetch(input, init) {
    const since = new Headers(init?.headers).get("Last-Event-ID");
    const response = await fetch(input, init);
    print({ status: response.status, since });
    return response;
  },
});

try {
  for await (const change of changes(client)) {
    print(change.type === "task" ? { title: change.task.title, gone: change.task.deleted_at !== null, token: change.token } : { title: null });
  }
} catch (error) {
  const { name, code } = error as Error & { code?: string };
  print({ name, code });
}
process.exit();
