/** Light, dark, or what the system says; kept in a cookie, so that the first paint is right. */
export type Theme = "system" | "light" | "dark";

export const themeOf = (text: string | undefined): Theme => (text === "light" || text === "dark" ? text : "system");

/** In the browser: from now on, and for the next visit. */
export function setTheme(theme: Theme): void {
  document.documentElement.dataset["theme"] = theme;
  document.cookie = `theme=${theme}; path=/; max-age=31536000; samesite=lax`;
}
