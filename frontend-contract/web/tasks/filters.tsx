"use client";
import { type RefObject, useEffect, useState } from "react";
import { Icon } from "@/app/icons.tsx";
import { PRIORITIES, type Priority, type Query, type Sort, SORTS } from "./query.ts";
import { titleOf } from "./sidebar.tsx";
import type { State } from "./store.ts";
import styles from "./filters.module.css";

interface FiltersProps {
  query: Query;
  ask: (query: Query) => void;
  search: RefObject<HTMLInputElement | null>;
  live: boolean;
  shown: number;
  phase: State["phase"];
}

export function Filters({ query, ask, search, live, shown, phase }: FiltersProps) {
  return (
    <header className={styles.head}>
      <div className={styles.title}>
        <h1 id="list-title" tabIndex={-1}>{titleOf(query)}</h1>
        <span className={styles.live} data-live={live} title={live ? "Changes made elsewhere appear at once" : "Connecting"}>{live ? "Live" : "Connecting"}</span>
        <span className="unseen" role="status">{phase === "ready" ? `${shown} ${shown === 1 ? "task" : "tasks"} shown` : ""}</span>
      </div>
      <div className={styles.tools} role="search">
        <Search query={query} ask={ask} field={search} />
        <select aria-label="Priority" value={query.priority ?? ""} data-set={query.priority !== null} onChange={(event) => ask({ ...query, priority: (event.target.value || null) as Priority | null })}>
          <option value="">Any priority</option>
          {Object.entries(PRIORITIES).map(([name, label]) => <option key={name} value={name}>{label}</option>)}
        </select>
        <select aria-label="Sort" value={query.sort} onChange={(event) => ask({ ...query, sort: event.target.value as Sort })}>
          {Object.entries(SORTS).map(([name, label]) => <option key={name} value={name}>{label}</option>)}
        </select>
      </div>
    </header>
  );
}

const PAUSE = 250;

/** Asks when the typing pauses. */
function Search({ query, ask, field }: { query: Query; ask: (query: Query) => void; field: RefObject<HTMLInputElement | null> }) {
  const [text, setText] = useState(query.q);
  const [asked, setAsked] = useState(query.q);
  if (query.q !== asked) {
    // Asked for here, or by another view, which then says what stands in the field.
    setAsked(query.q);
    if (query.q !== text.trim()) setText(query.q);
  }
  useEffect(() => {
    if (text.trim() === query.q) return;
    const timer = setTimeout(() => ask({ ...query, q: text.trim() }), PAUSE);
    return () => clearTimeout(timer);
  }, [text, query, ask]);
  return (
    <label className={styles.search}>
      <Icon name="search" />
      <span className="unseen">Search</span>
      <input ref={field} type="search" placeholder="Search" value={text} maxLength={200} onChange={(event) => setText(event.target.value)} />
      <kbd aria-hidden="true">/</kbd>
    </label>
  );
}
