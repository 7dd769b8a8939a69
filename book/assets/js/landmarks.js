// Names and keyboard focus for the theme's own controls.
(() => {
  "use strict";

  const THEME_CONTROLS = ".theme-switch-button, .search-button, .primary-toggle, .secondary-toggle";
  let pressed = null;

  function nameThemeSwitch() {
    const mode = document.documentElement.dataset.mode || "auto";
    for (const button of document.querySelectorAll(".theme-switch-button")) {
      button.setAttribute("aria-label", `Colour mode: ${mode}`);
    }
  }

  // Its visible text, "Search Ctrl+K", names it better than the label that contradicts it.
  function nameSearchField() {
    document.querySelectorAll(".search-button-field").forEach((button) => button.removeAttribute("aria-label"));
  }

  function nameSidebars() {
    const names = { "pst-primary-sidebar": "Book", "pst-secondary-sidebar": "This page" };
    for (const [id, name] of Object.entries(names)) {
      const sidebar = document.getElementById(id);
      if (!sidebar) continue;
      sidebar.setAttribute("role", "complementary");
      sidebar.setAttribute("aria-label", name);
    }
  }

  // The theme takes the focus off each of its buttons after a click. Give it back when the click came from a keyboard.
  function returnFocus() {
    setTimeout(() => {
      if (pressed && !document.querySelector("dialog[open]")) pressed.focus();
    }, 50);
  }

  function rememberPress(event) {
    const button = event.target.closest?.(THEME_CONTROLS);
    const fromKeyboard = event.detail === 0;
    pressed = button && fromKeyboard ? button : null;
    returnFocus();
  }

  document.addEventListener("DOMContentLoaded", () => {
    nameThemeSwitch();
    nameSearchField();
    nameSidebars();
    new MutationObserver(nameThemeSwitch).observe(document.documentElement, { attributeFilter: ["data-mode"] });
    document.addEventListener("click", rememberPress, true);
    for (const dialog of document.querySelectorAll("dialog")) dialog.addEventListener("close", returnFocus);
  });
})();
