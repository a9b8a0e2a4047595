"use client";
import { type FormEvent, type Ref, useState } from "react";
import { Icon } from "@/app/icons.tsx";
import type { Query } from "./query.ts";
import { quickAdd } from "./quick-add.ts";
import type { NewTask } from "./store.ts";
import styles from "./composer.module.css";

/** Adds a task from one line of text, with the tag, status and priority that the current view filters by. */
export function Composer({ ref, query, onAdd }: { ref: Ref<HTMLInputElement>; query: Query; onAdd: (task: NewTask) => void }) {
  const [line, setLine] = useState("");

  function submit(event: FormEvent) {
    event.preventDefault();
    const task = quickAdd(line);
    if (!task) return;
    if (query.tag && !task.tags?.includes(query.tag)) task.tags = [...(task.tags ?? []), query.tag];
    if (query.status) task.status = query.status;
    if (query.priority) task.priority ??= query.priority;
    onAdd(task);
    setLine("");
  }

  return (
    <form className={styles.composer} onSubmit={submit}>
      <Icon name="plus" />
      <input
        ref={ref}
        aria-label="New task"
        aria-describedby="composer-hint"
        placeholder="Add a task"
        value={line}
        maxLength={200}
        autoComplete="off"
        onChange={(event) => setLine(event.target.value)}
        onKeyDown={(event) => {
          if (event.key === "Escape") event.currentTarget.blur();
        }}
      />
      <span id="composer-hint" className={styles.hint}><code>#tag</code> <code>!high</code> <code>@tomorrow</code></span>
      <button className={styles.add} disabled={line.trim() === ""}>Add</button>
    </form>
  );
}
