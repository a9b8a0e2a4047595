/** Runs Better Auth as an OAuth 2.1 provider for contract tests, with one client that may use every grant. */
import { randomUUID } from "node:crypto";
import { DatabaseSync } from "node:sqlite";
import { oauthProvider } from "@better-auth/oauth-provider";
import { type BetterAuthOptions, betterAuth } from "better-auth";
import { getMigrations } from "better-auth/db/migration";
import { toNodeHandler } from "better-auth/node";
import { admin, bearer, jwt } from "better-auth/plugins";
import { type Location, type Running, serve } from "../better-auth/serve.ts";
import { readSettings, serverOptions, type Settings } from "../better-auth/settings.ts";

const SCOPES = ["tasks:read", "tasks:write"];

async function start(settings: Settings, { url, port }: Location): Promise<Running> {
  const owner = { email: `${randomUUID()}@owner.invalid`, password: randomUUID(), name: "Owner of the client" };
  const database = new DatabaseSync(settings.database);
  const rotation = settings.keyRotation > 0 ? { rotationInterval: settings.keyRotation } : {};
  const options = {
    ...serverOptions(settings, port),
    database,
    baseURL: url,
    emailAndPassword: { enabled: true },
    telemetry: { enabled: false },
    plugins: [
      // Better Auth's own payload: the whole user row. The reference configuration's is slim; a contract covers both.
      jwt({ jwks: { keyPairConfig: { alg: settings.keyAlgorithm }, ...rotation }, disableSettingJwtHeader: true }),
      bearer(),
      admin(),
      oauthProvider({
        loginPage: "/login",
        consentPage: "/consent",
        scopes: ["openid", "profile", "email", "offline_access", ...SCOPES],
        // Only a token for one of these is a JWT; without `resource` it is opaque.
        resources: settings.audience.length > 0 ? settings.audience : ["http://localhost:8000"],
        enforcePerClientResources: false,
        clientPrivileges: ({ user }) => user?.email === owner.email,
      }),
    ],
  } satisfies BetterAuthOptions;
  // First of all: the provider writes its resources when it is made.
  await (await getMigrations(options)).runMigrations();
  const auth = betterAuth(options);
  const client = await makeClient();
  return { handle: toNodeHandler(auth), close: () => database.close(), about: { client } };

  async function makeClient() {
    const { headers } = await auth.api.signUpEmail({ body: owner, returnHeaders: true });
    // Nobody goes there: a test reads the code from the redirect. A web client's must be https on a public name.
    const redirect_uri = "https://app.example.com/callback";
    const { client_id, client_secret } = await auth.api.adminCreateOAuthClient({
      headers: new Headers({ authorization: `Bearer ${headers.get("set-auth-token")}` }),
      body: {
        client_name: "Contract tests",
        redirect_uris: [redirect_uri],
        grant_types: ["authorization_code", "refresh_token", "client_credentials"],
        customAccessTokenClaims: ({ user }) => (user ? { role: user["role"] } : {}),
        client_credentials_scopes: SCOPES,
        token_endpoint_auth_method: "client_secret_basic",
        skip_consent: true,
      },
    });
    return { client_id, client_secret, redirect_uri };
  }
}

await serve(() => readSettings(process.env), start);
