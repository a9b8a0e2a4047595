/** The Better Auth instance of this app: the reference configuration on SQLite. Replace it with your own configuration. */
import { openReference } from "@frontend-contract/better-auth/reference.ts";
import { readSettings } from "@frontend-contract/better-auth/settings.ts";

type Auth = Awaited<ReturnType<typeof openReference>>["auth"];

let opened: Promise<Auth> | null = null;

/** Returns the instance; the first call opens it, so that a build does not create a database. */
export function auth(): Promise<Auth> {
  return (opened ??= open());
}

async function open(): Promise<Auth> {
  const settings = readSettings(process.env);
  const url = settings.url ?? `http://localhost:${settings.port}`;
  return (await openReference(settings, { url, port: settings.port })).auth;
}
