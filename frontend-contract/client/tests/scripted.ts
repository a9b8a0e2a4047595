/** An HTTP server with scripted responses, and unsigned tokens. */
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import type { TestContext } from "node:test";
import { type Client, type ClientOptions, cookieSession, createClient } from "../../client.ts";

export interface Request {
  method: string;
  url: string;
  headers: IncomingMessage["headers"];
  body: string;
  /** Resolves when the connection is closed. */
  closed: Promise<void>;
}

export type Script = (request: Request, response: ServerResponse) => void | Promise<void>;

export async function serve(t: TestContext, script: Script) {
  const requests: Request[] = [];
  const server = createServer(async (incoming, response) => {
    let body = "";
    for await (const chunk of incoming) body += chunk;
    const closed = new Promise<void>((resolve) => response.on("close", resolve));
    const request = { method: incoming.method!, url: incoming.url!, headers: incoming.headers, body, closed };
    requests.push(request);
    await script(request, response);
  });
  await new Promise<void>((listening) => server.listen(0, "127.0.0.1", listening));
  t.after(() => {
    server.closeAllConnections();
    server.close();
  });
  return { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, requests };
}

let tokens = 0;

/** An unsigned JWT. life: lifetime in seconds. ahead: seconds by which the issuer's clock is fast. */
export function jwt({ life = 900, ahead = 0, ...claims }: { life?: number; ahead?: number; sub?: unknown; iss?: string } = {}): string {
  const iat = Math.floor(Date.now() / 1000) + ahead;
  const payload = { sub: "ä", iat, exp: iat + life, jti: ++tokens, ...claims };
  return `e30.${Buffer.from(JSON.stringify(payload)).toString("base64url")}.c2ln`;
}

export function json(response: ServerResponse, status: number, body: unknown, headers: Record<string, string> = {}): void {
  const type = status >= 400 ? "application/problem+json" : "application/json";
  response.writeHead(status, { "Content-Type": type, ...headers }).end(JSON.stringify(body));
}

export const problem = (response: ServerResponse, status: number, code: string, headers: Record<string, string> = {}) =>
  json(response, status, { type: "about:blank", title: "No", status, detail: "No.", code, request_id: "r1" }, headers);

/** A client of a scripted API. Its issuer returns a new token to each request. */
export async function client(t: TestContext, script: Script, options: Partial<ClientOptions> = {}): Promise<Scripted> {
  const { url, requests } = await serve(t, (request, response) => {
    if (request.url !== "/api/auth/token") return script(request, response);
    json(response, 200, { token: jwt() });
  });
  const api = createClient({ baseUrl: url, token: cookieSession({ authUrl: `${url}/api/auth` }), ...options });
  return Object.assign(api, {
    url,
    calls: () => requests.filter((request) => request.url !== "/api/auth/token"),
    exchanges: () => requests.filter((request) => request.url === "/api/auth/token").length,
  });
}

export type Scripted = Client & { url: string; calls: () => Request[]; exchanges: () => number };

/** Uses one script per request, then repeats the last one. */
export function inTurn(...scripts: Script[]): Script {
  let turn = 0;
  return (request, response) => scripts[Math.min(turn++, scripts.length - 1)]!(request, response);
}

export const lost: Script = (_, response) => void response.destroy();
export const page = { items: [], next_cursor: null };
export const empty: Script = (_, response) => json(response, 200, page);
export const task = (members: object = {}) => ({
  id: "019a9d4e-7b1c-7d20-9f0e-6a1b2c3d4e5f",
  title: "Buy milk",
  description: null,
  status: "todo" as const,
  priority: "normal" as const,
  due_at: null,
  tags: [],
  is_overdue: false,
  completed_at: null,
  created_at: "2026-11-23T10:00:00Z",
  updated_at: "2026-11-23T10:00:00Z",
  deleted_at: null,
  version: 1,
  ...members,
});
