import type { ReactNode } from "react";
import { Mark } from "@/app/icons.tsx";
import { ThemeToggle } from "@/theme/toggle.tsx";
import styles from "./entrance.module.css";

/** The layout of pages that can be shown without a session, such as the sign-in form. */
export function Entrance({ title, lead, children, below }: { title: string; lead: string; children: ReactNode; below: ReactNode }) {
  return (
    <div className={styles.page}>
      <header className={styles.top}>
        <span className={styles.brand}><Mark /> Tasks</span>
        <ThemeToggle />
      </header>
      <main className={styles.card}>
        <h1>{title}</h1>
        <p className={styles.lead}>{lead}</p>
        {children}
        <p className={styles.below}>{below}</p>
      </main>
    </div>
  );
}
