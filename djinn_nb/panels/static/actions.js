// The Python of what was done last: each with a button that copies it and one that inserts a cell.
import { element } from "./common.js";
import { completeNames } from "./naming.js";

export default { render };

/** @param {{ model: any, el: HTMLElement }} given */
function render({ model, el }) {
  const summary = element("summary", { class: "djinn-muted" });
  const list = element("ul", { class: "djinn-actions" });
  const said = element("div", { role: "status", class: "djinn-muted" });
  const details = element("details", {}, [summary, list, said]);
  const root = element("div", { class: "djinn-view" }, [details]);
  el.append(root);

  function draw() {
    const actions = model.get("actions");
    details.hidden = actions.length === 0;
    summary.textContent = "The same as Python";
    list.replaceChildren(
      ...actions.map(({ number, code, outcome, error }) =>
        element("li", {}, [
          element("pre", { class: "djinn-code", tabindex: "0", "aria-label": "code" }, [code]),
          ...(outcome === "done" ? [] : [element("span", { class: "djinn-muted", title: error }, [outcome])]),
          element("button", { type: "button", onclick: () => copy(code) }, ["Copy code"]),
          element("button", { type: "button", onclick: () => model.send({ insert: number }) }, ["Insert cell"]),
        ]),
      ),
    );
    tell();
  }

  const tell = () => {
    said.textContent = model.get("said");
  };

  async function copy(code) {
    try {
      await navigator.clipboard.writeText(code);
      said.textContent = "copied";
    } catch {
      // the clipboard is closed to pages without https, and where it was forbidden
      said.textContent = oldCopy(code) ? "copied" : "not copied: select the code, and copy it by key";
    }
  }

  function oldCopy(code) {
    const text = element("textarea", { class: "djinn-hidden" });
    text.value = code;
    root.append(text);
    text.select();
    const done = document.execCommand("copy");
    text.remove();
    return done;
  }

  model.on("change:actions", draw);
  model.on("change:said", tell);
  draw();
  const end = completeNames(el, () => model.get("label"));
  return () => {
    end();
    model.off("change:actions", draw);
    model.off("change:said", tell);
  };
}
