/** Runs the reference configuration for tests and development. */
import { DatabaseSync } from "node:sqlite";
import { betterAuth } from "better-auth";
import { getMigrations } from "better-auth/db/migration";
import { toNodeHandler } from "better-auth/node";
import { authOptions } from "./auth.ts";
import { securityEvents } from "./security-events.ts";
import { type Location, type Running, serve } from "./serve.ts";
import { readSettings, serverOptions, type Settings } from "./settings.ts";

async function start(settings: Settings, { url, port }: Location): Promise<Running> {
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
  return { handle: toNodeHandler(auth), close: () => database.close() };
}

await serve(() => readSettings(process.env), start);
