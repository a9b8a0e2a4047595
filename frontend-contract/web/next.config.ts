import { dirname } from "node:path";
import type { NextConfig } from "next";

const config: NextConfig = {
  // The workspace: the client and the Better Auth configuration are its other members.
  turbopack: { root: dirname(import.meta.dirname) },
  // `npm run typecheck` does it, and the suite; a build need not do it again.
  typescript: { ignoreBuildErrors: true },
  // A build is kept whole; what would only speed up the next one is not worth the wait for it.
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
