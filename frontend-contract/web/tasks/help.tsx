"use client";
import { Dialog } from "./dialog.tsx";
import { SHORTCUTS, setSingleKeys, singleKeys } from "./shortcuts.ts";
import styles from "./help.module.css";

export function Help({ onClose }: { onClose: () => void }) {
  return (
    <Dialog title="Keyboard shortcuts" onClose={onClose}>
      <dl className={styles.keys}>
        {SHORTCUTS.map(([key, meaning]) => (
          <div key={key}>
            <dt><kbd>{key}</kbd></dt>
            <dd>{meaning}</dd>
          </div>
        ))}
      </dl>
      <label className={styles.setting}>
        <input type="checkbox" defaultChecked={singleKeys()} onChange={(event) => setSingleKeys(event.target.checked)} />
        Enable single-key shortcuts
      </label>
    </Dialog>
  );
}
