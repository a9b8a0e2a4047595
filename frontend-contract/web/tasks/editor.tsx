"use client";
import { type FormEvent, useRef, useState } from "react";
import { same, type Task, type TaskChanges } from "@frontend-contract/client";
import { Icon } from "@/app/icons.tsx";
import { Dialog } from "./dialog.tsx";
import { fromInput, toInput } from "./due.ts";
import { PRIORITIES, STATUSES } from "./query.ts";
import type { Tag, TaskStore } from "./store.ts";
import { TagField } from "./tag-field.tsx";
import button from "@/app/button.module.css";
import styles from "./editor.module.css";

interface EditorProps {
  /** The task as it was when the editor opened; changes are saved against this version. */
  task: Task;
  /** The task as it is now; null when it is no longer in the list. */
  current: Task | null;
  tags: readonly Tag[];
  store: TaskStore;
  onClose: () => void;
}

export function Editor({ task, current, tags, store, onClose }: EditorProps) {
  const form = useRef<HTMLFormElement>(null);
  const [chosen, setChosen] = useState<string[]>(task.tags);

  function submit(event: FormEvent) {
    event.preventDefault();
    const changes = changesIn(new FormData(form.current!), chosen, task);
    if (Object.keys(changes).length > 0) store.edit(task, changes);
    onClose();
  }

  return (
    <Dialog title="Edit task" sheet onClose={onClose}>
      <form
        ref={form}
        className={styles.form}
        onSubmit={submit}
        onKeyDown={(event) => {
          if (event.key === "Enter" && (event.metaKey || event.ctrlKey)) form.current?.requestSubmit();
        }}
      >
        {current && current.version > task.version && (
          <p className={styles.changed} role="status"><Icon name="alert" /> Changed elsewhere since you opened it. You can compare both versions when you save.</p>
        )}
        <label className={styles.field}>
          <span>Title</span>
          <input name="title" defaultValue={task.title} maxLength={200} required pattern=".*\S.*" className={styles.title} />
        </label>
        <label className={styles.field}>
          <span>Notes</span>
          <textarea name="description" defaultValue={task.description ?? ""} maxLength={5000} rows={5} />
        </label>
        <Choice name="status" label="Status" options={STATUSES} value={task.status} />
        <Choice name="priority" label="Priority" options={PRIORITIES} value={task.priority} />
        <label className={styles.field}>
          <span>Due</span>
          <input name="due_at" type="datetime-local" defaultValue={toInput(task.due_at)} />
        </label>
        <TagField tags={chosen} known={tags} onChange={setChosen} />
        <footer className={styles.foot}>
          <button type="button" className={button.danger} onClick={() => { onClose(); store.remove(task); }}><Icon name="trash" /> Delete</button>
          <button type="button" className={button.quiet} onClick={onClose}>Cancel</button>
          <button className={button.primary}>Save</button>
        </footer>
      </form>
    </Dialog>
  );
}

function Choice({ name, label, options, value }: { name: string; label: string; options: Record<string, string>; value: string }) {
  return (
    <fieldset className={styles.choice}>
      <legend>{label}</legend>
      <div>
        {Object.entries(options).map(([option, text]) => (
          <label key={option}>
            <input type="radio" name={name} value={option} defaultChecked={option === value} />
            <span>{text}</span>
          </label>
        ))}
      </div>
    </fieldset>
  );
}

/** The changed members. Unchanged ones are not sent, so that they cannot cause a conflict. */
function changesIn(form: FormData, tags: string[], task: Task): TaskChanges {
  const text = (name: string) => String(form.get(name) ?? "");
  const due = text("due_at");
  const wanted: Required<TaskChanges> = {
    title: text("title").trim(),
    description: text("description") || null,
    status: text("status") as Task["status"],
    priority: text("priority") as Task["priority"],
    // The input has no seconds: if it was not edited, keep the exact time.
    due_at: due === toInput(task.due_at) ? task.due_at : fromInput(due),
    tags,
  };
  const members = Object.entries(wanted) as [keyof TaskChanges, unknown][];
  return Object.fromEntries(members.filter(([name, value]) => !same(name, value, task[name])));
}
