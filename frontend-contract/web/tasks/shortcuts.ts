"use client";
/** Page-wide keyboard shortcuts. Inactive while text is being typed or a dialog is open. */
import { useEffect, useEffectEvent } from "react";

export const SHORTCUTS = [
  ["n", "New task"],
  ["/", "Search"],
  ["j", "Next task"],
  ["k", "Previous task"],
  ["Enter", "Open the task"],
  ["x", "Complete or reopen"],
  ["Delete", "Delete, or restore from the trash"],
  ["z", "Undo"],
  ["?", "Show keyboard shortcuts"],
] as const;

export type Shortcut = (typeof SHORTCUTS)[number][0];

const SETTING = "single-keys";

/** Single-character shortcuts can be disabled, for users of speech input (WCAG 2.1.4). */
export const singleKeys = (): boolean => localStorage.getItem(SETTING) !== "off";
export const setSingleKeys = (on: boolean): void => localStorage.setItem(SETTING, on ? "on" : "off");

/** act: handles a key; returns true if it did, to suppress the browser's default action. */
export function useShortcuts(act: (key: string) => boolean): void {
  const pressed = useEffectEvent((event: KeyboardEvent) => {
    const undo = (event.ctrlKey || event.metaKey) && !event.shiftKey && event.key.toLowerCase() === "z";
    if (!undo && (event.ctrlKey || event.metaKey || event.altKey)) return;
    if (isTyping(event.target) || document.querySelector("dialog[open]")) return;
    if (!undo && event.key.length === 1 && !singleKeys()) return;
    if (act(event.key.length === 1 ? event.key.toLowerCase() : event.key)) event.preventDefault();
  });
  useEffect(() => {
    const listener = (event: KeyboardEvent) => pressed(event);
    document.addEventListener("keydown", listener);
    return () => document.removeEventListener("keydown", listener);
  }, []);
}

const isTyping = (target: EventTarget | null): boolean =>
  target instanceof HTMLElement && target.matches("textarea, select, [contenteditable], input:not([type=checkbox], [type=radio])");
