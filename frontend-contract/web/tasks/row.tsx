"use client";
import type { Task } from "@frontend-contract/client";
import { Icon } from "@/app/icons.tsx";
import { useClock } from "./clock.ts";
import { dueText } from "./due.ts";
import { PRIORITIES, STATUSES } from "./query.ts";
import type { TaskStore } from "./store.ts";
import button from "@/app/button.module.css";
import styles from "./row.module.css";

interface RowProps {
  task: Task;
  store: TaskStore;
  onOpen: (task: Task) => void;
  onTag: (tag: string) => void;
}

export function Row({ task, store, onOpen, onTag }: RowProps) {
  const clock = useClock();
  const trashed = task.deleted_at !== null;
  return (
    <li className={styles.row} data-task={task.id} data-status={task.status} data-unsent={task.version === 0 || undefined}>
      {!trashed && (
        <input
          type="checkbox"
          className={styles.check}
          data-progress={task.status === "in_progress" || undefined}
          checked={task.status === "done"}
          aria-label={`Done: ${task.title}`}
          onChange={() => store.complete(task)}
        />
      )}
      <div className={styles.body}>
        {trashed ? (
          <span className={styles.title} data-open tabIndex={-1}>{task.title}</span>
        ) : (
          <button type="button" className={styles.title} data-open aria-haspopup="dialog" onClick={() => onOpen(task)}>{task.title}</button>
        )}
        <span className={styles.about}>
          {task.priority !== "normal" && <span className={styles.priority} data-priority={task.priority}><Bars priority={task.priority} />{PRIORITIES[task.priority]}</span>}
          {task.status === "in_progress" && <span className={styles.progress}>{STATUSES.in_progress}</span>}
          {task.due_at && (
            <time className={styles.due} dateTime={task.due_at} data-late={task.is_overdue || undefined}>
              <Icon name="calendar" />
              {task.is_overdue && <span className="unseen">Overdue: </span>}
              {dueText(task.due_at, clock)}
            </time>
          )}
          {task.tags.length > 0 && (
            <span className={styles.tags}>
              {task.tags.map((tag) => (
                <button key={tag} type="button" className={styles.tag} aria-label={`Tag ${tag}`} onClick={() => onTag(tag)}>{tag}</button>
              ))}
            </span>
          )}
        </span>
      </div>
      {trashed ? (
        <button type="button" className={button.quiet} aria-label={`Restore: ${task.title}`} onClick={() => store.restore(task)}><Icon name="undo" /> Restore</button>
      ) : (
        <button type="button" className={`${button.icon} ${styles.remove}`} aria-label={`Delete: ${task.title}`} title="Delete" onClick={() => store.remove(task)}><Icon name="trash" /></button>
      )}
    </li>
  );
}

const LEVEL = { low: 1, normal: 2, high: 3, urgent: 3 } as const;

function Bars({ priority }: { priority: Task["priority"] }) {
  return (
    <svg className={styles.bars} viewBox="0 0 12 12" aria-hidden="true">
      {[0, 1, 2].map((bar) => <rect key={bar} x={bar * 4.5} y={8 - bar * 4} width="3" height={4 + bar * 4} rx="1" opacity={bar < LEVEL[priority] ? 1 : 0.3} />)}
    </svg>
  );
}
