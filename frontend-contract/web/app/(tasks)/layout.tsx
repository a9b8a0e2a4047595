import { redirect } from "next/navigation";
import type { ReactNode } from "react";
import { person } from "@/auth/session.ts";

/** Here and not in the page alone: this runs before anything is sent, so that a stranger gets a redirect and no skeleton. */
export default async function Layout({ children }: { children: ReactNode }) {
  if (!(await person())) redirect("/sign-in");
  return children;
}
