"use client";
import { useEffect, useMemo, useRef, useState, useSyncExternalStore } from "react";
import type { Task } from "@frontend-contract/client";
import { apiOfBrowser } from "@/auth/browser.ts";
import type { Person } from "@/auth/session.ts";
import { Rendered } from "./clock.ts";
import { Composer } from "./composer.tsx";
import { ConflictDialog } from "./conflict.tsx";
import { Editor } from "./editor.tsx";
import { Filters } from "./filters.tsx";
import { Help } from "./help.tsx";
import { TaskList } from "./list.tsx";
import { Notices, Offline } from "./notices.tsx";
import { href, type Query, readQuery } from "./query.ts";
import { useShortcuts } from "./shortcuts.ts";
import { Sidebar, titleOf } from "./sidebar.tsx";
import { type Initial, TaskStore } from "./store.ts";
import styles from "./board.module.css";

export interface BoardProps {
  person: Person;
  apiUrl: string;
  query: Query;
  initial: Initial;
  rendered: number;
}

/** The task page: creates the store and renders its state. */
export function Board({ person, apiUrl, query: first, initial, rendered }: BoardProps) {
  const [{ store, token }] = useState(() => {
    const { api, token } = apiOfBrowser(apiUrl, person.id);
    return { store: new TaskStore(api, first, initial), token };
  });
  const state = useSyncExternalStore(store.subscribe, store.state, store.state);
  const { query, tasks, ended, unsent } = state;
  const [opened, setOpened] = useState<Task | null>(null);
  const [help, setHelp] = useState(false);
  const composer = useRef<HTMLInputElement>(null);
  const search = useRef<HTMLInputElement>(null);
  const list = useRef<HTMLUListElement>(null);

  useEffect(() => store.start(), [store]);
  useEffect(() => {
    const back = () => void store.setQuery(readQuery(new URLSearchParams(window.location.search)));
    window.addEventListener("popstate", back);
    return () => window.removeEventListener("popstate", back);
  }, [store]);
  useEffect(() => {
    if (!ended) return;
    token.clear();
    window.location.assign(`/sign-in?reason=${ended}`);
  }, [ended, token]);
  useEffect(() => {
    // After a change of account the changes cannot be sent, so the page must be left without a warning.
    if (unsent === 0 || ended === "another") return;
    const warn = (event: BeforeUnloadEvent) => event.preventDefault();
    window.addEventListener("beforeunload", warn);
    return () => window.removeEventListener("beforeunload", warn);
  }, [unsent, ended]);

  const setQuery = useMemo(
    () => (next: Query) => {
      window.history.pushState(null, "", href(next));
      document.title = `${titleOf(next)} · Tasks`;
      void store.setQuery(next);
    },
    [store],
  );

  useShortcuts((key) => {
    const rows = [...(list.current?.querySelectorAll<HTMLElement>("[data-task]") ?? [])];
    const at = rows.findIndex((row) => row.contains(document.activeElement));
    const focus = (row: HTMLElement | undefined) => row?.querySelector<HTMLElement>("[data-open]")?.focus();
    const task = at < 0 ? undefined : tasks.find(({ id }) => id === rows[at]!.dataset["task"]);
    switch (key) {
      case "n": composer.current?.focus(); break;
      case "/": search.current?.focus(); break;
      case "j": case "ArrowDown": focus(rows[Math.min(at + 1, rows.length - 1)]); break;
      case "k": case "ArrowUp": focus(rows[Math.max(at - 1, 0)]); break;
      case "z": store.undo(); break;
      case "?": setHelp(true); break;
      case "x":
        if (!task || task.deleted_at) return false;
        store.complete(task);
        break;
      case "Delete": case "Backspace":
        if (!task) return false;
        focus(rows[at + 1] ?? rows[at - 1]);
        if (task.deleted_at) store.restore(task);
        else store.remove(task);
        break;
      default: return false;
    }
    return true;
  });

  return (
    <Rendered value={rendered}>
      <a className={styles.skip} href="#list-title">Skip to tasks</a>
      <div className={styles.page} data-unsent={unsent}>
        <Sidebar person={person} query={query} tags={state.tags} summary={state.summary} setQuery={setQuery} onHelp={() => setHelp(true)} />
        <main className={styles.main}>
          <Offline reachable={state.reachable} unsent={unsent} />
          <div className={styles.column}>
            <Filters query={query} setQuery={setQuery} search={search} live={state.live && state.reachable} shown={tasks.length} phase={state.phase} />
            {!query.deleted && <Composer ref={composer} query={query} onAdd={(task) => store.create(task)} />}
            <TaskList ref={list} state={state} store={store} setQuery={setQuery} onOpen={setOpened} onNew={() => composer.current?.focus()} />
          </div>
        </main>
      </div>
      {opened && !state.dispute && (
        <Editor task={opened} current={tasks.find(({ id }) => id === opened.id) ?? null} tags={state.tags} store={store} onClose={() => setOpened(null)} />
      )}
      {state.dispute && <ConflictDialog key={state.dispute.theirs.version} dispute={state.dispute} onSettle={(changes) => store.settle(changes)} />}
      {help && <Help onClose={() => setHelp(false)} />}
      <Notices notices={state.notices} dismiss={(id) => store.dismiss(id)} />
    </Rendered>
  );
}
