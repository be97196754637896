// Tokens: a strip of prompt and continuation, each token on the colour of its number. A choice changes
// two elements, so that thousands of tokens stay quick.
import { paint } from "./colours.js";
import { element, floats, freshId, linearShare, rangeOf, scaleBar, short, sign, visible } from "./common.js";

export default { render };

/** @param {{ model: any, el: HTMLElement }} given */
function render({ model, el }) {
  let shown = model.get("shown");
  let marks = model.get("marks");
  let values = floats(undefined);
  let range = [0, 1];
  let version = null;
  /** the token that keys move */
  let at = 0;
  /** @type {HTMLElement[]} */
  let options = [];
  const prefix = freshId();

  const empty = element("div", { class: "djinn-empty", role: "status" });
  const measure = element("select", { onchange: () => ask() });
  const other = element("select", { onchange: () => ask() });
  const otherLabel = element("label", {}, ["than ", other]);
  const legend = element("span", { class: "djinn-row" });
  const strip = element("div", {
    class: "djinn-tokens", role: "listbox", tabindex: "0", "aria-label": "tokens",
    "aria-orientation": "horizontal", onkeydown: onKey, onclick: onClick, onmouseover: onHover,
    onmouseleave: () => tell(at),
  });
  const told = element("div", { class: "djinn-told", "aria-live": "polite" });
  const full = element("div", {}, [
    element("div", { class: "djinn-row" }, [
      element("label", {}, ["colour by ", measure]), otherLabel, legend,
    ]),
    strip, told,
    element("div", { class: "djinn-muted djinn-code" }, [
      "left and right move by a token · up and down by a line · Home and End",
    ]),
  ]);
  const root = element("div", { class: "djinn-view" }, [empty, full]);
  el.append(root);

  const ready = () => shown.state === "ready";

  // -- what is there --------------------------------------------------------------------------

  function take() {
    shown = model.get("shown");
    empty.hidden = ready();
    full.hidden = !ready();
    empty.textContent = shown.text;
    if (!ready()) return;
    values = floats(shown.values);
    range = rangeOf(values);
    if (options.length !== shown.tokens.length || version !== shown.version.split(" ")[0]) build();
    version = shown.version.split(" ")[0];
    colour();
    choices();
    follow();
  }

  /** One option per token. */
  function build() {
    options = shown.tokens.map((text, position) =>
      element("span", { class: "djinn-token", role: "option", id: `${prefix}-${position}`, "aria-selected": "false" }, [
        visible(text, shown.ids[position]),
      ]),
    );
    strip.replaceChildren(...options);
    at = Math.min(at, options.length - 1);
  }

  function colour() {
    options.forEach((option, position) => {
      const value = values[position];
      const has = Number.isFinite(value);
      const { fill, ink } = has ? paint(linearShare(value, ...range)) : { fill: "", ink: "" };
      option.style.background = fill;
      option.style.color = ink;
      option.classList.toggle("djinn-none", !has);
      option.classList.toggle("djinn-made", position >= shown.prompt);
      option.textContent = visible(shown.tokens[position], shown.ids[position]);
      option.setAttribute("aria-label", words(position));
    });
    const gaps = values.some((value) => !Number.isFinite(value));
    const compared = shown.measure === "difference" ? `, node ${shown.other}` : "";
    legend.replaceChildren(
      scaleBar(paint, short(range[0]), short(range[1]), `${shown.unit}, at ${shown.location}${compared}`),
      sign("djinn-sign-made", "generated"),
      sign("djinn-sign-chosen", "chosen"),
      ...(gaps ? [sign("djinn-sign-not-run", shown.missing)] : []),
    );
  }

  function choices() {
    measure.replaceChildren(
      ...shown.measures.map(([name, , why]) =>
        element("option", { value: name, disabled: Boolean(why), title: why }, [why ? `${name} (${why})` : name]),
      ),
    );
    measure.value = shown.measure;
    other.replaceChildren(
      ...shown.others.map(([number, text]) => element("option", { value: number }, [text])),
    );
    if (shown.other != null) other.value = String(shown.other);
    otherLabel.hidden = shown.measure !== "difference";
  }

  function ask() {
    const wanted = measure.value === "difference" && other.value !== "" ? Number(other.value) : null;
    model.send({ type: "measure", name: measure.value, other: wanted });
  }

  /** The chosen token is that of all panels. */
  function follow() {
    marks = model.get("marks");
    if (!ready()) return;
    if (marks.token != null && marks.token < options.length) mark(marks.token);
    else mark(at);
    tell(at);
  }

  // -- the chosen token -----------------------------------------------------------------------

  function mark(position) {
    const before = options[at];
    if (before) before.setAttribute("aria-selected", "false");
    const moved = position !== at;
    at = Math.max(0, Math.min(options.length - 1, position));
    const now = options[at];
    if (!now) return;
    now.setAttribute("aria-selected", "true");
    strip.setAttribute("aria-activedescendant", now.id);
    if (moved) reveal(now);
  }

  /** Scroll the strip alone, never the page. */
  function reveal(option) {
    const box = strip.getBoundingClientRect();
    const seen = option.getBoundingClientRect();
    if (seen.top < box.top) strip.scrollTop += seen.top - box.top - 4;
    else if (seen.bottom > box.bottom) strip.scrollTop += seen.bottom - box.bottom + 4;
  }

  function words(position) {
    const value = values[position];
    const text = shown.tokens[position];
    const part = position < shown.prompt ? "prompt" : "generated";
    const number = Number.isFinite(value) ? `${short(value)}, ${shown.unit}` : shown.missing;
    return `token ${position}${text ? ` “${visible(text)}”` : ""}, id ${shown.ids[position]}, ${part}: ${number}`;
  }

  function tell(position) {
    if (ready() && position < options.length) told.textContent = words(position);
  }

  function choose(position) {
    mark(position);
    tell(at);
    model.send({ type: "select", token: at });
  }

  function positionOf(event) {
    const option = event.target.closest?.(".djinn-token");
    return option ? Number(option.id.slice(prefix.length + 1)) : null;
  }

  function onClick(event) {
    const found = positionOf(event);
    if (found != null) choose(found);
  }

  function onHover(event) {
    const found = positionOf(event);
    if (found != null) tell(found);
  }

  /** The token above or below: the nearest one of the next line. */
  function line(step) {
    const here = options[at].getBoundingClientRect();
    let best = null;
    let row = null;
    for (let i = at + step; i >= 0 && i < options.length; i += step) {
      const box = options[i].getBoundingClientRect();
      if (Math.abs(box.top - here.top) < 2) continue;
      row ??= box.top;
      if (Math.abs(box.top - row) > 2) break;
      const far = Math.abs(box.left - here.left);
      if (best == null || far < best.far) best = { far, i };
    }
    return best == null ? at : best.i;
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !options.length) return;
    if (event.key === "ArrowLeft") choose(at - 1);
    else if (event.key === "ArrowRight") choose(at + 1);
    else if (event.key === "ArrowUp") choose(line(-1));
    else if (event.key === "ArrowDown") choose(line(1));
    else if (event.key === "Home") choose(0);
    else if (event.key === "End") choose(options.length - 1);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  model.on("change:shown", take);
  model.on("change:marks", follow);
  take();
  return () => {
    model.off("change:shown", take);
    model.off("change:marks", follow);
  };
}
