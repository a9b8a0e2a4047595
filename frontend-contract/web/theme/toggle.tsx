"use client";
import { useSyncExternalStore } from "react";
import { Icon } from "@/app/icons.tsx";
import { setTheme } from "./theme.ts";
import button from "@/app/button.module.css";

/** Switches between the light and the dark theme. */
export function ThemeToggle() {
  const dark = useSyncExternalStore(subscribe, isDark, () => false);
  const next = dark ? "light" : "dark";
  return (
    <button type="button" className={button.icon} aria-label={`Switch to ${next} theme`} title={`${dark ? "Light" : "Dark"} theme`} onClick={() => setTheme(next)}>
      <Icon name={dark ? "sun" : "moon"} />
    </button>
  );
}

const system = () => window.matchMedia("(prefers-color-scheme: dark)");

function isDark(): boolean {
  const chosen = document.documentElement.dataset["theme"];
  return chosen === "system" ? system().matches : chosen === "dark";
}

function subscribe(changed: () => void): () => void {
  const query = system();
  query.addEventListener("change", changed);
  const observer = new MutationObserver(changed);
  observer.observe(document.documentElement, { attributeFilter: ["data-theme"] });
  return () => {
    query.removeEventListener("change", changed);
    observer.disconnect();
  };
}
