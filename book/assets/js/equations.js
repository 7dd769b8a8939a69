// A formula wider than the column scrolls in its own box; only such a formula is a Tab stop.
(() => {
  "use strict";

  function makeScrollable(box) {
    const overflows = box.scrollWidth > box.clientWidth + 1;
    box.classList.toggle("scrolls", overflows);
    if (overflows) {
      box.tabIndex = 0;
    } else {
      box.removeAttribute("tabindex");
    }
  }

  function update() {
    document.querySelectorAll("div.math mjx-container, span.math").forEach(makeScrollable);
  }

  window.addEventListener("load", () => {
    const typeset = window.MathJax?.startup?.promise;
    if (!typeset) return;
    typeset.then(update);
    let timer;
    window.addEventListener("resize", () => {
      clearTimeout(timer);
      timer = setTimeout(update, 200);
    });
  });
})();
