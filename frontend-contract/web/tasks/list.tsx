"use client";
import type { Ref } from "react";
import type { Task } from "@frontend-contract/client";
import { EVERYTHING, type Query } from "./query.ts";
import { Row } from "./row.tsx";
import { Empty, Failed, SkeletonRows } from "./states.tsx";
import type { State, TaskStore } from "./store.ts";
import button from "@/app/button.module.css";
import styles from "./list.module.css";

interface TaskListProps {
  ref: Ref<HTMLUListElement>;
  state: State;
  store: TaskStore;
  setQuery: (query: Query) => void;
  onOpen: (task: Task) => void;
  onNew: () => void;
}

export function TaskList({ ref, state: { query, tasks, phase, more, loadingMore }, store, setQuery, onOpen, onNew }: TaskListProps) {
  if (phase === "failed") return <Failed again={() => void store.setQuery(query)} />;
  if (phase === "loading") return <SkeletonRows />;
  if (tasks.length === 0) return <Empty query={query} onNew={onNew} onClear={() => setQuery({ ...EVERYTHING, sort: query.sort })} />;
  return (
    <>
      <ul ref={ref} className={styles.list} aria-labelledby="list-title">
        {tasks.map((task) => (
          <Row key={task.id} task={task} store={store} onOpen={onOpen} onTag={(tag) => setQuery({ ...EVERYTHING, sort: query.sort, tag })} />
        ))}
      </ul>
      {more && (
        <button type="button" className={`${button.quiet} ${styles.more}`} disabled={loadingMore} onClick={() => void store.loadMore()}>
          {loadingMore ? "Loading…" : "Load more"}
        </button>
      )}
    </>
  );
}
