"use client";
import { type FormEvent, useState } from "react";
import { Icon } from "@/app/icons.tsx";
import { authClient } from "./browser.ts";
import button from "@/app/button.module.css";
import styles from "./form.module.css";

/** The form for signing in or signing up. Loads the task list afterwards. */
export function SignForm({ mode }: { mode: "in" | "up" }) {
  const [failure, setFailure] = useState<string | null>(null);
  const [busy, setBusy] = useState(false);

  async function submit(event: FormEvent<HTMLFormElement>) {
    event.preventDefault();
    const form = new FormData(event.currentTarget);
    const text = (name: string) => String(form.get(name) ?? "");
    setBusy(true);
    setFailure(null);
    try {
      const { error } =
        mode === "up"
          ? await authClient.signUp.email({ name: text("name"), email: text("email"), password: text("password") })
          : await authClient.signIn.email({ email: text("email"), password: text("password") });
      if (!error) return window.location.assign("/");
      setFailure(error.message ?? "Something went wrong. Try again.");
    } catch {
      setFailure("The server cannot be reached. Try again.");
    }
    setBusy(false);
  }

  return (
    <form className={styles.form} onSubmit={submit}>
      {mode === "up" && <Field label="Name" name="name" autoComplete="name" autoFocus required />}
      <Field label="Email" name="email" type="email" autoComplete="email" autoFocus={mode === "in"} required />
      <Field
        label="Password"
        name="password"
        type="password"
        autoComplete={mode === "up" ? "new-password" : "current-password"}
        minLength={mode === "up" ? 8 : undefined}
        hint={mode === "up" ? "At least 8 characters." : undefined}
        required
      />
      <p className={styles.failure} role="alert">
        {failure && <><Icon name="alert" /> {failure}</>}
      </p>
      <button className={button.primary} disabled={busy}>
        {busy ? "Please wait…" : mode === "up" ? "Create account" : "Sign in"}
      </button>
    </form>
  );
}

interface FieldProps {
  label: string;
  name: string;
  type?: string;
  autoComplete: string;
  autoFocus?: boolean;
  required?: boolean;
  minLength?: number | undefined;
  hint?: string | undefined;
}

function Field({ label, hint, ...input }: FieldProps) {
  return (
    <label className={styles.field}>
      <span>{label}</span>
      <input {...input} aria-describedby={hint && `${input.name}-hint`} />
      {hint && <small id={`${input.name}-hint`}>{hint}</small>}
    </label>
  );
}
