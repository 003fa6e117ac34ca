"use strict";
// Light or dark: as the system has it, until somebody chooses; the choice is remembered where the browser allows it.
const theme = (() => {
  const root = document.documentElement;
  const name = "welltuned-theme";
  const kept = () => { try { return localStorage.getItem(name); } catch { return null; } };
  if (["light", "dark"].includes(kept())) root.dataset.theme = kept();
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme")?.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      try { localStorage.setItem(name, root.dataset.theme); } catch { /* a page from disk may not remember */ }
      dispatchEvent(new Event("theme"));
    });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dispatchEvent(new Event("theme")));
})();
