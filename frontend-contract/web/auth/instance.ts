/** Better Auth as part of this app: the reference configuration on SQLite. An app of your own has its own here. */
import { openReference } from "@frontend-contract/better-auth/reference.ts";
import { readSettings } from "@frontend-contract/better-auth/settings.ts";

type Auth = Awaited<ReturnType<typeof openReference>>["auth"];

let opened: Promise<Auth> | null = null;

/** The one instance of this server, opened when it is first needed: a build must not make a database. */
export function auth(): Promise<Auth> {
  return (opened ??= open());
}

async function open(): Promise<Auth> {
  const settings = readSettings(process.env);
  const url = settings.url ?? `http://localhost:${settings.port}`;
  return (await openReference(settings, { url, port: settings.port })).auth;
}
