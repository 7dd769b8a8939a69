// The widget manager gives its slider handles and Play buttons no accessible name: take the visible label, or the icon.
(() => {
  "use strict";

  const ICONS = { "fa-play": "Play", "fa-pause": "Pause", "fa-stop": "Back to the start", "fa-retweet": "Repeat" };

  function setLabel(element, label) {
    if (element.getAttribute("aria-label") !== label) element.setAttribute("aria-label", label);
  }

  function nameHandle(handle) {
    const label = handle.closest(".widget-slider")?.querySelector(".widget-label")?.textContent.trim();
    setLabel(handle, label || "value");
  }

  function nameButton(button) {
    const icon = Object.keys(ICONS).find((name) => button.querySelector(`.${name}`));
    if (icon) setLabel(button, ICONS[icon]);
  }

  function nameAll(article) {
    article.querySelectorAll(".noUi-handle").forEach(nameHandle);
    article.querySelectorAll(".widget-play button").forEach(nameButton);
  }

  document.addEventListener("DOMContentLoaded", () => {
    const article = document.querySelector("article");
    if (!article?.querySelector('script[type^="application/vnd.jupyter.widget-view"]')) return;
    let waiting = false;
    new MutationObserver(() => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        nameAll(article);
      });
    }).observe(article, { childList: true, subtree: true, attributeFilter: ["class"] });
  });
})();
