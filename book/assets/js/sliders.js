// Two gaps of the widget manager: it gives slider handles and Play buttons no accessible name, and it asks for MathJax 2.
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

  // It hands the text of every frame to MathJax 2, whose queue version 3 does not have. Frames hold no formulas.
  function acceptMathJax2() {
    if (window.MathJax) window.MathJax.Hub ??= { Queue() {} };
  }

  document.addEventListener("DOMContentLoaded", () => {
    const article = document.querySelector("article");
    if (!article?.querySelector('script[type^="application/vnd.jupyter.widget-view"]')) return;
    acceptMathJax2();
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
