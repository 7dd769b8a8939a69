// What a reference points to, shown beside it on hover or focus: equation, figure, theorem, term, section, citation.
(() => {
  "use strict";

  const HERE = document.currentScript.src;
  const REFERENCES = 'article a.reference.internal[href*="#"]';
  const OPEN_AFTER = { pointer: 250, keyboard: 600 };
  const CLOSE_AFTER = 250;
  const GAP = 6;

  const pages = new Map();
  let preview = null;
  let reference = null;
  let timer = null;

  // --- what to show

  function page(address) {
    if (address === location.origin + location.pathname) return Promise.resolve(document);
    if (location.protocol === "file:") return Promise.resolve(null); // a browser lets no file read another
    if (!pages.has(address)) pages.set(address, fetch(address).then((answer) => answer.text()).then((text) => parse(text, address)));
    return pages.get(address);
  }

  function parse(text, address) {
    const parsed = new DOMParser().parseFromString(text, "text/html");
    for (const image of parsed.images) image.src = new URL(image.getAttribute("src"), address).href;
    return parsed;
  }

  function targetOf(source, id) {
    let target = source.getElementById(id);
    if (target?.matches("span") && !target.textContent.trim()) target = target.nextElementSibling || target.parentElement;
    if (!target) return [];
    if (target.matches("section")) return opening(target);
    if (target.matches("dt")) return [target, target.nextElementSibling];
    return [target];
  }

  function opening(section) {
    const heading = section.querySelector("h1, h2, h3, h4");
    let first = heading?.nextElementSibling;
    while (first && !first.matches("p, div.math")) first = first.nextElementSibling;
    return [heading, first];
  }

  function inert(element) {
    const copy = element.cloneNode(true);
    copy.querySelectorAll("script, button, .headerlink, .eq-badge").forEach((part) => part.remove());
    for (const part of [copy, ...copy.querySelectorAll("*")]) {
      for (const name of ["id", "href", "tabindex"]) part.removeAttribute(name);
    }
    return copy;
  }

  // --- formulas of another page are not typeset yet, and Sphinx leaves MathJax out of pages without formulas

  let mathjax = null;

  function loadMathJax() {
    if (window.MathJax?.typesetPromise) return Promise.resolve();
    mathjax ??= new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = new URL("../vendor/mathjax/tex-chtml.js", HERE).href;
      script.onload = () => window.MathJax.startup.promise.then(resolve);
      script.onerror = reject;
      document.head.append(script);
    });
    return mathjax;
  }

  async function typeset(element) {
    const isRaw = /\\\(|\\\[/.test(element.textContent) && !element.querySelector("mjx-container");
    if (!isRaw) return;
    await loadMathJax();
    await window.MathJax.typesetPromise([element]);
    element.querySelectorAll("[tabindex]").forEach((part) => part.removeAttribute("tabindex"));
  }

  // --- showing and hiding

  function place(element, anchor) {
    const link = anchor.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = element;
    const left = Math.min(link.left, document.documentElement.clientWidth - width - 8);
    const fitsBelow = link.bottom + GAP + height <= window.innerHeight;
    const fitsAbove = link.top - GAP - height >= 0;
    element.style.left = `${Math.max(8, left)}px`;
    element.style.top = `${fitsBelow || !fitsAbove ? link.bottom + GAP : link.top - GAP - height}px`;
  }

  function hide() {
    clearTimeout(timer);
    preview?.remove();
    reference?.removeAttribute("aria-describedby");
    preview = reference = null;
  }

  async function show(link) {
    reference = link;
    const address = new URL(link.href);
    const source = await page(address.origin + address.pathname).catch(() => null);
    const parts = source ? targetOf(source, decodeURIComponent(address.hash.slice(1))).filter(Boolean) : [];
    if (reference !== link || !parts.length) return;
    preview = document.createElement("div");
    preview.className = "preview";
    preview.id = "preview";
    preview.setAttribute("role", "tooltip");
    preview.append(...parts.map(inert));
    preview.addEventListener("mouseenter", () => clearTimeout(timer));
    preview.addEventListener("mouseleave", hide);
    document.querySelector("main").append(preview);
    link.setAttribute("aria-describedby", "preview");
    await typeset(preview).catch(() => {});
    if (preview) place(preview, link);
  }

  function enter(event) {
    const link = event.target.closest?.(REFERENCES);
    if (!link || link === reference || link.closest(".preview")) return;
    hide();
    timer = setTimeout(() => show(link), OPEN_AFTER[event.type === "focusin" ? "keyboard" : "pointer"]);
  }

  function leave(event) {
    if (!event.target.closest?.(REFERENCES)) return;
    clearTimeout(timer);
    timer = setTimeout(hide, event.type === "focusout" ? 0 : CLOSE_AFTER);
  }

  document.addEventListener("DOMContentLoaded", () => {
    if (matchMedia("(hover: hover)").matches) {
      document.addEventListener("mouseover", enter);
      document.addEventListener("mouseout", leave);
    }
    document.addEventListener("focusin", enter);
    document.addEventListener("focusout", leave);
    document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
    document.addEventListener("scroll", () => preview && hide(), { passive: true });
  });
})();
