import { redirect } from "next/navigation";
import type { ReactNode } from "react";
import { person } from "@/auth/session.ts";

/** Redirects users without a session. The page does so, too, but only after the skeleton of `loading.tsx` is shown. */
export default async function Layout({ children }: { children: ReactNode }) {
  if (!(await person())) redirect("/sign-in");
  return children;
}
