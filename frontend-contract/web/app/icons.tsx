/** Paths of the icons, on a 24-pixel grid. Icons are decorative: labels name the action for screen readers. */
const PATHS = {
  alert: "M12 8v5m0 3.2v.1M12 3 2.5 20h19z",
  calendar: "M4.5 6h15v14h-15zM4.5 10.5h15M8.5 3.5V7m7-3.5V7",
  check: "m5 12.5 4.5 4.5L19 7.5",
  circle: "M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16z",
  close: "m6 6 12 12M18 6 6 18",
  clock: "M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16zm0 4v4.3l3 1.7",
  done: "M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16zm-3.3 8.2 2.3 2.3 4.3-4.6",
  exit: "M14 4H5v16h9M10 12h10m-3.5-3.5L20 12l-3.5 3.5",
  inbox: "M4 13.5V19h16v-5.5L17 5H7zm0 0h4.5l1.2 2.5h4.6l1.2-2.5H20",
  keyboard: "M3 6.5h18v11H3zM7 14h10M7 10.3v-.1m3.3.1v-.1m3.4.1v-.1m3.3.1v-.1",
  moon: "M19.5 14.5A8 8 0 0 1 9.5 4.5 8 8 0 1 0 19.5 14.5z",
  offline: "M4 4l16 16M8.5 15.5a5 5 0 0 1 6.5-.5M5.5 12a9.5 9.5 0 0 1 4-2.3m4.5-.2a9.5 9.5 0 0 1 4.5 2.5M12 19v.1",
  plus: "M12 5.5v13M5.5 12h13",
  progress: "M12 4a8 8 0 1 0 0 16 8 8 0 0 0 0-16zm0 4a4 4 0 0 1 0 8zm1.2 1.200v5.600m1.2-4.600v3.6",
  search: "M11 4.5a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13zm4.8 11.3L20 20",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zm0-5v1.5m0 15V21M3 12h1.5m15 0H21M5.6 5.6l1.1 1.1m10.6 10.6 1.1 1.1m0-12.8-1.1 1.1M6.7 17.3l-1.1 1.1",
  tag: "M4 4h7.5L20 12.5 12.5 20 4 11.5zM8.3 8.3v-.1",
  trash: "M4 7h16M9 7V4.5h6V7m-9 0 1 13h10l1-13M10 11v5m4-5v5",
  undo: "M4.5 9.5h10a5 5 0 0 1 0 10H9m-4.5-10L8.5 5.5m-4 4 4 4",
} as const;

export type IconName = keyof typeof PATHS;

export function Icon({ name }: { name: IconName }) {
  return (
    <svg className="icon" viewBox="0 0 24 24" aria-hidden="true">
      <path d={PATHS[name]} />
    </svg>
  );
}

/** The app's logo. */
export function Mark() {
  return (
    <svg className="mark" viewBox="0 0 24 24" aria-hidden="true">
      <rect width="24" height="24" rx="7" />
      <path d="m6.8 12.6 3.5 3.5 7-7.7" />
    </svg>
  );
}
