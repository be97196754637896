"""Notebooks for the browser tests: written, opened, run; and the sidebar beside them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

    from scripts.browser import Lab

PROMPT = "When Mary and John went to the store, John gave a drink to"
CONNECT = "%load_ext djinn_nb\n%djinn_connect"
RUN = f"%%djinn_run --max-new-tokens 24\n{PROMPT}"
#: The end-of-text token is banned, and the lens is read at every site of every forward, so that a
#: run lasts for minutes.
LONG = f"""{CONNECT}
session = server.launch({PROMPT!r}, max_new_tokens=900, stop_on_entry=True)
stop = session.stop
stop.edit(ban=[2], sticky=True)
_ = session.break_when(entropy_below=1e-12, at="every site")"""
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
#: Waits are for a machine on which much else runs.
PATIENCE_MS = 90_000


def open_notebook(lab: Lab, page: Page, name: str, *cells: str, kernel: str = "python3") -> None:
    """A notebook of code cells, opened, its kernel ready."""
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {**KERNEL, "name": kernel}
    nbformat.write(notebook, lab.files / name)
    page.goto(lab.url(name))
    page.get_by_text("(ipykernel) | Idle").wait_for()


def run_all(page: Page, count: int) -> None:
    """Run all cells, and wait for the last one's number."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".jp-CodeCell").last.locator(f".jp-InputPrompt:has-text('[{count}]')").wait_for()


def sidebar(page: Page) -> Locator:
    """The sidebar, opened where it is not."""
    from playwright.sync_api import TimeoutError as NotWithin

    region = page.get_by_role("region", name="Djinn", exact=True)
    tab = page.get_by_role("tab", name="Djinn", exact=True)
    for _ in range(10):
        if region.is_visible():
            break
        tab.click()  # closes one that has opened by itself just now
        with contextlib.suppress(NotWithin):
            region.wait_for(timeout=PATIENCE_MS / 10)
    return region


def panel(page: Page) -> Locator:
    """The panels of the notebook, as widgets."""
    return page.locator(".djinn-panel")
