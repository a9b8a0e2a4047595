import type { Metadata } from "next";
import Link from "next/link";
import { redirect } from "next/navigation";
import { Entrance } from "@/auth/entrance.tsx";
import { SignForm } from "@/auth/form.tsx";
import { person } from "@/auth/session.ts";

export const metadata: Metadata = { title: "Create an account" };

export default async function SignUp() {
  if (await person()) redirect("/");
  return (
    <Entrance
      title="Create your account"
      lead="Manage your tasks in one place."
      below={<>Already have an account? <Link href="/sign-in">Sign in</Link></>}
    >
      <SignForm mode="up" />
    </Entrance>
  );
}
