/** Runs Better Auth as an OAuth 2.1 provider for contract tests, with one client that may use all grants. */
import { randomUUID } from "node:crypto";
import { registerHooks } from "node:module";
import { DatabaseSync } from "node:sqlite";
import { apiKey } from "@better-auth/api-key";
import { oauthProvider } from "@better-auth/oauth-provider";
import { type BetterAuthOptions, type BetterAuthPlugin, betterAuth } from "better-auth";
import { getMigrations } from "better-auth/db/migration";
import { toNodeHandler } from "better-auth/node";
import { admin, bearer, jwt } from "better-auth/plugins";
import { type Location, type Running, serve } from "../better-auth/serve.ts";
import { readSettings, serverOptions, type Settings } from "../better-auth/settings.ts";

const SCOPES = ["tasks:read", "tasks:write"];

/** Loads `apiTokens` of the reference configuration with this folder's version of Better Auth. */
async function apiTokens({ keyAlgorithm, keyRotation }: Settings): Promise<readonly BetterAuthPlugin[]> {
  const file = new URL("../better-auth/auth.ts", import.meta.url).href;
  const hooks = registerHooks({
    resolve: (specifier, context, next) =>
      next(specifier, context.parentURL === file ? { ...context, parentURL: import.meta.url } : context),
  });
  const reference = (await import(file)) as { apiTokens: (settings: object) => readonly BetterAuthPlugin[] };
  hooks.deregister();
  return reference.apiTokens({ keyAlgorithm, keyRotation });
}

async function start(settings: Settings, { url, port }: Location): Promise<Running> {
  const owner = { email: `${randomUUID()}@owner.invalid`, password: randomUUID(), name: "Owner of the client" };
  const database = new DatabaseSync(settings.database);
  const rotation = settings.keyRotation > 0 ? { rotationInterval: settings.keyRotation } : {};
  // Better Auth's default payload, the whole user row. The contract tests cover it besides the reference payload.
  const defaultTokens = jwt({ jwks: { keyPairConfig: { alg: settings.keyAlgorithm }, ...rotation }, disableSettingJwtHeader: true });
  const keys = apiKey({
    enableSessionForAPIKeys: true,
    rateLimit: { enabled: false },
    permissions: { defaultPermissions: { tasks: ["read"] } },
  });
  const options = {
    ...serverOptions(settings, port),
    database,
    baseURL: url,
    emailAndPassword: { enabled: true },
    telemetry: { enabled: false },
    plugins: [
      ...(settings.apiKeys ? [...(await apiTokens(settings)), keys] : [defaultTokens]),
      bearer(),
      admin(),
      oauthProvider({
        loginPage: "/login",
        consentPage: "/consent",
        scopes: ["openid", "profile", "email", "offline_access", ...SCOPES],
        // Tokens requested for one of these resources are JWTs; tokens without `resource` are opaque.
        resources: settings.audience.length > 0 ? settings.audience : ["http://localhost:8000"],
        enforcePerClientResources: false,
        customAccessTokenClaims: ({ user }) => (user ? { role: user["role"] } : {}),
        clientPrivileges: ({ user }) => user?.email === owner.email,
      }),
    ],
  } satisfies BetterAuthOptions;
  // Migrate first: the provider stores its resources when the instance is created.
  await (await getMigrations(options)).runMigrations();
  const auth = betterAuth(options);
  const client = await makeClient();
  return { handle: toNodeHandler(auth), close: () => database.close(), about: { client } };

  async function makeClient() {
    const { headers } = await auth.api.signUpEmail({ body: owner, returnHeaders: true });
    // Never requested: tests read the code from the redirect. Web clients must use https and a public host name.
    const redirect_uri = "https://app.example.com/callback";
    const { client_id, client_secret } = await auth.api.adminCreateOAuthClient({
      headers: new Headers({ authorization: `Bearer ${headers.get("set-auth-token")}` }),
      body: {
        client_name: "Contract tests",
        redirect_uris: [redirect_uri],
        grant_types: ["authorization_code", "refresh_token", "client_credentials"],
        client_credentials_scopes: SCOPES,
        token_endpoint_auth_method: "client_secret_basic",
        skip_consent: true,
      },
    });
    return { client_id, client_secret, redirect_uri };
  }
}

await serve(() => readSettings(process.env), start);
