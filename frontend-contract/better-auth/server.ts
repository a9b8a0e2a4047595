/** Runs the reference configuration on loopback for tests and development; it lives no longer than its parent. */
import { Console } from "node:console";
import { fstatSync } from "node:fs";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { DatabaseSync } from "node:sqlite";
import { betterAuth } from "better-auth";
import { getMigrations } from "better-auth/db/migration";
import { toNodeHandler } from "better-auth/node";
import { authOptions } from "./auth.ts";
import { readSettings, SettingsError, type Settings } from "./settings.ts";

// Standard output carries the readiness line and nothing else, whoever else prints.
globalThis.console = new Console(process.stderr, process.stderr);

/** Where the server is found: what it prints when it is ready. */
interface Ready {
  /** What `BETTER_AUTH_URL` should say. */
  url: string;
  /** Where the endpoints are: `url`, and `/api/auth` unless the URL has a path of its own. */
  base_url: string;
  jwks_url: string;
  issuer: string;
  port: number;
}

function located(url: string | null, port: number): Ready {
  const parsed = new URL(url ?? `http://localhost:${port}`);
  if (parsed.port === "0") parsed.port = String(port);
  const address = parsed.href.replace(/\/+$/, "");
  const base = parsed.pathname === "/" ? `${address}/api/auth` : address;
  return { url: address, base_url: base, jwks_url: `${base}/jwks`, issuer: parsed.origin, port };
}

async function startAuth(settings: Settings, { url, port }: Ready) {
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
  return { database, handle: toNodeHandler(auth) };
}

function welcome(ready: Ready, request: IncomingMessage, response: ServerResponse): void {
  const { base_url, jwks_url, issuer } = ready;
  const about = {
    server: "Better Auth reference issuer, for development and tests",
    issuer,
    jwks: jwks_url,
    sign_up: `POST ${base_url}/sign-up/email {"name", "email", "password"}`,
    sign_in: `POST ${base_url}/sign-in/email {"email", "password"}`,
    sign_out: `POST ${base_url}/sign-out`,
    token: `GET ${base_url}/token with the session cookie, or with the bearer from the header set-auth-token`,
    session: `GET ${base_url}/get-session`,
  };
  if (request.headers.accept?.includes("text/html")) {
    const rows = Object.entries(about).map(([name, text]) => `<dt>${name}<dd><code>${escaped(text)}</code>`);
    response.setHeader("content-type", "text/html; charset=utf-8");
    response.end(
      `<!doctype html><html lang="en"><meta charset="utf-8"><title>Better Auth</title>` +
        `<style>body{font:1rem/1.5 system-ui;max-width:50rem;margin:3rem auto;padding:0 1rem;color-scheme:light dark}` +
        `dt{margin-top:1rem;font-weight:600}dd{margin:0}</style><h1>Better Auth</h1><dl>${rows.join("")}</dl></html>\n`,
    );
  } else {
    response.setHeader("content-type", "application/json");
    response.end(`${JSON.stringify(about, null, 2)}\n`);
  }
}

const escaped = (text: string): string => text.replace(/[&<>]/g, (character) => `&#${character.charCodeAt(0)};`);

function notFound(response: ServerResponse, base: string): void {
  response.writeHead(404, { "content-type": "application/json" });
  response.end(`${JSON.stringify({ code: "NOT_FOUND", message: `The endpoints are under ${base}` })}\n`);
}

function fail(message: string): never {
  process.stderr.write(`issuer: ${message}\n`);
  process.exit(1);
}

async function main(): Promise<void> {
  const settings = readSettings(process.env);
  // The public address may hold the chosen port, so the port comes first; requests before readiness wait for it.
  const { promise: started, resolve: start } = Promise.withResolvers<(q: IncomingMessage, s: ServerResponse) => void>();
  const server = createServer(async (request, response) => (await started)(request, response));
  // Longer than any client pools a connection: a reused one must not be closed under a request.
  server.keepAliveTimeout = 75_000;
  await new Promise<void>((resolve, reject) => {
    server.once("error", reject).listen(settings.port, "127.0.0.1", resolve);
  });
  const ready = located(settings.url, (server.address() as AddressInfo).port);
  const { database, handle } = await startAuth(settings, ready);
  const prefix = `${new URL(ready.base_url).pathname}/`;
  start((request, response) => {
    const path = request.url?.split("?", 1)[0] ?? "";
    if (path.startsWith(prefix)) {
      handle(request, response).catch((error: unknown) => {
        console.error(error);
        if (!response.headersSent) response.writeHead(500);
        response.end();
      });
    } else if (path === "/") {
      welcome(ready, request, response);
    } else {
      notFound(response, ready.base_url);
    }
  });

  const stop = (): void => {
    database.close();
    process.exit(0);
  };
  process.once("SIGTERM", stop).once("SIGINT", stop);
  // A parent that holds a pipe to our standard input takes us along however it ends; a terminal or /dev/null does not.
  const stdin = fstatSync(0);
  if (stdin.isFIFO() || stdin.isSocket()) process.stdin.once("end", stop).once("error", stop).resume();
  process.stdout.write(`${JSON.stringify(ready)}\n`);
}

main().catch((error: NodeJS.ErrnoException) => {
  if (error instanceof SettingsError) fail(error.message);
  if (error.syscall === "listen") {
    const { port, address } = error as NodeJS.ErrnoException & { port: number; address: string };
    const why = error.code === "EADDRINUSE" ? "is taken" : `cannot be opened (${error.code})`;
    fail(`port ${port} on ${address} ${why}: choose another with ISSUER_PORT`);
  }
  fail(error.stack ?? String(error));
});
