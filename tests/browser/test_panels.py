"""The panels in a real JupyterLab: from a prompt to an edited continuation by mouse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tests.browser.models import altered_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

    from scripts.browser import Lab

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

PROMPT = "When Mary and John went to the store, John gave a drink to"
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
WAIT_MS = 120_000
#: One that the bundled model never chooses: nothing ends its text.
NO_TOKEN = 0


@pytest.fixture
def open_notebook(lab: Lab, chromium: Browser) -> Iterator[Callable[..., Page]]:
    """A notebook with these cells, its kernel idle."""
    contexts = []

    def made(name: str, *cells: str) -> Page:
        notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
        notebook.metadata["kernelspec"] = KERNEL
        nbformat.write(notebook, lab.files / name)
        context = chromium.new_context(viewport={"width": 1400, "height": 1200})
        context.set_default_timeout(WAIT_MS)
        contexts.append(context)
        page = context.new_page()
        page.goto(lab.url(name))
        page.get_by_text("(ipykernel) | Idle").wait_for(timeout=WAIT_MS)
        return page

    yield made
    for context in contexts:
        context.close()


def _run_cell(page: Page, index: int = 0) -> None:
    page.locator(".jp-CodeCell").nth(index).click()
    page.keyboard.press("Shift+Enter")


def _cells(page: Page) -> Locator:
    """The notebook itself: the sidebar beside it has words and buttons of the same names."""
    return page.get_by_role("feed", name="Cells")


def _section(page: Page, title: str) -> None:
    _cells(page).get_by_text(title, exact=True).first.click()


def _press(page: Page, name: str) -> None:
    _cells(page).get_by_role("button", name=name, exact=True).first.click()


def test_from_a_prompt_to_an_edited_continuation_by_mouse(open_notebook):
    page = open_notebook("mouse.ipynb", "%load_ext djinn_nb\n%djinn_panel", "stop, session.text")
    _run_cell(page)
    _cells(page).get_by_text("not connected to a server").first.wait_for(timeout=WAIT_MS)
    _press(page, "Connect")
    _cells(page).get_by_text("no session yet").first.wait_for(timeout=WAIT_MS)
    _section(page, "Breakpoints")
    _cells(page).get_by_placeholder("20 or layers.3.middle").fill("20")
    _cells(page).get_by_placeholder(
        'token == " to"'
    ).click()  # a value is sent when its field is left
    _press(page, "Set")
    _cells(page).get_by_text("in runs that follow").first.wait_for()
    _section(page, "Sessions")
    _cells(page).get_by_placeholder("A prompt to debug").fill(PROMPT)
    _press(page, "Launch")
    _cells(page).get_by_text("stopped at layers.20.output (breakpoint)").first.wait_for(
        timeout=WAIT_MS
    )
    _section(page, "Edit and steer")
    preview = _cells(page).get_by_text("probability of the next token")
    preview.wait_for()
    before = preview.text_content()
    box = page.locator(".widget-slider .noUi-base, .slider-container").first.bounding_box()
    page.mouse.click(box["x"] + 3, box["y"] + box["height"] / 2)  # its left end: scale -2
    page.wait_for_function(
        "before => [...document.querySelectorAll('.jp-Notebook div')].some(one =>"
        " one.childElementCount === 0 && one.textContent.startsWith('probability of the next')"
        " && one.textContent.split('answered')[0] !== before.split('answered')[0])",
        arg=before,
    )
    _press(page, "Apply")
    _cells(page).get_by_text("at this stop").first.wait_for()
    _section(page, "Sessions")
    _press(page, "Continue")
    _cells(page).get_by_text("forward 1").first.wait_for(timeout=WAIT_MS)
    _run_cell(page, 1)
    printed = page.locator(".jp-CodeCell").nth(1).locator(".jp-OutputArea-output")
    shown = printed.filter(has_text="a drink to")
    shown.wait_for()

    assert "drink to Mary" not in shown.text_content()  # what it says without the edit


def test_pause_stops_a_session_that_a_click_runs(open_notebook, tmp_path):
    """Panels queue and return, so the kernel is free while a session runs."""
    model = altered_model(tmp_path / "endless", eos_token_id=NO_TOKEN)
    page = open_notebook(
        "pause.ipynb", f"%load_ext djinn_nb\n%djinn_load {model}\n%djinn_panel sessions"
    )
    _run_cell(page)
    prompt = _cells(page).get_by_placeholder("A prompt to debug")
    prompt.wait_for(timeout=WAIT_MS)
    prompt.fill(PROMPT)
    tokens = _cells(page).get_by_label("New tokens")
    tokens.fill("900")
    tokens.press("Tab")
    _press(page, "Launch")
    pause = _cells(page).get_by_role("button", name="Pause", exact=True)
    page.wait_for_function(
        "() => [...document.querySelectorAll('.jp-Notebook button')].some("
        "one => one.textContent.trim() === 'Pause' && !one.disabled)"
    )
    pause.click()

    # a click that had to wait for the run would find it finished
    _cells(page).get_by_text("(pause)").first.wait_for(timeout=WAIT_MS)
