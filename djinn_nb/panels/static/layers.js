// Layers × tokens: a grid that scrolls, of which only what is seen is drawn and asked for.
import { paint } from "./colours.js";
import { element, fitted, floats, freshId, hatch, inks, logShare, missingTiles, oncePerFrame, positiveRange, redrawOnChange, scaleBar, short, shortPlace, sign, sized, visible, windowOf } from "./common.js";

/** Pixels: of a row and the least of a column in each mode, of the header of tokens. */
const SIZES = {
  lens: { row: 20, column: 82, head: 24 },
  norm: { row: 15, column: 20, head: 78 },
};
/** Of the axis of layers; of a column at most, and at least where all tokens fit so. */
const AXIS = 76;
const LEAST_COLUMN = 68;
const MOST_COLUMN = 110;
const MOST_HEIGHT = 560;
/** How long the window rests before a tile is asked for, ms. */
const REST = 60;

export default { render };

/** @param {{ model: any, el: HTMLElement }} given */
function render({ model, el }) {
  let mode = "lens";
  let shown = model.get("shown");
  let marks = model.get("marks");
  let norm = floats(undefined);
  let range = positiveRange(norm);
  let version = null;
  /** tile number → what the lens reads there */
  const tiles = new Map();
  /** the cell that keys move: a row (0 is the embedding) and a token */
  let at = { row: 0, token: 0 };
  let asked = null;
  let refused = "";
  let timer = 0;
  /** of the window when it was last seen, pixels */
  let width = 0;

  const modes = ["lens", "norm"].map((name) =>
    element("button", { type: "button", onclick: () => setMode(name) }, [
      name === "lens" ? "Logit lens" : "Norm",
    ]),
  );
  const legend = element("div", { class: "djinn-row" });
  const canvas = element("canvas", { "aria-hidden": "true" });
  const spacer = element("div", { class: "djinn-spacer" });
  const cell = element("span", { role: "gridcell", id: freshId() });
  const row = element("div", { role: "row", class: "djinn-hidden" }, [cell]);
  const scroll = element(
    "div",
    {
      class: "djinn-scroll", role: "grid", tabindex: "0", "aria-label": "layers by tokens",
      "aria-activedescendant": cell.id, onkeydown: onKey, onclick: onClick, onmousemove: onHover,
      onmouseleave: () => tell(at), onscroll: () => (draw(), need()), ondblclick: () => act("run_to"),
    },
    [canvas, spacer, row],
  );
  const told = element("div", { class: "djinn-told", "aria-live": "polite" });
  const buttons = {
    toggle_breakpoint: button("Break here", () => act("toggle_breakpoint"), "key b"),
    set_breakpoint: button("Break here at this token's text", () => act("set_breakpoint"), ""),
    run_to: button("Run to here", () => act("run_to"), "key r, or a double click"),
    rewind: button("Go back to here", () => act("rewind"), "key g"),
  };
  const actions = element(
    "div",
    { class: "djinn-row", role: "group", "aria-label": "at the chosen cell", onkeydown: onEscape },
    Object.values(buttons),
  );
  const empty = element("div", { class: "djinn-empty", role: "status" });
  const full = element("div", {}, [
    element("div", { class: "djinn-row" }, [
      element("span", { class: "djinn-group", role: "group", "aria-label": "what is drawn" }, modes),
      legend,
    ]),
    scroll, told, actions,
    element("div", { class: "djinn-muted djinn-code" }, [
      "arrow keys move · Enter goes to the actions · b break · r run to · g go back · Escape returns",
    ]),
  ]);
  const root = element("div", { class: "djinn-view" }, [empty, full]);
  el.append(root);

  /** @param {string} words @param {() => void} act @param {string} title */
  function button(words, act, title) {
    return element("button", { type: "button", title, onclick: act }, [words]);
  }

  // -- what is there --------------------------------------------------------------------------

  const ready = () => shown.state === "ready";
  const rows = () => shown.rows.length;
  const columns = () => shown.tokens.length;
  /** Whether a cell has been computed in the forward that fed its token. */
  const hasRun = (row, token) => token < shown.first || row < shown.reached;
  /** Sizes of the mode; of the lens, columns as wide as it takes to cut none at the window's edge. */
  function size() {
    const { row, column: usual, head } = SIZES[mode];
    const wide = scroll.clientWidth - AXIS;
    const least = columns() * LEAST_COLUMN <= wide ? LEAST_COLUMN : usual;
    const seen = Math.max(1, Math.min(columns(), Math.floor(wide / least)));
    if (mode === "norm" || wide < least) return { row, column: usual, head, rest: 0 };
    const column = Math.min(MOST_COLUMN, Math.floor(wide / seen));
    // what is left at the right, so that scrolling ends at a column
    return { row, column, head, rest: columns() > seen ? wide - seen * column : 0 };
  }

  /** @returns {{ text: string, share: number, entropy: number, others: [string, number][] } | null} */
  function lensAt(row, token) {
    const from = token - shown.first;
    if (from < 0 || row >= shown.reached) return null;
    const tile = tiles.get(Math.floor(from / shown.tile));
    if (!tile) return null;
    const index = row * tile.count + (token - tile.first);
    const others = Array.from({ length: tile.ranks }, (_, rank) => [
      tile.texts[index * tile.ranks + rank],
      tile.shares[index * tile.ranks + rank],
    ]);
    return { text: others[0][0], share: others[0][1], entropy: tile.entropy[index], others };
  }

  function take() {
    shown = model.get("shown");
    if (ready() && shown.version !== version) {
      version = shown.version;
      tiles.clear();
      asked = null;
      refused = "";
      norm = floats(shown.norm);
      range = positiveRange(norm);
      // where nothing is chosen: the last token, where the model stopped
      at = { row: shown.stop.row, token: columns() - 1 };
    }
    empty.hidden = ready();
    full.hidden = !ready();
    empty.textContent = shown.text;
    if (!ready()) return;
    scroll.setAttribute("aria-rowcount", String(rows()));
    scroll.setAttribute("aria-colcount", String(columns()));
    follow();
    layout();
  }

  /** The chosen layer and token are those of all panels. */
  function follow() {
    marks = model.get("marks");
    if (!ready()) return;
    // the embedding is no layer: it stays chosen while no layer is
    const row = marks.layer == null ? at.row : marks.layer + 1;
    const token = marks.token == null ? at.token : marks.token;
    if (row !== at.row || token !== at.token) {
      at = { row: Math.min(row, rows() - 1), token: Math.min(token, columns() - 1) };
      reveal();
    }
    tell(at);
    draw();
  }

  // -- drawing --------------------------------------------------------------------------------

  function setMode(name) {
    mode = name;
    layout();
    reveal();
    need();
  }

  /** Give the grid the room that its cells take. */
  function fit() {
    const { row, column, head, rest } = size();
    const height = head + rows() * row;
    spacer.style.width = `${AXIS + columns() * column + rest}px`;
    spacer.style.height = `${height}px`;
    // room for a scroll bar below
    scroll.style.height = `${Math.min(MOST_HEIGHT, height + 18)}px`;
  }

  function layout() {
    modes.forEach((one, i) => one.setAttribute("aria-pressed", String(["lens", "norm"][i] === mode)));
    fit();
    const scale =
      mode === "lens"
        ? scaleBar(paint, "0", "1", "probability of the top token")
        : scaleBar(paint, short(range[0]), short(range[1]), `${shown.unit}, log scale`);
    legend.replaceChildren(
      scale,
      sign("djinn-sign-not-run", "not run"),
      ...(mode === "lens" && shown.first
        ? [sign("djinn-sign-dot", "earlier forward: only norms are kept")]
        : []),
      sign("djinn-sign-stop", `stopped at ${shown.stop.location}`),
      sign("djinn-sign-break", "breakpoint"),
      sign("djinn-sign-chosen", "chosen"),
    );
    reveal();
    draw();
    need();
  }

  /** Scroll so that the chosen cell is seen. */
  function reveal() {
    const { row, column, head, rest } = size();
    const x = at.token * column;
    const y = (rows() - 1 - at.row) * row;
    const wide = scroll.clientWidth - AXIS;
    const high = scroll.clientHeight - head;
    if (wide <= 0) return;
    if (x < scroll.scrollLeft) scroll.scrollLeft = x;
    if (x + column > scroll.scrollLeft + wide - rest) scroll.scrollLeft = x + column - wide + rest;
    if (y < scroll.scrollTop) scroll.scrollTop = y;
    if (y + row > scroll.scrollTop + high) scroll.scrollTop = y + row - high;
  }

  const draw = oncePerFrame(() => {
    if (!ready() || !root.isConnected) return;
    const { row, column, head } = size();
    const width = scroll.clientWidth;
    const height = scroll.clientHeight;
    if (!width || !height) return;
    const pen = sized(canvas, width, height);
    const ink = inks(root);
    const not = hatch(pen, ink.faint);
    const left = scroll.scrollLeft;
    const top = scroll.scrollTop;
    const [firstToken, endToken] = windowOf(left, width - AXIS, column, columns());
    const [firstLine, endLine] = windowOf(top, height - head, row, rows());
    pen.font = `12px ${ink.font}`;
    pen.textBaseline = "middle";
    pen.save();
    pen.beginPath();
    pen.rect(AXIS, head, width - AXIS, height - head);
    pen.clip();
    for (let token = firstToken; token < endToken; token++) {
      const x = AXIS + token * column - left;
      for (let line = firstLine; line < endLine; line++) {
        const y = head + line * row - top;
        drawCell(pen, rows() - 1 - line, token, x, y, column, row, not, ink);
      }
    }
    drawStop(pen, ink, left, top);
    drawChosen(pen, ink, left, top);
    pen.restore();
    drawAxis(pen, ink, firstLine, endLine, top);
    drawHeader(pen, ink, firstToken, endToken, left);
  });

  function drawCell(pen, row, token, x, y, wide, high, not, ink) {
    const value = norm[row * columns() + token];
    const lens = mode === "lens" ? lensAt(row, token) : null;
    const share = mode === "lens" ? lens?.share : logShare(value, ...range);
    if (mode === "lens" && token < shown.first) {
      pen.fillStyle = ink.faint;
      pen.fillRect(x + wide / 2 - 1, y + high / 2 - 1, 2, 2);
    } else if (!hasRun(row, token)) {
      pen.fillStyle = not;
      pen.fillRect(x, y, wide, high);
    } else if (share == null) {
      pen.fillStyle = ink.faint;
      pen.fillRect(x + 6, y + high / 2, wide - 12, 1);
    } else if (mode === "norm" && !(value > 0 && value < Infinity)) {
      pen.fillStyle = ink.ink;
      pen.fillText(value === 0 ? "0" : "!", x + wide / 2 - 3, y + high / 2);
    } else {
      const { fill, ink: on } = paint(share);
      pen.fillStyle = fill;
      pen.fillRect(x, y, wide - 1, high - 1);
      if (mode === "lens") {
        pen.fillStyle = on;
        pen.fillText(fitted(pen, visible(lens.text), wide - 34), x + 4, y + high / 2 + 0.5);
        pen.textAlign = "right";
        pen.fillText(share.toFixed(2).replace(/^0/, ""), x + wide - 5, y + high / 2 + 0.5);
        pen.textAlign = "left";
      }
    }
  }

  function drawStop(pen, ink, left, top) {
    const { row, column, head } = size();
    const y = head + (rows() - shown.reached) * row - top - 1;
    const x = AXIS + shown.first * column - left;
    pen.fillStyle = ink.mark;
    pen.fillRect(x, y, (columns() - shown.first) * column, 2);
  }

  function drawChosen(pen, ink, left, top) {
    const { row, column, head } = size();
    const x = AXIS + at.token * column - left;
    const y = head + (rows() - 1 - at.row) * row - top;
    // two rings: one of them differs from whatever lies below
    pen.lineWidth = 2;
    pen.strokeStyle = ink.ink;
    pen.strokeRect(x, y, column - 1, row - 1);
    pen.lineWidth = 1;
    pen.strokeStyle = ink.page;
    pen.strokeRect(x + 1.5, y + 1.5, column - 4, row - 4);
  }

  function drawAxis(pen, ink, first, end, top) {
    const { row, head } = size();
    pen.save();
    pen.beginPath();
    pen.rect(0, head, AXIS, scroll.clientHeight - head);
    pen.clip();
    pen.textAlign = "right";
    for (let line = first; line < end; line++) {
      const index = rows() - 1 - line;
      const y = head + line * row - top + row / 2;
      const name = shown.rows[index];
      pen.fillStyle = ink.ink;
      pen.font = `${index === at.row ? "600 " : ""}11px ${ink.font}`;
      pen.fillText(shortPlace(name), AXIS - 6, y);
      if (marks.breakpoints?.includes(name)) {
        pen.fillStyle = ink.mark;
        pen.beginPath();
        pen.arc(8, y, 4, 0, 2 * Math.PI);
        pen.fill();
      }
    }
    pen.restore();
  }

  function drawHeader(pen, ink, first, end, left) {
    const { column, head } = size();
    pen.save();
    pen.fillStyle = ink.ink;
    pen.font = `11px ${ink.font}`;
    pen.fillText("layer", 6, head - 9);
    pen.beginPath();
    pen.rect(AXIS, 0, scroll.clientWidth - AXIS, head);
    pen.clip();
    for (let token = first; token < end; token++) {
      const x = AXIS + token * column - left;
      const text = `${token === at.token ? "▾" : ""}${visible(shown.tokens[token], token)}`;
      pen.font = `${token === at.token ? "600 " : ""}11px ${ink.font}`;
      if (mode === "lens") {
        pen.fillText(fitted(pen, text, column - 8), x + 4, head - 10);
      } else {
        pen.save();
        pen.translate(x + column / 2, head - 4);
        pen.rotate(-Math.PI / 2);
        pen.fillText(fitted(pen, text, head - 8), 0, 0);
        pen.restore();
      }
    }
    pen.restore();
  }

  // -- asking ---------------------------------------------------------------------------------

  /** Ask for one tile at a time: what is seen when its answer comes decides the next. */
  function need() {
    clearTimeout(timer);
    timer = setTimeout(() => {
      if (!ready() || mode !== "lens" || refused) return;
      const [first, end] = windowOf(scroll.scrollLeft, scroll.clientWidth - AXIS, size().column, columns());
      const from = Math.max(0, first - shown.first);
      const [tile] = missingTiles(from, end - shown.first, shown.tile, (i) => tiles.has(i));
      if (tile == null || asked === tile) return;
      asked = tile;
      model.send({ type: "need", version: shown.version, tile });
    }, REST);
  }

  function onMessage(message, buffers) {
    if (!ready() || message.version !== shown.version) return;
    if (asked === message.tile) asked = null;
    if (message.type === "tile") {
      tiles.set(message.tile, { ...message, shares: floats(buffers[0]), entropy: floats(buffers[1]) });
    } else if (message.type === "no tile") {
      refused = message.text;
    }
    tell(at);
    draw();
    need();
  }

  // -- the chosen cell ------------------------------------------------------------------------

  function words({ row, token }) {
    const place = shown.rows[row];
    const text = shown.tokens[token];
    const parts = [`${place} · token ${token}${text ? ` “${visible(text)}”` : ""}`];
    const value = norm[row * columns() + token];
    if (!hasRun(row, token)) {
      parts.push(`not run: the model stopped at ${shown.stop.location}`);
      return parts.join(" · ");
    }
    parts.push(`norm ${short(value)} (L2)`);
    const lens = lensAt(row, token);
    if (lens) {
      const named = lens.others.map(([name, share]) => `“${visible(name)}” ${share.toFixed(3)}`);
      parts.push(`lens: ${named.join(", ")}; entropy ${short(lens.entropy)} nats`);
    } else if (token < shown.first) {
      parts.push("of an earlier forward: the lens reads the tokens of this one");
    } else if (mode === "lens") {
      parts.push(refused ? `no lens: ${refused}` : "reading the lens …");
    }
    return parts.join(" · ");
  }

  function tell(where) {
    if (!ready()) return;
    told.textContent = words(where);
    cell.textContent = words(at);
    row.setAttribute("aria-rowindex", String(rows() - at.row));
    cell.setAttribute("aria-colindex", String(at.token + 1));
    const place = shown.rows[at.row];
    const can = (verb) => marks.can?.includes(verb) ?? false;
    const has = marks.breakpoints?.includes(place);
    buttons.toggle_breakpoint.textContent = has ? `Remove the breakpoint at ${place}` : `Break at ${place}`;
    const text = shown.tokens[at.token];
    buttons.set_breakpoint.textContent = `Break there if the token is “${visible(text)}”`;
    buttons.set_breakpoint.hidden = !text;
    const ahead = at.row >= shown.reached;
    buttons.run_to.textContent = ahead ? `Run to ${place}` : `Run to ${place} of the next forward`;
    buttons.rewind.textContent = `Go back to ${place}`;
    buttons.toggle_breakpoint.disabled = !can("toggle_breakpoint");
    buttons.set_breakpoint.disabled = !can("set_breakpoint");
    buttons.run_to.disabled = !can("run_to");
    buttons.rewind.disabled = !can("rewind") || ahead || place === shown.stop.location;
  }

  function choose(row, token) {
    at = {
      row: Math.max(0, Math.min(rows() - 1, row)),
      token: Math.max(0, Math.min(columns() - 1, token)),
    };
    reveal();
    tell(at);
    draw();
    model.send({ type: "select", layer: at.row ? at.row - 1 : null, token: at.token });
  }

  function act(verb) {
    if (buttons[verb].disabled) return;
    const location = shown.rows[at.row];
    const given = { location };
    if (verb === "rewind") given.forward = shown.stop.forward;
    if (verb === "set_breakpoint") given.condition = `token == ${JSON.stringify(shown.tokens[at.token])}`;
    model.send({ type: "do", verb, given });
  }

  function place(event) {
    const { row, column, head } = size();
    const box = canvas.getBoundingClientRect();
    const x = event.clientX - box.left - AXIS;
    const y = event.clientY - box.top - head;
    const line = Math.floor((y + scroll.scrollTop) / row);
    const token = Math.floor((x + scroll.scrollLeft) / column);
    const outside = x < 0 || y < 0 || line >= rows() || token >= columns();
    return outside ? null : { row: rows() - 1 - line, token };
  }

  function onClick(event) {
    const found = place(event);
    if (found) choose(found.row, found.token);
  }

  function onHover(event) {
    const found = place(event);
    if (found) told.textContent = words(found);
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const page = Math.max(1, Math.floor((scroll.clientWidth - AXIS) / size().column) - 1);
    const moves = {
      ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
      PageUp: [0, -page], PageDown: [0, page], Home: [0, -columns()], End: [0, columns()],
    };
    const keys = { b: "toggle_breakpoint", r: "run_to", g: "rewind" };
    if (moves[event.key]) choose(at.row + moves[event.key][0], at.token + moves[event.key][1]);
    else if (keys[event.key]) act(keys[event.key]);
    else if (event.key === "Enter") actions.querySelector("button:not(:disabled)")?.focus();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  function onEscape(event) {
    if (event.key !== "Escape") return;
    scroll.focus();
    event.stopPropagation();
  }

  model.on("change:shown", take);
  model.on("change:marks", follow);
  model.on("msg:custom", onMessage);
  const end = redrawOnChange(root, () => {
    if (ready()) {
      fit();
      if (scroll.clientWidth !== width) reveal();
      width = scroll.clientWidth;
    }
    draw();
    need();
  });
  take();
  return () => {
    model.off("change:shown", take);
    model.off("change:marks", follow);
    model.off("msg:custom", onMessage);
    clearTimeout(timer);
    draw.cancel();
    end();
  };
}
