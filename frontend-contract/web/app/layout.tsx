import "@fontsource-variable/inter/wght.css";
import "./tokens.css";
import "./base.css";
import type { Metadata, Viewport } from "next";
import { cookies } from "next/headers";
import type { ReactNode } from "react";
import { themeOf } from "@/theme/theme.ts";

export const metadata: Metadata = { title: { default: "Tasks", template: "%s · Tasks" }, description: "A task list." };
export const viewport: Viewport = { themeColor: [{ media: "(prefers-color-scheme: light)", color: "#fbfbfa" }, { media: "(prefers-color-scheme: dark)", color: "#101113" }] };

export default async function Layout({ children }: { children: ReactNode }) {
  const theme = themeOf((await cookies()).get("theme")?.value);
  return (
    <html lang="en" data-theme={theme}>
      <body>{children}</body>
    </html>
  );
}
