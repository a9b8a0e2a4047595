/** Runs the built app, for `make web` and the browser tests. */
import next from "next";
import { serve } from "../better-auth/serve.ts";
import { readSettings } from "../better-auth/settings.ts";

await serve(
  () => readSettings(process.env),
  async (_, { url, port }) => {
    // The app reads the same settings, but only this process knows the port that was chosen.
    Object.assign(process.env, { ISSUER_URL: url, ISSUER_PORT: String(port) });
    const app = next({ dir: import.meta.dirname, dev: false, hostname: "localhost", port });
    await app.prepare();
    const handle = app.getRequestHandler();
    return { handle, everything: true, close: () => void app.close() };
  },
);
