"use client";
import { type ReactNode, useEffect, useRef } from "react";
import { Icon } from "@/app/icons.tsx";
import button from "@/app/button.module.css";
import styles from "./dialog.module.css";

/** A native modal dialog: traps focus, closes on Escape, and returns focus when it closes. */
export function Dialog({ title, wide, sheet, onClose, children }: { title: string; wide?: boolean; sheet?: boolean; onClose: () => void; children: ReactNode }) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    const before = document.activeElement;
    dialog.current?.showModal();
    return () => {
      // If the focused element was removed, focus the list instead of the start of the page.
      if (before instanceof HTMLElement && before.isConnected) before.focus();
      else document.getElementById("list-title")?.focus();
    };
  }, []);
  return (
    <dialog
      ref={dialog}
      className={[styles.dialog, sheet ? styles.sheet : styles.box, wide && styles.wide].filter(Boolean).join(" ")}
      aria-labelledby="dialog-title"
      onCancel={(event) => {
        event.preventDefault();
        onClose();
      }}
      onMouseDown={(event) => {
        if (event.target === dialog.current) onClose();
      }}
    >
      <div className={styles.inside}>
        <header className={styles.head}>
          <h2 id="dialog-title">{title}</h2>
          <button type="button" className={button.icon} aria-label="Close" onClick={onClose}><Icon name="close" /></button>
        </header>
        {children}
      </div>
    </dialog>
  );
}
