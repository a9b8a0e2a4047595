"use client";
import { type RefObject, useEffect, useState } from "react";
import { Icon } from "@/app/icons.tsx";
import { PRIORITIES, type Priority, type Query, type Sort, SORTS } from "./query.ts";
import { titleOf } from "./sidebar.tsx";
import type { State } from "./store.ts";
import styles from "./filters.module.css";

interface FiltersProps {
  query: Query;
  setQuery: (query: Query) => void;
  search: RefObject<HTMLInputElement | null>;
  live: boolean;
  shown: number;
  phase: State["phase"];
}

export function Filters({ query, setQuery, search, live, shown, phase }: FiltersProps) {
  return (
    <header className={styles.head}>
      <div className={styles.title}>
        <h1 id="list-title" tabIndex={-1}>{titleOf(query)}</h1>
        <span className={styles.live} data-live={live} title={live ? "Changes made elsewhere appear immediately" : "Connecting"}>{live ? "Live" : "Connecting"}</span>
        <span className="unseen" role="status">{phase === "ready" ? `${shown} ${shown === 1 ? "task" : "tasks"} shown` : ""}</span>
      </div>
      <div className={styles.tools} role="search">
        <Search query={query} setQuery={setQuery} field={search} />
        <select aria-label="Priority" value={query.priority ?? ""} data-set={query.priority !== null} onChange={(event) => setQuery({ ...query, priority: (event.target.value || null) as Priority | null })}>
          <option value="">Any priority</option>
          {Object.entries(PRIORITIES).map(([name, label]) => <option key={name} value={name}>{label}</option>)}
        </select>
        <select aria-label="Sort" value={query.sort} onChange={(event) => setQuery({ ...query, sort: event.target.value as Sort })}>
          {Object.entries(SORTS).map(([name, label]) => <option key={name} value={name}>{label}</option>)}
        </select>
      </div>
    </header>
  );
}

/** Milliseconds. */
const TYPING_PAUSE = 250;

/** The search field; runs the query when typing pauses. */
function Search({ query, setQuery, field }: { query: Query; setQuery: (query: Query) => void; field: RefObject<HTMLInputElement | null> }) {
  const [text, setText] = useState(query.q);
  const [previous, setPrevious] = useState(query.q);
  if (query.q !== previous) {
    // The query changed: unless it was this field's own change, show the new text.
    setPrevious(query.q);
    if (query.q !== text.trim()) setText(query.q);
  }
  useEffect(() => {
    if (text.trim() === query.q) return;
    const timer = setTimeout(() => setQuery({ ...query, q: text.trim() }), TYPING_PAUSE);
    return () => clearTimeout(timer);
  }, [text, query, setQuery]);
  return (
    <label className={styles.search}>
      <Icon name="search" />
      <span className="unseen">Search</span>
      <input ref={field} type="search" placeholder="Search" value={text} maxLength={200} onChange={(event) => setText(event.target.value)} />
      <kbd aria-hidden="true">/</kbd>
    </label>
  );
}
