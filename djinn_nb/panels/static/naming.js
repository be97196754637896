// Names, roles and keys that Jupyter's own widgets leave out, for screen readers and keyboards.
//
// The box of widgets that is a panel gets a role and a name; a slider's handle the name beside it; the
// header of an accordion, which listens to the mouse alone, becomes a button.

/** Complete the panel around an element, also in what is added to it later; returns how to end that.
 * @param {HTMLElement} el @param {() => string} label
 * @param {number} [frames] waited for: a view is made before it is put into its panel */
export function completeNames(el, label, frames = 60) {
  let watched = null;
  const ours = (event) => keepPlainKeys(el.closest(".djinn-panel"), event);
  // before the notebook, which listens at the document
  window.addEventListener("keydown", ours, true);
  const begin = (left) => {
    const panel = el.closest(".djinn-panel");
    if (!panel) {
      if (left > 0) requestAnimationFrame(() => begin(left - 1));
      return;
    }
    panel.setAttribute("role", "region");
    panel.setAttribute("aria-label", label());
    nameHandles(panel);
    watched = new MutationObserver(() => nameHandles(panel));
    watched.observe(panel, { childList: true, subtree: true });
    openByKey(panel.closest(".jupyter-widget-Accordion-child"));
  };
  begin(frames);
  return () => {
    window.removeEventListener("keydown", ours, true);
    watched?.disconnect();
  };
}

/** Keep keys without a modifier from the notebook: arrows would move from cell to cell, and letters
 * typed at a list are its shortcuts, such as "d d". Those that run cells, and all others, stay its own.
 * @param {Element | null} panel @param {KeyboardEvent} event */
function keepPlainKeys(panel, event) {
  if (!(event.target instanceof Element) || !panel?.contains(event.target)) return;
  const isPlain = !(event.ctrlKey || event.metaKey || event.altKey || (event.shiftKey && event.key === "Enter"));
  event.target.toggleAttribute("data-lm-suppress-shortcuts", isPlain);
}

/** @param {Element} panel */
function nameHandles(panel) {
  for (const handle of panel.querySelectorAll(".noUi-handle:not([aria-label])")) {
    const name = handle.closest(".jupyter-widgets")?.querySelector(".widget-label")?.textContent;
    if (name) handle.setAttribute("aria-label", name);
  }
}

/** @param {Element | null} section one of an accordion, the panel in it */
function openByKey(section) {
  const header = section?.querySelector(":scope > .jupyter-widget-Collapse-header");
  if (!header || header.getAttribute("role") === "button") return;
  header.setAttribute("role", "button");
  header.setAttribute("tabindex", "0");
  // else a letter typed here is a shortcut of the notebook's, such as "d d"
  header.setAttribute("data-lm-suppress-shortcuts", "true");
  header.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    event.stopPropagation();
    header.click();
  });
  const tell = () =>
    header.setAttribute("aria-expanded", String(section.classList.contains("jupyter-widget-Collapse-open")));
  new MutationObserver(tell).observe(section, { attributes: true, attributeFilter: ["class"] });
  tell();
}
