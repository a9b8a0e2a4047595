import { dirname } from "node:path";
import type { NextConfig } from "next";

const config: NextConfig = {
  // The root of the workspace, which also contains the client and the Better Auth configuration.
  turbopack: { root: dirname(import.meta.dirname) },
  // Types are checked by `npm run typecheck` and the test suite.
  typescript: { ignoreBuildErrors: true },
  // Finished builds are cached as a whole, so a cache for incremental builds would only cost time.
  experimental: { turbopackFileSystemCacheForBuild: false },
  poweredByHeader: false,
  devIndicators: false,
  async headers() {
    const headers = [
      { key: "X-Content-Type-Options", value: "nosniff" },
      { key: "X-Frame-Options", value: "DENY" },
      { key: "Referrer-Policy", value: "same-origin" },
    ];
    return [{ source: "/:path*", headers }];
  },
};

export default config;
