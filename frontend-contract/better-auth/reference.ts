/** The reference configuration on a SQLite file: its tables made, and a key there to sign with. */
import { DatabaseSync } from "node:sqlite";
import { betterAuth } from "better-auth";
import { getMigrations } from "better-auth/db/migration";
import { authOptions } from "./auth.ts";
import { securityEvents } from "./security-events.ts";
import { serverOptions, type Settings } from "./settings.ts";

/** The instance, and what closes its database. `url` is the public address, `port` the one that was opened. */
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
