import { redirect } from "next/navigation";
import type { ReactNode } from "react";
import { person } from "@/auth/session.ts";

/** Redirects here as well as in the page: the layout runs before `loading.tsx` is sent, so that no skeleton is shown first. */
export default async function Layout({ children }: { children: ReactNode }) {
  if (!(await person())) redirect("/sign-in");
  return children;
}
