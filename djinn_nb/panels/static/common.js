// What the pictures share: elements, numbers and texts as shown, windows of long axes, the page's ink.

/** An element with attributes and children; `on…` attributes are listeners.
 * @param {string} tag
 * @param {Record<string, any>} [attributes]
 * @param {(Node | string)[]} [children] */
export function element(tag, attributes = {}, children = []) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, String(value));
  }
  made.append(...children);
  return made;
}

/** An id that no other element of the page has. (crypto.randomUUID is missing on plain http.) */
export function freshId() {
  return `djinn-${Math.random().toString(36).slice(2)}${Date.now().toString(36)}`;
}

/** A number in few characters: 0.0123, 31.2, 1.2e6.
 * @param {number} value */
export function short(value) {
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e5)) return value.toExponential(1).replaceAll("-", "−");
  return String(Number(value.toPrecision(3))).replace("-", "−");
}

/** A token's text with spaces and line ends made visible; its position where it has none.
 * @param {string} text
 * @param {number} [position] */
export function visible(text, position) {
  if (!text) return position == null ? "" : String(position);
  return [...text]
    .map((c) => ({ " ": "·", "\n": "⏎", "\t": "⇥" })[c] ?? (/\p{C}/u.test(c) ? "�" : c))
    .join("");
}

/** A location as people say it: 20 for layers.20.output.
 * @param {string} location */
export function shortPlace(location) {
  return location.replace(/^layers\.(\d+)\.output$/, "$1");
}

/** First and one past the last index that a window shows of `count` cells of a size.
 * @param {number} scroll pixels scrolled
 * @param {number} size pixels shown
 * @param {number} cell pixels of a cell
 * @param {number} count
 * @returns {[number, number]} */
export function windowOf(scroll, size, cell, count) {
  const first = Math.max(0, Math.min(count, Math.floor(scroll / cell)));
  return [first, Math.max(first, Math.min(count, Math.ceil((scroll + size) / cell)))];
}

/** Tiles that a window of tokens needs and nobody has, those in its middle first.
 * @param {number} first @param {number} end tokens seen, counted from the first tile's first
 * @param {number} tile tokens of a tile
 * @param {(tile: number) => boolean} have
 * @returns {number[]} */
export function missingTiles(first, end, tile, have) {
  if (end <= first) return [];
  const found = [];
  for (let i = Math.floor(first / tile); i * tile < end; i++) if (!have(i)) found.push(i);
  const middle = (first + end) / 2 / tile - 0.5;
  return found.sort((a, b) => Math.abs(a - middle) - Math.abs(b - middle));
}

/** Bytes that came from Python as numbers. They may lie at any offset, so they are copied.
 * @param {DataView | undefined} view */
export function floats(view) {
  if (!view) return new Float32Array(0);
  return new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

/** Least and largest of the finite numbers, for a linear scale; 0 and 1 without any.
 * @param {Float32Array} values
 * @returns {[number, number]} */
export function rangeOf(values) {
  let [least, most] = [Infinity, -Infinity];
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    if (value < least) least = value;
    if (value > most) most = value;
  }
  return least <= most ? [least, most] : [0, 1];
}

/** Where a number lies between two, from 0 to 1; in the middle where they are one.
 * @param {number} value @param {number} least @param {number} most */
export function linearShare(value, least, most) {
  return most > least ? (value - least) / (most - least) : 0.5;
}

/** Least and largest of the finite numbers above 0, for a logarithmic scale.
 * @param {Float32Array} values
 * @returns {[number, number]} */
export function positiveRange(values) {
  let least = Infinity;
  let most = 0;
  for (const value of values) {
    if (value > 0 && value < Infinity) {
      if (value < least) least = value;
      if (value > most) most = value;
    }
  }
  return most ? [least, most] : [1, 1];
}

/** Where a value lies between least and most, on a logarithmic scale, 0 to 1.
 * @param {number} value @param {number} least @param {number} most */
export function logShare(value, least, most) {
  return most > least ? Math.log(value / least) / Math.log(most / least) : 0.5;
}

/** The colours that the page's theme gives to an element.
 * @param {Element} root */
export function inks(root) {
  const style = getComputedStyle(root);
  return {
    ink: style.color,
    faint: style.getPropertyValue("--djinn-faint").trim() || "rgba(128,128,128,.5)",
    page: style.getPropertyValue("--djinn-page").trim() || "transparent",
    mark: style.getPropertyValue("--djinn-mark").trim() || "#d55e00",
    font: style.fontFamily,
  };
}

/** A canvas of so many pixels of the page, sharp on any screen; returns its context, cleared.
 * @param {HTMLCanvasElement} canvas @param {number} width @param {number} height */
export function sized(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

/** As much of a text as fits, with … where it is cut.
 * @param {CanvasRenderingContext2D} context @param {string} text @param {number} width */
export function fitted(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let end = text.length;
  while (end > 1 && context.measureText(`${text.slice(0, end)}…`).width > width) end--;
  return `${text.slice(0, end)}…`;
}

/** A pattern for what has no value: it reads without colour.
 * @param {CanvasRenderingContext2D} context @param {string} colour */
export function hatch(context, colour) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 8;
  const pen = tile.getContext("2d");
  pen.strokeStyle = colour;
  pen.beginPath();
  for (const [x, y] of [[-1, 1], [0, 8], [7, 9]]) {
    pen.moveTo(x, y);
    pen.lineTo(x + 8, y - 8);
  }
  pen.stroke();
  return context.createPattern(tile, "repeat");
}

/** Draw at most once per frame.
 * @param {() => void} draw */
export function oncePerFrame(draw) {
  let asked = 0;
  const ask = () => {
    asked ||= requestAnimationFrame(() => {
      asked = 0;
      draw();
    });
  };
  ask.cancel = () => cancelAnimationFrame(asked);
  return ask;
}

/** Redraw when the element's size or the page's theme changes; returns how to end that.
 * @param {Element} root @param {() => void} draw */
export function redrawOnChange(root, draw) {
  const sizes = new ResizeObserver(draw);
  sizes.observe(root);
  const themes = new MutationObserver(draw);
  const watched = { attributes: true, attributeFilter: ["data-jp-theme-light", "class", "style"] };
  themes.observe(document.body, watched);
  themes.observe(document.documentElement, watched);
  return () => {
    sizes.disconnect();
    themes.disconnect();
  };
}

/** A legend: a bar of the colour map from one number to another, with its unit in words.
 * @param {(share: number) => { fill: string }} colours
 * @param {string} from @param {string} to @param {string} unit */
export function scaleBar(colours, from, to, unit) {
  const stops = Array.from({ length: 12 }, (_, i) => colours(i / 11).fill).join(",");
  return element("span", { class: "djinn-scale" }, [
    element("span", {}, [from]),
    element("span", { class: "djinn-bar", style: `background:linear-gradient(90deg,${stops})` }),
    element("span", {}, [to]),
    element("span", { class: "djinn-muted" }, [unit]),
  ]);
}

/** Words of a legend beside a sign of it.
 * @param {string} sign class of the sign @param {string} words */
export function sign(sign, words) {
  return element("span", { class: "djinn-scale" }, [
    element("span", { class: `djinn-sign ${sign}`, "aria-hidden": "true" }),
    element("span", { class: "djinn-muted" }, [words]),
  ]);
}
