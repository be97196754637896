// Activation: one vector as a line over its channels, as a histogram, and its largest channels.
import { element, floats, inks, oncePerFrame, redrawOnChange, short, sized, visible } from "./common.js";

const HEIGHT = 190;
const LEFT = 52;
const BOTTOM = 30;
const TOP = 8;

export default { render };

/** @param {{ model: any, el: HTMLElement }} given */
function render({ model, el }) {
  let shown = model.get("shown");
  let marks = model.get("marks");
  let version = null;
  let rows = [];
  let channel = 0;

  const site = choice("tensor of the layer", () => model.send({ type: "site", value: site.value }));
  const against = choice("compared with", onAgainst);
  const value = choice("which one", () => compare(against.value, value.value));
  const words = element("div", { class: "djinn-told", "aria-live": "polite" });
  const legend = element("div", { class: "djinn-row" });
  const line = element("canvas", { tabindex: "0", role: "img", onkeydown: onKey, onmousemove: onHover, onclick: onHover });
  const bars = element("canvas", { role: "img" });
  const told = element("div", { class: "djinn-muted", "aria-live": "polite" });
  const table = element("tbody");
  const head = element("tr");
  const caption = element("caption", { class: "djinn-muted" });
  const empty = element("div", { class: "djinn-empty", role: "status" });
  const full = element("div", {}, [
    legend,
    words,
    element("div", { class: "djinn-charts" }, [element("div", {}, [line, told]), element("div", {}, [bars])]),
    element("div", { class: "djinn-table" }, [element("table", {}, [caption, element("thead", {}, [head]), table])]),
  ]);
  const choices = element("div", { class: "djinn-row" }, [
    element("label", {}, ["Tensor ", site]),
    element("label", {}, ["Against ", against]),
    value,
  ]);
  const root = element("div", { class: "djinn-view" }, [choices, empty, full]);
  el.append(root);

  function choice(label, onchange) {
    return element("select", { "aria-label": label, onchange });
  }

  const ready = () => shown.state === "ready";
  const inkOf = (i) => getComputedStyle(root).getPropertyValue(i ? "--djinn-two" : "--djinn-one").trim();

  // -- choosing -------------------------------------------------------------------------------

  function options(select, wanted, chosen) {
    const text = JSON.stringify(wanted);
    if (select.dataset.options !== text) {
      select.dataset.options = text;
      select.replaceChildren(...wanted.map(([key, name]) => element("option", { value: key }, [name])));
    }
    if (chosen != null) select.value = String(chosen);
  }

  function candidates(kind) {
    if (kind === "token") return (shown.tokens ?? []).map(([position, text]) => [position, `${position} ${visible(text)}`]);
    if (kind === "layer") return Array.from({ length: marks.num_layers ?? 0 }, (_, i) => [i, `layer ${i}`]);
    if (kind === "session") return (marks.sessions ?? []).map((id) => [id, id]);
    return [];
  }

  function onAgainst() {
    const kind = against.value;
    const [first] = candidates(kind);
    compare(kind, first?.[0]);
  }

  function compare(kind, wanted) {
    const number = kind === "token" || kind === "layer";
    model.send({ type: "against", kind, value: kind === "nothing" ? null : number ? Number(wanted) : wanted });
  }

  function follow() {
    marks = model.get("marks");
    root.setAttribute("aria-busy", String(Boolean(marks.reading)));
    const kinds = [["nothing", "nothing"], ["token", "another token"], ["layer", "another layer"]];
    if (marks.sessions?.length) kinds.push(["session", "another session"]);
    options(against, kinds, marks.against ?? "nothing");
    options(site, [["", "as at the stop"], ...(marks.sites ?? []).map((name) => [name, name])], marks.site);
    value.hidden = !marks.against || marks.against === "nothing";
    options(value, candidates(marks.against), marks.value);
    choices.hidden = shown.state === "empty";
  }

  function take() {
    const { tokens } = shown;
    shown = model.get("shown");
    // a refusal keeps the choices there: another one may be taken back
    if (!ready()) shown = { tokens, ...shown };
    empty.hidden = ready();
    full.hidden = !ready();
    empty.textContent = shown.text;
    if (ready() && shown.version !== version) {
      version = shown.version;
      rows = shown.series.map((one) => floats(one.values));
      channel = shown.channels[0] ?? 0;
      say();
    }
    follow();
    draw();
  }

  function say() {
    legend.replaceChildren(
      ...shown.series.map((one, i) =>
        element("span", { class: "djinn-scale" }, [
          element("span", { class: `djinn-line djinn-line-${i}`, "aria-hidden": "true" }),
          element("span", {}, [one.name]),
        ]),
      ),
    );
    const parts = shown.series.map((one, i) => `norm ${i ? "of the other " : ""}${one.norm == null ? "is no number" : `${short(one.norm)} (L2)`}`);
    if (shown.cosine != null) parts.push(`cosine ${shown.cosine.toFixed(4)}`);
    if (shown.distance != null) parts.push(`distance ${short(shown.distance)} (L2 norm of the difference)`);
    if (shown.unlike) parts.push(shown.unlike);
    if (shown.num_broken) parts.push(`${shown.num_broken} values are NaN or infinite`);
    words.textContent = parts.join(" · ");
    const pair = rows.length > 1 && !shown.unlike;
    caption.textContent = pair ? "channels that differ most" : "channels of the largest magnitude";
    const names = ["channel", "value", ...(pair ? ["other", "difference"] : [])];
    head.replaceChildren(...names.map((name) => element("th", { scope: "col" }, [name])));
    table.replaceChildren(
      ...shown.channels.map((number) => {
        const [one, other] = rows.map((row) => row[number]);
        const values = pair ? [one, other, other - one] : [one];
        return element("tr", {}, [
          element("th", { scope: "row" }, [String(number)]),
          ...values.map((each) => element("td", {}, [short(each)])),
        ]);
      }),
    );
    tell();
  }

  function tell() {
    const parts = rows.filter((row) => channel < row.length).map((row) => short(row[channel]));
    told.textContent = `channel ${channel} of ${rows[0].length}: ${parts.join(" and ")}`;
    line.setAttribute("aria-label", `values over channels; arrow keys move; ${told.textContent}`);
  }

  // -- drawing --------------------------------------------------------------------------------

  const draw = oncePerFrame(() => {
    if (!ready() || !root.isConnected || !root.clientWidth) return;
    drawLine();
    drawBars();
  });

  function axes(canvas, wide, low, high, xWords, yWords) {
    const pen = sized(canvas, wide, HEIGHT);
    const ink = inks(root);
    const y = (value) => TOP + (1 - (value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    pen.font = `11px ${ink.font}`;
    pen.textBaseline = "middle";
    pen.fillStyle = ink.ink;
    pen.strokeStyle = ink.faint;
    pen.textAlign = "right";
    for (const value of [low, (low + high) / 2, high]) {
      pen.fillText(short(value), LEFT - 6, Math.max(7, y(value)));
      pen.beginPath();
      pen.moveTo(LEFT, y(value));
      pen.lineTo(wide, y(value));
      pen.stroke();
    }
    pen.textAlign = "center";
    pen.fillText(xWords, LEFT + (wide - LEFT) / 2, HEIGHT - 7);
    pen.save();
    pen.translate(8, TOP + (HEIGHT - TOP - BOTTOM) / 2);
    pen.rotate(-Math.PI / 2);
    pen.fillText(yWords, 0, 0);
    pen.restore();
    return { pen, ink, y };
  }

  function drawLine() {
    const wide = Math.max(240, line.parentElement.clientWidth);
    const { edges } = shown.bins;
    const [low, high] = [edges[0], edges[edges.length - 1]];
    const { pen, ink, y } = axes(line, wide, low, high, "channel", "value");
    const most = Math.max(...rows.map((row) => row.length));
    const x = (index) => LEFT + (index / Math.max(1, most - 1)) * (wide - LEFT - 4);
    rows.forEach((row, i) => {
      pen.strokeStyle = inkOf(i);
      pen.lineWidth = 1.2;
      pen.setLineDash(i ? [4, 2] : []);
      pen.beginPath();
      let drawing = false;
      row.forEach((value, index) => {
        // a gap where there is no number
        if (!Number.isFinite(value)) drawing = false;
        else if (drawing) pen.lineTo(x(index), y(value));
        else {
          pen.moveTo(x(index), y(value));
          drawing = true;
        }
      });
      pen.stroke();
    });
    pen.setLineDash([]);
    pen.strokeStyle = ink.ink;
    pen.lineWidth = 1;
    pen.beginPath();
    pen.moveTo(x(channel), TOP);
    pen.lineTo(x(channel), HEIGHT - BOTTOM);
    pen.stroke();
    pen.fillStyle = ink.ink;
    pen.textAlign = "left";
    pen.fillText("0", LEFT, HEIGHT - 20);
    pen.textAlign = "right";
    pen.fillText(String(most - 1), wide - 2, HEIGHT - 20);
  }

  function drawBars() {
    const wide = Math.max(200, bars.parentElement.clientWidth);
    const { edges, counts } = shown.bins;
    const most = Math.max(1, ...counts.flat());
    const { pen, ink, y } = axes(bars, wide, 0, most, "value", "channels");
    const step = (wide - LEFT - 4) / counts[0].length;
    counts.forEach((row, i) => {
      pen.fillStyle = pen.strokeStyle = inkOf(i);
      row.forEach((count, index) => {
        const x = LEFT + index * step;
        // the second as an outline: both are seen, and told apart without colour
        if (i) pen.strokeRect(x + 0.5, y(count), step - 1, y(0) - y(count));
        else pen.fillRect(x, y(count), step - 1, y(0) - y(count));
      });
    });
    pen.fillStyle = ink.ink;
    pen.textAlign = "left";
    pen.fillText(short(edges[0]), LEFT, HEIGHT - 20);
    pen.textAlign = "right";
    pen.fillText(short(edges[edges.length - 1]), wide - 2, HEIGHT - 20);
    bars.setAttribute("aria-label", `histogram of ${rows[0].length} values from ${short(edges[0])} to ${short(edges[edges.length - 1])}`);
  }

  function go(to) {
    channel = Math.max(0, Math.min(rows[0].length - 1, to));
    tell();
    draw();
  }

  function onHover(event) {
    if (!ready()) return;
    const box = line.getBoundingClientRect();
    const most = Math.max(...rows.map((row) => row.length));
    go(Math.round(((event.clientX - box.left - LEFT) / (box.width - LEFT - 4)) * (most - 1)));
  }

  function onKey(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -32, PageDown: 32, Home: -1e9, End: 1e9 };
    if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
    go(channel + moves[event.key]);
    event.preventDefault();
    event.stopPropagation();
  }

  model.on("change:shown", take);
  model.on("change:marks", follow);
  const end = redrawOnChange(root, draw);
  take();
  return () => {
    model.off("change:shown", take);
    model.off("change:marks", follow);
    draw.cancel();
    end();
  };
}
