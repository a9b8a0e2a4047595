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
};

export default async function SignIn({ searchParams }: { searchParams: Promise<Record<string, string | string[] | undefined>> }) {
  if (await person()) redirect("/");
  const { reason } = await searchParams;
  const lead = (typeof reason === "string" && REASONS[reason]) || "Good to see you again.";
  return (
    <Entrance title="Sign in" lead={lead} below={<>New here? <Link href="/sign-up">Create an account</Link></>}>
      <SignForm mode="in" />
    </Entrance>
  );
}
