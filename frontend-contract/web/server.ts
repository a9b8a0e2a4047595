/** Runs the built app, as `make web` and the browser tests do: it says where it is, and ends with its parent. */
import next from "next";
import { serve } from "../better-auth/serve.ts";
import { readSettings } from "../better-auth/settings.ts";

await serve(
  () => readSettings(process.env),
  async (_, { url, port }) => {
    // The app reads the same settings; which port was chosen is known here alone.
    Object.assign(process.env, { ISSUER_URL: url, ISSUER_PORT: String(port) });
    const app = next({ dir: import.meta.dirname, dev: false, hostname: "localhost", port });
    await app.prepare();
    const handle = app.getRequestHandler();
    return { handle, everything: true, close: () => void app.close() };
  },
);
