"""Draw the README's picture of the panels: their static forms, as a saved notebook shows them.

`python -m scripts.panel_pictures` writes `docs/panels.png`; `--all FOLDER` writes it light and
dark, wide and narrow, to be looked at. Needs Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from scripts.private_runtime import private_runtime

DOCS = Path(__file__).parents[1] / "docs"
PROMPT = "When Mary and John went to the store, John gave a drink to"
#: Left and right column of the picture.
COLUMNS = (("sessions", "tokens", "branches"), ("breakpoints", "memory"))
#: name -> background, ink
THEMES = {"light": ("#ffffff", "#212121"), "dark": ("#111111", "#e0e0e0")}
WIDTHS = {"wide": 1400, "narrow": 600}


def main() -> None:
    """Parse the arguments, and draw."""
    parser = argparse.ArgumentParser(prog="python -m scripts.panel_pictures", description=__doc__)
    parser.add_argument("--all", type=Path, metavar="FOLDER", help="every theme and width, there")
    args = parser.parse_args()
    with private_runtime():
        forms = _static_forms()
    if args.all is None:
        _draw(forms, DOCS / "panels.png", "light", "wide")
        return
    args.all.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        for width in WIDTHS:
            _draw(forms, args.all / f"panels-{theme}-{width}.png", theme, width)


def _static_forms() -> dict[str, str]:
    """The panels of a notebook in the middle of a debugging day, as HTML by name."""
    from IPython.core.interactiveshell import InteractiveShell

    from djinn_nb.panels import panels_on
    from djinn_nb.verbs import perform
    from djinn_nb.workbench import workbench

    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "djinn_nb")
    bench = workbench(shell)
    names = [name for column in COLUMNS for name in column]
    panels = {name: panels_on(bench, [name]) for name in names}
    for panel in panels.values():
        _ = panel.body  # it follows the workbench from here on
    perform(bench, "connect").result()
    perform(bench, "set_breakpoint", location=20).result()
    perform(bench, "set_breakpoint", location=22, condition='token == " to"').result()
    perform(bench, "launch", prompt=PROMPT, max_new_tokens=24).result()
    perform(bench, "step_out").result()
    perform(bench, "step_back").result()
    bench.current.need_stop().edit(scale=0.5, tokens=-1)
    perform(bench, "next").result()
    perform(bench, "fork").result()
    perform(bench, "attach", session="s1").result()
    perform(bench, "continue").result()
    _wait(lambda: bench.snapshot().memory is not None and len(bench.snapshot().branches) > 3)
    _wait(lambda: panels["tokens"].picture.shown["state"] == "ready")
    time.sleep(2.5)  # a look at the memory
    found = {name: panel._repr_mimebundle_()["text/html"] for name, panel in panels.items()}
    shell.run_line_magic("unload_ext", "djinn_nb")
    return found


def _wait(holds: Any) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit("the panels did not come to rest within a minute")
        time.sleep(0.05)


def _draw(forms: dict[str, str], target: Path, theme: str, width: str) -> None:
    from playwright.sync_api import sync_playwright

    page_colour, ink = THEMES[theme]
    columns = COLUMNS if width == "wide" else (tuple(name for c in COLUMNS for name in c),)
    body = "".join(
        f"<div style='flex:1 1 0;min-width:0'>{''.join(forms[name] for name in column)}</div>"
        for column in columns
    )
    page_html = (
        "<!doctype html><meta charset='utf-8'><style>table{border-collapse:collapse;font-size:12px}"
        f"</style><body style='margin:12px;background:{page_colour};color:{ink};font-family:"
        "system-ui,sans-serif;font-size:13px;--jp-code-font-family:DejaVu Sans Mono,monospace'>"
        f"<div style='display:flex;gap:14px'>{body}</div></body>"
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": WIDTHS[width], "height": 400})
        page.set_content(page_html)
        page.screenshot(path=target, full_page=True)
        browser.close()
    print(target)


if __name__ == "__main__":
    main()
