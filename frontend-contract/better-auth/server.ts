/** Runs the reference configuration, for tests and development. */
import { toNodeHandler } from "better-auth/node";
import { openReference } from "./reference.ts";
import { serve } from "./serve.ts";
import { readSettings } from "./settings.ts";

await serve(
  () => readSettings(process.env),
  async (settings, where) => {
    const { auth, close } = await openReference(settings, where);
    return { handle: toNodeHandler(auth), close };
  },
);
