import { Icon, type IconName } from "@/app/icons.tsx";
import { EVERYTHING, type Query } from "./query.ts";
import button from "@/app/button.module.css";
import styles from "./states.module.css";

/** Placeholders while tasks are loading. */
export function SkeletonRows() {
  return (
    <div className={styles.skeleton} role="status">
      <span className="unseen">Loading…</span>
      {[62, 44, 71, 38, 55, 49].map((width) => <span key={width} className={styles.bone} style={{ "--width": `${width}%` } as React.CSSProperties} aria-hidden="true" />)}
    </div>
  );
}

export function Empty({ query, onNew, onClear }: { query: Query; onNew: () => void; onClear: () => void }) {
  if (query.deleted) return <State icon="trash" title="The trash is empty" text="Deleted tasks are kept here for 30 days." />;
  if (query.q || query.priority) {
    return <State icon="search" title="No matching tasks" text="No tasks match these filters." action="Show all tasks" onAction={onClear} />;
  }
  if (query.overdue) return <State icon="done" title="No overdue tasks" text="No task is past its due date." />;
  if (query.status === "done") return <State icon="done" title="No completed tasks" text="Completed tasks appear here." />;
  const all = query.status === EVERYTHING.status && query.tag === null;
  return <State icon="inbox" title={all ? "No tasks yet" : "No tasks here"} text={all ? "Add your first task." : "Add a task to this view."} action="Add a task" onAction={onNew} />;
}

export function Failed({ again }: { again: () => void }) {
  return <State icon="alert" title="The tasks could not be loaded" text="The server could not be reached or returned an error. No tasks were lost." action="Try again" onAction={again} alert />;
}

interface StateProps {
  icon: IconName;
  title: string;
  text: string;
  action?: string;
  onAction?: () => void;
  alert?: boolean;
}

function State({ icon, title, text, action, onAction, alert }: StateProps) {
  return (
    <div className={styles.state} role={alert ? "alert" : undefined}>
      <span className={styles.picture}><Icon name={icon} /></span>
      <h2>{title}</h2>
      <p>{text}</p>
      {action && <button type="button" className={button.quiet} onClick={onAction}>{action}</button>}
    </div>
  );
}
