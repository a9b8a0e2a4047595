/** Runs the reference configuration for tests and development. */
import { DatabaseSync } from "node:sqlite";
import { betterAuth } from "better-auth";
import { getMigrations } from "better-auth/db/migration";
import { toNodeHandler } from "better-auth/node";
import { authOptions } from "./auth.ts";
import { type Location, type Running, serve } from "./serve.ts";
import { readSettings, type Settings } from "./settings.ts";

async function start(settings: Settings, { url, port }: Location): Promise<Running> {
  const database = new DatabaseSync(settings.database);
  database.exec("PRAGMA journal_mode = wal; PRAGMA synchronous = normal; PRAGMA busy_timeout = 5000");
  const auth = betterAuth({
    ...authOptions({
      database,
      baseURL: url,
      secret: settings.secret,
      keyAlgorithm: settings.keyAlgorithm,
      keyRotation: settings.keyRotation,
      trustedOrigins: [`http://localhost:${port}`, `http://127.0.0.1:${port}`],
      ...(settings.audience.length > 0 && { audience: settings.audience }),
    }),
    rateLimit: { enabled: settings.rateLimit },
    session: { cookieCache: { enabled: settings.cookieCache, maxAge: 5 * 60 } },
    advanced: { database: settings.serialIds ? { generateId: "serial" } : {} },
    databaseHooks: {
      user: {
        create: {
          // The first administrator of a real app is set in its database; here a test needs one over HTTP.
          before: async (user) =>
            settings.adminEmails.includes(user.email.toLowerCase()) ? { data: { ...user, role: "admin" } } : undefined,
        },
      },
    },
  });
  await (await getMigrations(auth.options)).runMigrations();
  await auth.api.getJwks();
  return { handle: toNodeHandler(auth), close: () => database.close() };
}

await serve(() => readSettings(process.env), start);
