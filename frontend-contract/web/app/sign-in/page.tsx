import type { Metadata } from "next";
import Link from "next/link";
import { redirect } from "next/navigation";
import { Entrance } from "@/auth/entrance.tsx";
import { SignForm } from "@/auth/form.tsx";
import { person } from "@/auth/session.ts";

export const metadata: Metadata = { title: "Sign in" };

const REASONS: Record<string, string> = {
  ended: "Your session has ended. Sign in again to continue.",
  suspended: "This account has been suspended. Contact an administrator.",
  another: "This browser is now signed in to a different account. Unsent changes were discarded.",
};

export default async function SignIn({ searchParams }: { searchParams: Promise<Record<string, string | string[] | undefined>> }) {
  const { reason } = await searchParams;
  const present = await person();
  // Explain the change of account before showing the other account's tasks.
  if (present && reason !== "another") redirect("/");
  const lead = (typeof reason === "string" && REASONS[reason]) || "Welcome back.";
  const below = present
    ? <a href="/">Continue as {present.name}</a>
    : <>New here? <Link href="/sign-up">Create an account</Link></>;
  return (
    <Entrance title="Sign in" lead={lead} below={below}>
      <SignForm mode="in" />
    </Entrance>
  );
}
