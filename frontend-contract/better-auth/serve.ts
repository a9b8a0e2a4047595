/** An HTTP server that prints its location when it is ready and stops with its parent process. */
import { Console } from "node:console";
import { fstatSync } from "node:fs";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { inspect } from "node:util";
import { type Settings, SettingsError } from "./settings.ts";

/** The addresses of the server, printed when it is ready. */
export interface Location {
  /** The value for `BETTER_AUTH_URL`. */
  url: string;
  /** Base URL of the endpoints: `url`, with `/api/auth` if it has no path. */
  base_url: string;
  jwks_url: string;
  issuer: string;
  port: number;
}

type Listener = (request: IncomingMessage, response: ServerResponse) => Promise<void> | void;

export interface Running {
  /** Handles requests under `base_url`; with `everything`, all requests. */
  handle: Listener;
  everything?: boolean;
  close(): void;
  /** Additional members of the readiness line. */
  about?: object;
}

/**
 * Listens, starts the application, and prints the readiness line as JSON.
 *
 * If the start fails, prints the reason to standard error and exits with code 1.
 */
export async function serve<S extends Pick<Settings, "host" | "port" | "url">>(
  read: () => S,
  start: (settings: S, where: Location) => Promise<Running>,
): Promise<void> {
  // Standard output is reserved for the readiness line.
  globalThis.console = new Console(process.stderr, process.stderr);
  try {
    const settings = read();
    // The public URL may contain the port chosen by the system, so listen first. Early requests wait for readiness.
    const { promise: ready, resolve: startHandling } = Promise.withResolvers<Listener>();
    const server = createServer(async (request, response) => (await ready)(request, response));
    // Longer than clients pool idle connections, so that none is closed while a client reuses it.
    server.keepAliveTimeout = 75_000;
    await new Promise<void>((resolve, reject) => {
      server.once("error", reject).listen(settings.port, settings.host, resolve);
    });
    const where = locate(settings.url, (server.address() as AddressInfo).port);
    const { handle, everything = false, close, about } = await start(settings, where);
    startHandling(everything ? handle : route(where, handle));
    endWithParent(close);
    process.stdout.write(`${JSON.stringify({ ...where, ...about })}\n`);
  } catch (error) {
    process.stderr.write(`issuer: ${explanation(error as NodeJS.ErrnoException)}\n`);
    process.exit(1);
  }
}

function locate(url: string | null, port: number): Location {
  const parsed = new URL(url ?? `http://localhost:${port}`);
  if (parsed.port === "0") parsed.port = String(port);
  const address = parsed.href.replace(/\/+$/, "");
  const base = parsed.pathname === "/" ? `${address}/api/auth` : address;
  return { url: address, base_url: base, jwks_url: `${base}/jwks`, issuer: parsed.origin, port };
}

function route(where: Location, handle: Listener): Listener {
  const prefix = `${new URL(where.base_url).pathname}/`;
  return async (request, response) => {
    const path = request.url?.split("?", 1)[0] ?? "";
    if (path === "/") return welcome(where, request, response);
    if (!path.startsWith(prefix)) {
      response.writeHead(404, { "content-type": "application/json" });
      response.end(`${JSON.stringify({ code: "NOT_FOUND", message: `The endpoints are under ${where.base_url}` })}\n`);
      return;
    }
    try {
      await handle(request, response);
    } catch (error) {
      console.error(error);
      if (!response.headersSent) response.writeHead(500);
      response.end();
    }
  };
}

function endWithParent(close: () => void): void {
  const stop = (): void => {
    close();
    process.exit(0);
  };
  process.once("SIGTERM", stop).once("SIGINT", stop);
  // If standard input is a pipe, stop when the parent closes it or exits. A terminal or /dev/null is ignored.
  const stdin = fstatSync(0);
  if (stdin.isFIFO() || stdin.isSocket()) process.stdin.once("end", stop).once("error", stop).resume();
}

function explanation(error: NodeJS.ErrnoException): string {
  if (error instanceof SettingsError) return error.message;
  if (error.syscall !== "listen") return inspect(error);
  const { code, port, address } = error as NodeJS.ErrnoException & { port: number; address: string };
  const why = code === "EADDRINUSE" ? "is taken" : `cannot be opened (${code})`;
  return `port ${port} on ${address} ${why}: choose another with ISSUER_PORT`;
}

function welcome({ base_url, jwks_url, issuer }: Location, request: IncomingMessage, response: ServerResponse): void {
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
