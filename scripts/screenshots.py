"""Take the README's pictures of the lab: JupyterLab, extension, kernel server, model, all real.

`python -m scripts.screenshots` writes them to `docs/`; `--to FOLDER` elsewhere, to be looked at
first. The whole lab in both themes, wide and narrow, and close-ups of what the README describes.
Needs Chromium. How the lab and the browser are started is `browser`'s matter.
"""

from __future__ import annotations

import argparse
import io
import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from scripts.browser import Lab, chromium, lab

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

DOCS = Path(__file__).parents[1] / "docs"
PROMPT = "When Mary and John went to the store, John gave a drink to"
#: Each picture begins with no session but its own.
CONNECT = """%load_ext djinn_nb
%djinn_connect
for name in server.sessions().index:
    server.attach(name).terminate()
%djinn_break 20"""
RUN = f"%%djinn_run --max-new-tokens 24\n{PROMPT}"
TOKENS_AND_LAYERS = ("%djinn_panel tokens", "%djinn_panel layers")
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
#: name -> width and height of the browser's window
WINDOWS = {"wide": (1600, 1000), "narrow": (900, 1000)}
#: Of the close-ups' window: no panel is cut, and none is stretched beyond what a page can show.
CLOSE = (1240, 1900)
#: Pixels of a close-up per pixel of the page, so that its letters are sharp.
CLOSE_SCALE = 1.5
#: Everything loads and comes to rest within this.
PATIENCE_MS = 90_000
#: The README is read over slow lines too: of one picture, bytes.
MOST_BYTES = 250_000
COLOURS, NO_DITHER = 256, Image.Dither.NONE


def main() -> None:
    """Parse the arguments, and take them all."""
    parser = argparse.ArgumentParser(prog="python -m scripts.screenshots", description=__doc__)
    parser.add_argument("--to", type=Path, default=DOCS, metavar="FOLDER", help="default: docs/")
    parser.add_argument("--only", choices=("lab", "close-ups"), help="one kind of them")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    with lab() as here, chromium() as browser:
        if args.only != "lab":
            _take_close_ups(here, browser, args.to)
        for theme in THEMES if args.only != "close-ups" else ():
            _set_theme(here, THEMES[theme])
            _take_the_lab(here, browser, args.to, theme)


def _take_the_lab(here: Lab, browser: Browser, to: Path, theme: str) -> None:
    """The sidebar beside panels at a stop, the window wide and narrow."""
    page = browser.new_page()
    page.set_default_timeout(PATIENCE_MS)
    _open(here, page, f"mary {theme}.ipynb", CONNECT, RUN, *TOKENS_AND_LAYERS)
    _choose(page)
    for name, (width, height) in WINDOWS.items():
        page.set_viewport_size({"width": width, "height": height})
        page.locator(".jp-CodeCell").nth(2).evaluate("one => one.scrollIntoView(true)")
        _keep(_at_rest(page.screenshot), to / f"lab-{theme}-{name}.png")
    page.close()


def _take_close_ups(here: Lab, browser: Browser, to: Path) -> None:
    """Panels with the cells that show them; and the sidebar."""
    width, height = CLOSE
    page = browser.new_page(
        viewport={"width": width, "height": height}, device_scale_factor=CLOSE_SCALE
    )
    page.set_default_timeout(PATIENCE_MS)
    cells = (*TOKENS_AND_LAYERS, "%djinn_panel attention", "%djinn_panel edit")
    _open(here, page, "mary.ipynb", CONNECT, RUN, *cells)
    _choose(page)
    _keep(_at_rest(lambda: _cells(page, 2, 3)), to / "tokens-and-layers.png")
    page.get_by_role("button", name="head 1", exact=True).click()
    page.get_by_text("Head 1 of layer 20, chosen").wait_for()
    _keep(_at_rest(lambda: _cells(page, 4, 4)), to / "attention.png")
    _preview(page)
    _keep(_at_rest(lambda: _cells(page, 5, 5)), to / "edit.png")
    side = _sidebar(page)
    page.set_viewport_size({"width": width, "height": WINDOWS["wide"][1]})
    side.get_by_role("button", name="layer 22").click()
    side.locator("pre").first.wait_for()
    page.set_viewport_size({"width": width, "height": height})
    page.mouse.move(0, 0)  # a row under the pointer looks different
    _keep(_at_rest(lambda: _to_its_end(page, side)), to / "sidebar.png")
    page.close()


def _preview(page: Page) -> None:
    """An edit that changes what comes next, not applied."""
    strength = page.locator(".djinn-panel").get_by_label("exactly")
    strength.fill("-1")
    strength.blur()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.djinn-panel')].some(one =>"
        " /KL (?!0\\.000)[0-9.]+ nats/.test(one.textContent))"
    )


def _to_its_end(page: Page, side: Locator) -> bytes:
    """The sidebar without the empty room below."""
    box = side.bounding_box()
    end = side.evaluate("one => one.lastElementChild.getBoundingClientRect().bottom")
    if box is None:
        raise RuntimeError("the sidebar is not drawn")
    return page.screenshot(clip={**box, "height": end - box["y"] + 8})


def _choose(page: Page) -> None:
    """Have the last token of the prompt chosen, once every picture is drawn."""
    panels = page.locator(".djinn-panel")
    for canvas in (panels.locator("canvas"), panels.locator("[role=listbox]")):
        canvas.first.wait_for()
    panels.locator("[role=listbox] [role=option]").last.click()


def _cells(page: Page, first: int, last: int) -> bytes:
    """Cells of the notebook, one under the other."""
    cells = page.locator(".jp-CodeCell")
    cells.nth(first).evaluate("one => one.scrollIntoView(true)")
    above, below = cells.nth(first).bounding_box(), cells.nth(last).bounding_box()
    if above is None or below is None:
        raise RuntimeError(f"cells {first} to {last} of the notebook are not drawn")
    height = below["y"] + below["height"] - above["y"]
    return page.screenshot(clip={**above, "height": height})


def _at_rest(take: Callable[[], bytes]) -> bytes:
    """A picture that has been the same for a second.

    Raises RuntimeError when nothing comes to rest.
    """
    deadline = time.monotonic() + PATIENCE_MS / 1000
    seen, same = take(), 0
    while same < 2:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the page did not come to rest in {PATIENCE_MS / 1000:.0f} s")
        time.sleep(0.5)
        now = take()
        same = same + 1 if now == seen else 0
        seen = now
    return seen


def _keep(picture: bytes, path: Path) -> None:
    """Write it with a palette, which letters and colour maps do not show.

    Raises RuntimeError when the file would be too large for a README.
    """
    colours = Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS, dither=NO_DITHER)
    colours.save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path} {colours.width} × {colours.height} pixels, {size / 1000:.0f} kB")
    if size > MOST_BYTES:
        raise RuntimeError(f"{path} has {size} bytes, more than {MOST_BYTES}: make it smaller")


def _set_theme(here: Lab, theme: str) -> None:
    request = urllib.request.Request(
        f"{here.address}/lab/api/settings/@jupyterlab/apputils-extension:themes",
        data=json.dumps({"raw": json.dumps({"theme": theme})}).encode(),
        headers={"Authorization": f"token {here.token}", "Content-Type": "application/json"},
        method="PUT",
    )
    with urllib.request.urlopen(request, timeout=30):
        pass


def _open(here: Lab, page: Page, name: str, *cells: str) -> None:
    """A notebook of these cells, run, and the sidebar beside it."""
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {
        "name": "python3", "display_name": "Python 3", "language": "python"
    }  # fmt: skip
    nbformat.write(notebook, here.files / name)
    page.goto(here.url(name))
    page.get_by_text("(ipykernel) | Idle").wait_for()
    _sidebar(page)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    done = f".jp-InputPrompt:has-text('[{len(cells)}]')"
    page.locator(".jp-CodeCell").last.locator(done).wait_for()


def _sidebar(page: Page) -> Locator:
    region = page.get_by_role("region", name="Djinn", exact=True)
    if not region.is_visible():
        page.get_by_role("tab", name="Djinn", exact=True).click()
        region.wait_for()
    return region


if __name__ == "__main__":
    main()
