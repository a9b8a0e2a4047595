import type { Metadata } from "next";
import Link from "next/link";
import { redirect } from "next/navigation";
import { Entrance } from "@/auth/entrance.tsx";
import { SignForm } from "@/auth/form.tsx";
import { person } from "@/auth/session.ts";

export const metadata: Metadata = { title: "Sign in" };

const REASONS: Record<string, string> = {
  ended: "Your session has ended. Sign in again to go on.",
  suspended: "This account has been suspended. Ask an administrator.",
  another: "A different account has signed in in this browser. Any changes that had not been sent were discarded.",
};

export default async function SignIn({ searchParams }: { searchParams: Promise<Record<string, string | string[] | undefined>> }) {
  const { reason } = await searchParams;
  const present = await person();
  // A page that was opened for one account is not replaced by the tasks of another without a word.
  if (present && reason !== "another") redirect("/");
  const lead = (typeof reason === "string" && REASONS[reason]) || "Good to see you again.";
  const below = present
    ? <a href="/">Continue as {present.name}</a>
    : <>New here? <Link href="/sign-up">Create an account</Link></>;
  return (
    <Entrance title="Sign in" lead={lead} below={below}>
      <SignForm mode="in" />
    </Entrance>
  );
}
