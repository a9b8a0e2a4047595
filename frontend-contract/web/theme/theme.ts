/** The colour theme, stored in a cookie so that the server renders the chosen one. */
export type Theme = "system" | "light" | "dark";

export const themeOf = (text: string | undefined): Theme => (text === "light" || text === "dark" ? text : "system");

/** Applies the theme and stores it. Runs in the browser only. */
export function setTheme(theme: Theme): void {
  document.documentElement.dataset["theme"] = theme;
  document.cookie = `theme=${theme}; path=/; max-age=31536000; samesite=lax`;
}
