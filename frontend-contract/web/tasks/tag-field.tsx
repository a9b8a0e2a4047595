"use client";
import { type KeyboardEvent, useState } from "react";
import { Icon } from "@/app/icons.tsx";
import type { Tag } from "./store.ts";
import styles from "./editor.module.css";

/** A tag input: Enter or a comma adds a tag, Backspace in the empty field removes the last one. */
export function TagField({ tags, known, onChange }: { tags: string[]; known: readonly Tag[]; onChange: (tags: string[]) => void }) {
  const [text, setText] = useState("");
  const has = (name: string) => tags.some((tag) => tag.toLowerCase() === name.toLowerCase());

  function add() {
    const name = text.trim().replace(/^#/, "");
    if (name && !has(name)) onChange([...tags, name]);
    setText("");
  }

  function pressed(event: KeyboardEvent) {
    if (event.key === "," || (event.key === "Enter" && text.trim())) {
      event.preventDefault();
      if (event.metaKey || event.ctrlKey) return;
      add();
    } else if (event.key === "Backspace" && text === "") {
      onChange(tags.slice(0, -1));
    }
  }

  return (
    <div className={styles.field}>
      <label htmlFor="tag-input">Tags</label>
      <div className={styles.tags}>
        {tags.map((tag) => (
          <span key={tag} className={styles.tag}>
            {tag}
            <button type="button" aria-label={`Remove tag ${tag}`} onClick={() => onChange(tags.filter((other) => other !== tag))}><Icon name="close" /></button>
          </span>
        ))}
        <input id="tag-input" list="known-tags" value={text} maxLength={50} placeholder={tags.length === 0 ? "home, work…" : ""} onChange={(event) => setText(event.target.value)} onKeyDown={pressed} onBlur={add} />
        <datalist id="known-tags">{known.filter(({ name }) => !has(name)).map(({ id, name }) => <option key={id} value={name} />)}</datalist>
      </div>
    </div>
  );
}
