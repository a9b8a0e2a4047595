"use client";
import type { MouseEvent, ReactNode } from "react";
import { Icon, type IconName, Mark } from "@/app/icons.tsx";
import { authClient } from "@/auth/browser.ts";
import type { Person } from "@/auth/session.ts";
import { ThemeToggle } from "@/theme/toggle.tsx";
import { EVERYTHING, href, type Query, STATUSES } from "./query.ts";
import type { Summary, Tag } from "./store.ts";
import button from "@/app/button.module.css";
import styles from "./sidebar.module.css";

interface SidebarProps {
  person: Person;
  query: Query;
  tags: readonly Tag[];
  summary: Summary;
  setQuery: (query: Query) => void;
  onHelp: () => void;
}

export function Sidebar({ person, query, tags, summary: { by_status, overdue }, setQuery, onHelp }: SidebarProps) {
  const go = (view: Partial<Query>) => ({ ...EVERYTHING, sort: query.sort, ...view });
  const link = (view: Partial<Query>, icon: IconName, label: string, count?: number, tone?: "late") => (
    <View to={go(view)} now={query} setQuery={setQuery} icon={icon} count={count} tone={tone}>{label}</View>
  );
  return (
    <div className={styles.sidebar}>
      <header className={styles.top}>
        <span className={styles.brand}><Mark /> Tasks</span>
        <span className={styles.tools}>
          <button type="button" className={button.icon} aria-label="Keyboard shortcuts" title="Keyboard shortcuts (?)" onClick={onHelp}><Icon name="keyboard" /></button>
          <ThemeToggle />
        </span>
      </header>
      <nav className={styles.views} aria-label="Views">
        <ul>
          <li>{link({}, "inbox", "All tasks", by_status.todo + by_status.in_progress + by_status.done)}</li>
          <li>{link({ status: "todo" }, "circle", STATUSES.todo, by_status.todo)}</li>
          <li>{link({ status: "in_progress" }, "progress", STATUSES.in_progress, by_status.in_progress)}</li>
          <li>{link({ status: "done" }, "done", STATUSES.done, by_status.done)}</li>
          <li>{link({ overdue: true }, "clock", "Overdue", overdue, "late")}</li>
          <li>{link({ deleted: true }, "trash", "Trash")}</li>
        </ul>
      </nav>
      {tags.length > 0 && (
        <nav className={styles.tags} aria-labelledby="tags-title">
          <h2 id="tags-title">Tags</h2>
          <ul>
            {tags.map(({ id, name, task_count }) => (
              <li key={id}>{link({ tag: name }, "tag", name, task_count)}</li>
            ))}
          </ul>
        </nav>
      )}
      <footer className={styles.person}>
        <span className={styles.face} aria-hidden="true">{person.name.trim().charAt(0).toUpperCase() || "?"}</span>
        <span className={styles.name}>
          <b>{person.name}</b>
          <small>{person.email}</small>
        </span>
        <button type="button" className={button.icon} aria-label="Sign out" title="Sign out" onClick={() => void signOut()}><Icon name="exit" /></button>
      </footer>
    </div>
  );
}

interface ViewProps {
  to: Query;
  now: Query;
  setQuery: (query: Query) => void;
  icon: IconName;
  count: number | undefined;
  tone: "late" | undefined;
  children: ReactNode;
}

function View({ to, now, setQuery, icon, count, tone, children }: ViewProps) {
  const here = to.status === now.status && to.tag === now.tag && to.overdue === now.overdue && to.deleted === now.deleted;
  return (
    <a href={href(to)} className={styles.view} aria-current={here ? "page" : undefined} onClick={onPlainClick(() => setQuery(to))}>
      <Icon name={icon} />
      <span className={styles.label}>{children}</span>
      {!!count && <span className={styles.count} data-tone={tone}>{count}</span>}
    </a>
  );
}

/** Leaves clicks that open a new tab or window to the browser. */
const onPlainClick = (act: () => void) => (event: MouseEvent) => {
  if (event.metaKey || event.ctrlKey || event.shiftKey || event.button !== 0) return;
  event.preventDefault();
  act();
};

export function titleOf({ status, tag, overdue, deleted }: Query): string {
  if (deleted) return "Trash";
  if (overdue) return "Overdue";
  if (tag) return `#${tag}`;
  return status ? STATUSES[status] : "All tasks";
}

async function signOut(): Promise<void> {
  await authClient.signOut();
  window.location.assign("/sign-in");
}
