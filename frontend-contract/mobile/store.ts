/** Persistent storage of a replica. */

/** A key-value store of strings. Commits must be atomic, also when the app crashes. */
export interface Store {
  load(): Promise<ReadonlyMap<string, string>>;
  /** Writes all changes, or none. null removes a key. */
  commit(changes: ReadonlyMap<string, string | null>): Promise<void>;
}

/** The methods of expo-sqlite's `SQLiteDatabase` that the store uses. */
export interface SQLite {
  execSync(source: string): void;
  runSync(source: string, ...params: string[]): unknown;
  getAllSync<Row>(source: string): Row[];
  withTransactionSync(task: () => void): void;
}

/** A store in SQLite: `sqliteStore(openDatabaseSync("tasks-<person>.db"))`. */
export function sqliteStore(database: SQLite): Store {
  database.execSync("PRAGMA journal_mode = WAL; CREATE TABLE IF NOT EXISTS kept (key TEXT PRIMARY KEY, value TEXT NOT NULL)");
  return {
    async load() {
      const rows = database.getAllSync<{ key: string; value: string }>("SELECT key, value FROM kept");
      return new Map(rows.map(({ key, value }) => [key, value]));
    },
    async commit(changes) {
      database.withTransactionSync(() => {
        for (const [key, value] of changes) {
          if (value === null) database.runSync("DELETE FROM kept WHERE key = ?", key);
          else database.runSync("INSERT OR REPLACE INTO kept (key, value) VALUES (?, ?)", key, value);
        }
      });
    },
  };
}
