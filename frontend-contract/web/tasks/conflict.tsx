"use client";
import { useState } from "react";
import { same, type Task, type TaskChanges } from "@frontend-contract/client";
import { useClock, type Clock } from "./clock.ts";
import { Dialog } from "./dialog.tsx";
import { dueText } from "./due.ts";
import { PRIORITIES, STATUSES } from "./query.ts";
import type { Dispute } from "./store.ts";
import button from "@/app/button.module.css";
import styles from "./conflict.module.css";

const MEMBERS = { title: "Title", description: "Notes", status: "Status", priority: "Priority", due_at: "Due", tags: "Tags" } as const;
type Member = keyof typeof MEMBERS;
type Side = "mine" | "theirs";

/** Shows both versions of a task that was also changed elsewhere, to choose from field by field. */
export function ConflictDialog({ dispute: { mine, theirs, changed }, onSettle }: { dispute: Dispute; onSettle: (changes: TaskChanges | null) => void }) {
  const clock = useClock();
  const differing = (Object.keys(MEMBERS) as Member[]).filter((name) => !same(name, mine[name], theirs[name]));
  const [sides, setSides] = useState<Partial<Record<Member, Side>>>({});
  const all = (side: Side) => setSides(Object.fromEntries(differing.map((name) => [name, side])));
  const sideOf = (name: Member): Side => sides[name] ?? (changed.includes(name) ? "mine" : "theirs");

  function save() {
    const chosen = differing.filter((name) => sideOf(name) === "mine");
    onSettle(Object.fromEntries(chosen.map((name) => [name, mine[name]])) as TaskChanges);
  }

  return (
    <Dialog title="Conflicting changes" wide onClose={() => onSettle(null)}>
      <p className={styles.lead}>“{theirs.title}” was changed elsewhere while you were editing it. Choose which version of each field to keep.</p>
      <div className={styles.versions}>
        <div className={styles.heads}>
          <button type="button" onClick={() => all("mine")}>Yours <small>Use all</small></button>
          <button type="button" onClick={() => all("theirs")}>Theirs <small>Use all</small></button>
        </div>
        {differing.map((name) => (
          <fieldset key={name} className={styles.member}>
            <legend>{MEMBERS[name]}</legend>
            {(["mine", "theirs"] as const).map((side) => (
              <label key={side} className={styles.side}>
                <input type="radio" name={name} checked={sideOf(name) === side} onChange={() => setSides({ ...sides, [name]: side })} />
                <span><span className="unseen">{side === "mine" ? "Yours: " : "Theirs: "}</span>{textOf(name, side === "mine" ? mine : theirs, clock)}</span>
              </label>
            ))}
          </fieldset>
        ))}
      </div>
      <footer className={styles.foot}>
        <button type="button" className={button.quiet} onClick={() => onSettle(null)}>Discard my changes</button>
        <button type="button" className={button.primary} onClick={save}>Save this version</button>
      </footer>
    </Dialog>
  );
}

function textOf(name: Member, task: Task, clock: Clock): string {
  switch (name) {
    case "status": return STATUSES[task.status];
    case "priority": return PRIORITIES[task.priority];
    case "due_at": return task.due_at ? dueText(task.due_at, clock) : "No due date";
    case "tags": return task.tags.join(", ") || "No tags";
    default: return task[name] || "Empty";
  }
}
