// Attention: a small map of every head to choose from, and one head token by token.
import { paint } from "./colours.js";
import { element, fitted, floats, hatch, inks, oncePerFrame, redrawOnChange, scaleBar, short, sign, sized, visible, windowOf } from "./common.js";

const SMALL = 92;
const CELL = 17;
const AXIS = 104;
const HEAD = 84;
const MOST_HEIGHT = 430;
/** Weights are small numbers: their square root tells them apart. @param {number} weight */
const colours = (weight) => paint(Math.sqrt(weight));

export default { render };

/** @param {{ model: any, el: HTMLElement }} given */
function render({ model, el }) {
  let shown = model.get("shown");
  let marks = model.get("marks");
  let version = null;
  let maps = new Uint8Array(0);
  /** head → its weights [count, keys] */
  const heads = new Map();
  let hovered = null;
  /** what is said of the cell of a small map that the mouse is on */
  let pointed = null;
  /** the pair that keys move, counted in rows of the window and keys */
  let at = { row: 0, key: 0 };

  const layer = element("select", { "aria-label": "layer", onchange: () => choose({ layer: Number(layer.value) }) });
  const where = element("span", { class: "djinn-muted" });
  const unlock = element("button", { type: "button", onclick: () => choose({ head: null }), title: "key Escape" }, ["Choose none"]);
  const grid = element("div", { class: "djinn-heads", role: "group", "aria-label": "heads", onkeydown: onHeadKey });
  const title = element("b");
  const canvas = element("canvas", { "aria-hidden": "true" });
  const spacer = element("div", { class: "djinn-spacer" });
  const told = element("div", { class: "djinn-told", "aria-live": "polite" });
  const scroll = element(
    "div",
    {
      class: "djinn-scroll", tabindex: "0", role: "group", "aria-label": "the head's weights, token by key: arrow keys move",
      onkeydown: onKey, onclick: onClick, onmousemove: onHover, onmouseleave: () => tell(at), onscroll: () => draw(),
    },
    [canvas, spacer],
  );
  const empty = element("div", { class: "djinn-empty", role: "status" });
  const choices = element("div", { class: "djinn-row" }, [element("label", {}, ["Layer ", layer]), where]);
  const full = element("div", {}, [
    element("div", { class: "djinn-row" }, [
      scaleBar(colours, "0", "1", "attention weight, square-root scale"),
      sign("djinn-sign-not-run", "later token, not looked at"),
      sign("djinn-sign-chosen", "chosen"),
    ]),
    grid,
    element("div", { class: "djinn-row" }, [title, unlock]),
    scroll,
    told,
    element("div", { class: "djinn-muted djinn-code" }, [
      "a click on a head, or arrow keys and Enter, chooses it in every panel · Escape chooses none · rows: tokens, columns: keys",
    ]),
  ]);
  const root = element("div", { class: "djinn-view" }, [choices, empty, full]);
  el.append(root);

  const ready = () => shown.state === "ready";
  const choose = (selection) => model.send({ type: "select", ...selection });
  const chosen = () => (shown.heads?.includes(marks.head) ? marks.head : null);
  /** The head shown in full: the chosen one, the one pointed at, or the first. */
  const current = () => chosen() ?? hovered ?? shown.heads[0];
  const name = (position) => `${position}${shown.tokens[position] ? ` “${visible(shown.tokens[position])}”` : ""}`;

  function take() {
    shown = model.get("shown");
    empty.hidden = ready();
    full.hidden = where.hidden = !ready();
    empty.textContent = shown.text;
    if (!ready()) return follow();
    if (shown.version !== version) {
      version = shown.version;
      heads.clear();
      hovered = pointed = null;
      const view = shown.maps;
      maps = new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
      at = { row: shown.count - 1, key: 0 };
      grid.replaceChildren(...shown.heads.map(headButton));
    }
    const rows = `tokens ${shown.first} to ${shown.first + shown.count - 1}`;
    where.textContent = [
      shown.count < shown.keys - shown.forward_first ? `${rows} of this forward: choose a token to see others` : rows,
      shown.ahead ? "this layer has not run: computed beside the session" : "",
    ].filter(Boolean).join(" · ");
    follow();
  }

  function follow() {
    marks = model.get("marks");
    // one that is refused can be left for another
    choices.hidden = shown.state === "empty";
    if (layer.options.length !== marks.num_layers) {
      layer.replaceChildren(...Array.from({ length: marks.num_layers ?? 0 }, (_, i) => element("option", { value: i }, [String(i)])));
    }
    if (marks.of_layer != null) layer.value = String(marks.of_layer);
    if (!ready()) return;
    root.setAttribute("aria-busy", String(Boolean(marks.reading)));
    const row = marks.token == null ? null : marks.token - shown.first;
    if (row != null && row >= 0 && row < shown.count) at = { ...at, row };
    layout();
  }

  // -- heads ----------------------------------------------------------------------------------

  function headButton(head, index) {
    return element(
      "button",
      {
        type: "button", class: "djinn-head", "data-head": head, "aria-label": `head ${head}`,
        onclick: () => choose({ head: head === chosen() ? null : head }),
        onmouseenter: () => point(head), onmouseleave: leave, onfocus: () => point(head),
        onmousemove: (event) => overSmall(event, index),
      },
      [element("canvas", { "aria-hidden": "true" }), element("span", {}, [`head ${head}`])],
    );
  }

  function point(head) {
    if (hovered === head) return;
    hovered = head;
    if (chosen() == null) layout();
  }

  function leave() {
    pointed = null;
    point(null);
    retell();
  }

  function overSmall(event, index) {
    const box = event.currentTarget.firstChild.getBoundingClientRect();
    const [high, wide] = shown.shape;
    const row = Math.floor(((event.clientY - box.top) / box.height) * high);
    const column = Math.floor(((event.clientX - box.left) / box.width) * wide);
    if (row < 0 || column < 0 || row >= high || column >= wide) return;
    const weight = (maps[(index * high + row) * wide + column] / 255) ** 2;
    const span = (cell, cells, count, first) => {
      const from = first + Math.floor((cell * count) / cells);
      const to = first + Math.max(Math.floor(((cell + 1) * count) / cells) - 1, Math.floor((cell * count) / cells));
      return from === to ? name(from) : `${from} to ${to}`;
    };
    const token = span(row, high, shown.count, shown.first);
    const key = span(column, wide, shown.keys, 0);
    const most = high < shown.count || wide < shown.keys ? "the largest weight there " : "weight about ";
    pointed = `head ${shown.heads[index]}: token ${token} → key ${key}: ${most}${weight.toFixed(3)}`;
    retell();
  }

  /** A head that arrives, or another choice, leaves what the mouse is on. */
  function retell() {
    if (pointed != null) told.textContent = pointed;
    else tell(at);
  }

  function drawHeads() {
    const [high, wide] = shown.shape;
    const ink = inks(root);
    grid.querySelectorAll("button").forEach((one, index) => {
      const head = shown.heads[index];
      const pressed = head === chosen();
      one.setAttribute("aria-pressed", String(pressed));
      one.tabIndex = head === current() ? 0 : -1;
      const pen = sized(one.firstChild, SMALL, SMALL);
      const image = new OffscreenCanvas(wide, high);
      const dots = image.getContext("2d");
      for (let row = 0; row < high; row++) {
        for (let column = 0; column < wide; column++) {
          dots.fillStyle = paint(maps[(index * high + row) * wide + column] / 255).fill;
          dots.fillRect(column, row, 1, 1);
        }
      }
      pen.imageSmoothingEnabled = false;
      pen.drawImage(image, 0, 0, SMALL, SMALL);
      if (pressed) {
        pen.lineWidth = 4;
        pen.strokeStyle = ink.ink; // as the legend has it
        pen.strokeRect(0, 0, SMALL, SMALL);
      }
    });
  }

  function onHeadKey(event) {
    const index = shown.heads.indexOf(Number(event.target.closest("button")?.dataset.head));
    const across = Math.max(1, Math.floor(grid.clientWidth / (SMALL + 12)));
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across };
    if (event.key === "Escape") choose({ head: null });
    else if (event.key in moves) {
      const next = Math.max(0, Math.min(shown.heads.length - 1, index + moves[event.key]));
      grid.querySelectorAll("button")[next].focus();
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  // -- one head -------------------------------------------------------------------------------

  function layout() {
    const head = current();
    title.textContent = `Head ${head} of layer ${shown.layer}, ${chosen() == null ? "none is chosen" : "chosen"}`;
    unlock.hidden = chosen() == null;
    const width = AXIS + shown.keys * CELL;
    const height = HEAD + shown.count * CELL;
    spacer.style.width = `${width}px`;
    spacer.style.height = `${height}px`;
    scroll.style.height = `${Math.min(MOST_HEIGHT, height + 18)}px`;
    if (!heads.has(head)) model.send({ type: "need", version, head });
    drawHeads();
    reveal();
    retell();
    draw();
  }

  function reveal() {
    const x = at.key * CELL;
    const y = at.row * CELL;
    const wide = scroll.clientWidth - AXIS;
    const high = scroll.clientHeight - HEAD - 16;
    if (x < scroll.scrollLeft) scroll.scrollLeft = x;
    if (x + CELL > scroll.scrollLeft + wide) scroll.scrollLeft = x + CELL - wide;
    if (y < scroll.scrollTop) scroll.scrollTop = y;
    if (y + CELL > scroll.scrollTop + high) scroll.scrollTop = y + CELL - high;
  }

  const weight = (row, key) => heads.get(current())?.[row * shown.keys + key];

  const draw = oncePerFrame(() => {
    const width = scroll.clientWidth;
    const height = scroll.clientHeight;
    if (!ready() || !width || !height) return;
    const pen = sized(canvas, width, height);
    const ink = inks(root);
    const later = hatch(pen, ink.faint);
    const left = scroll.scrollLeft;
    const top = scroll.scrollTop;
    const [firstKey, endKey] = windowOf(left, width - AXIS, CELL, shown.keys);
    const [firstRow, endRow] = windowOf(top, height - HEAD, CELL, shown.count);
    pen.textBaseline = "middle";
    pen.save();
    pen.beginPath();
    pen.rect(AXIS, HEAD, width - AXIS, height - HEAD);
    pen.clip();
    for (let row = firstRow; row < endRow; row++) {
      for (let key = firstKey; key < endKey; key++) {
        const x = AXIS + key * CELL - left;
        const y = HEAD + row * CELL - top;
        const value = weight(row, key);
        if (key > shown.first + row) pen.fillStyle = later;
        else if (value == null) continue;
        else pen.fillStyle = Number.isFinite(value) ? colours(value).fill : ink.mark;
        pen.fillRect(x, y, CELL - 1, CELL - 1);
      }
    }
    pen.lineWidth = 2;
    pen.strokeStyle = ink.ink;
    pen.strokeRect(AXIS + at.key * CELL - left, HEAD + at.row * CELL - top, CELL - 1, CELL - 1);
    pen.restore();
    pen.fillStyle = ink.ink;
    pen.save();
    pen.beginPath();
    pen.rect(0, HEAD, AXIS, height - HEAD);
    pen.clip();
    pen.textAlign = "right";
    for (let row = firstRow; row < endRow; row++) {
      const position = shown.first + row;
      pen.font = `${row === at.row ? "600 " : ""}11px ${ink.font}`;
      pen.fillText(fitted(pen, visible(shown.tokens[position], position), AXIS - 12), AXIS - 6, HEAD + row * CELL - top + CELL / 2);
    }
    pen.restore();
    pen.save();
    pen.beginPath();
    pen.rect(AXIS, 0, width - AXIS, HEAD);
    pen.clip();
    for (let key = firstKey; key < endKey; key++) {
      pen.save();
      pen.font = `${key === at.key ? "600 " : ""}11px ${ink.font}`;
      pen.translate(AXIS + key * CELL - left + CELL / 2, HEAD - 4);
      pen.rotate(-Math.PI / 2);
      pen.fillText(fitted(pen, visible(shown.tokens[key], key), HEAD - 8), 0, 0);
      pen.restore();
    }
    pen.restore();
    pen.font = `11px ${ink.font}`;
    pen.fillText("token ↓   key →", 6, HEAD - 10);
  });

  /** What a pair holds, and where its token looks most. */
  function tell({ row, key }) {
    if (!ready()) return;
    const values = heads.get(current());
    if (!values) {
      told.textContent = "reading the head …";
      return;
    }
    const position = shown.first + row;
    const mine = Array.from(values.subarray(row * shown.keys, (row + 1) * shown.keys));
    const most = mine
      .map((value, i) => [i, value])
      .sort((a, b) => b[1] - a[1])
      .slice(0, 4)
      .map(([i, value]) => `${name(i)} ${value.toFixed(3)}`);
    const pair = key > position
      ? `key ${name(key)} comes later: no weight`
      : `key ${name(key)}: weight ${short(mine[key])}`;
    told.textContent = `head ${current()} · token ${name(position)} → ${pair} · most: ${most.join(", ")}`;
  }

  function move(row, key) {
    at = {
      row: Math.max(0, Math.min(shown.count - 1, row)),
      key: Math.max(0, Math.min(shown.keys - 1, key)),
    };
    reveal();
    tell(at);
    draw();
    choose({ token: shown.first + at.row });
  }

  function place(event) {
    const box = canvas.getBoundingClientRect();
    const key = Math.floor((event.clientX - box.left - AXIS + scroll.scrollLeft) / CELL);
    const row = Math.floor((event.clientY - box.top - HEAD + scroll.scrollTop) / CELL);
    const inside = event.clientX - box.left >= AXIS && event.clientY - box.top >= HEAD;
    return inside && row < shown.count && key < shown.keys ? { row, key } : null;
  }

  function onClick(event) {
    const found = place(event);
    if (found) move(found.row, found.key);
  }

  function onHover(event) {
    const found = place(event);
    if (found) tell(found);
  }

  function onKey(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -shown.keys], End: [0, shown.keys] };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (moves[event.key]) move(at.row + moves[event.key][0], at.key + moves[event.key][1]);
    else if (event.key === "Enter") choose({ head: current() });
    else if (event.key === "Escape") choose({ head: null });
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  function onMessage(message, buffers) {
    if (message.type !== "head" || message.version !== version) return;
    heads.set(message.head, floats(buffers[0]));
    if (message.head === current()) {
      retell();
      draw();
    }
  }

  model.on("change:shown", take);
  model.on("change:marks", follow);
  model.on("msg:custom", onMessage);
  const end = redrawOnChange(root, () => ready() && (drawHeads(), draw()));
  take();
  return () => {
    model.off("change:shown", take);
    model.off("change:marks", follow);
    model.off("msg:custom", onMessage);
    draw.cancel();
    end();
  };
}
