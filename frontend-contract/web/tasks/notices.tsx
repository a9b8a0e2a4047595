"use client";
import { useEffect, useState } from "react";
import { Icon } from "@/app/icons.tsx";
import button from "@/app/button.module.css";
import type { Notice } from "./store.ts";
import styles from "./notices.module.css";

export function Offline({ reachable, unsent }: { reachable: boolean; unsent: number }) {
  const waiting = unsent === 0 ? "Your changes will be sent when you are online again." : `${unsent} ${unsent === 1 ? "change is" : "changes are"} waiting to be sent.`;
  return (
    <div role="status">
      {!reachable && <p className={styles.offline}><Icon name="offline" /> <b>You are offline.</b> {waiting}</p>}
    </div>
  );
}

/** Notices of recent changes, with an undo button. Announced by screen readers; disappear after LIFETIME milliseconds. */
export function Notices({ notices, dismiss }: { notices: readonly Notice[]; dismiss: (id: number) => void }) {
  return (
    <div className={styles.notices} role="status" aria-label="Notices">
      {notices.map((notice) => <Toast key={notice.id} notice={notice} dismiss={() => dismiss(notice.id)} />)}
    </div>
  );
}

const LIFETIME = 8_000;

function Toast({ notice: { text, tone, undo }, dismiss }: { notice: Notice; dismiss: () => void }) {
  const [held, hold] = useState(false);
  useEffect(() => {
    if (held) return;
    const timer = setTimeout(dismiss, LIFETIME);
    return () => clearTimeout(timer);
  }, [held]);
  return (
    <div className={styles.notice} data-tone={tone} onPointerEnter={() => hold(true)} onPointerLeave={() => hold(false)} onFocus={() => hold(true)} onBlur={() => hold(false)}>
      <Icon name={tone === "failed" ? "alert" : "check"} />
      <span>{text}</span>
      {undo && <button type="button" className={styles.undo} onClick={() => { dismiss(); undo(); }}>Undo</button>}
      <button type="button" className={button.icon} aria-label="Dismiss" onClick={dismiss}><Icon name="close" /></button>
    </div>
  );
}
