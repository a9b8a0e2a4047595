/** The reference configuration on a SQLite file. */
import { DatabaseSync } from "node:sqlite";
import { betterAuth } from "better-auth";
import { getMigrations } from "better-auth/db/migration";
import { authOptions } from "./auth.ts";
import { securityEvents } from "./security-events.ts";
import { serverOptions, type Settings } from "./settings.ts";

/**
 * Opens the database, migrates it, creates a signing key if there is none, and returns the Better Auth instance.
 *
 * url: the public URL. port: the port that the server listens on.
 */
export async function openReference(settings: Settings, { url, port }: { url: string; port: number }) {
  const database = new DatabaseSync(settings.database);
  database.exec("PRAGMA journal_mode = wal; PRAGMA synchronous = normal; PRAGMA busy_timeout = 5000");
  const options = authOptions({
    database,
    baseURL: url,
    secret: settings.secret,
    keyAlgorithm: settings.keyAlgorithm,
    keyRotation: settings.keyRotation,
    ...(settings.audience.length > 0 && { audience: settings.audience }),
  });
  const { securityEvents: endpoint, securityEventsAudience: audience } = settings;
  const events = endpoint ? [securityEvents({ endpoint, ...(audience && { audience }) })] : [];
  const auth = betterAuth({
    ...options,
    ...serverOptions(settings, port),
    user: { deleteUser: { enabled: true } },
    plugins: [...options.plugins, ...events],
  });
  await (await getMigrations(auth.options)).runMigrations();
  await auth.api.getJwks();
  return { auth, close: () => database.close() };
}
