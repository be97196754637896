"""Everything without a mouse: from a prompt to an edited continuation, and the shortcuts.

Nothing here clicks. Where a key has to bring one is found by where the focus is, not by how often
it is pressed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from tests.browser.notebooks import CONNECT, LONG, PROMPT, open_notebook

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

    from scripts.browser import Lab

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

#: A round through all that the tab key reaches on the page is shorter.
MOST_PRESSES = 90
#: What the shortcuts of a stop did, newest first, as the sidebar notes it.
DONE = ["continue", "previous stop", "to the logits", "next site", "next layer"]
HAS_FOCUS = "one => one === document.activeElement"


def side(page: Page) -> Locator:
    return page.get_by_role("region", name="Djinn", exact=True)


def button(page: Page, name: str | re.Pattern[str]) -> Locator:
    return side(page).get_by_role("button", name=name, exact=True)


def cell(page: Page, number: int) -> Locator:
    return page.locator(".jp-Notebook .jp-CodeCell").nth(number)


def go_to(page: Page, wanted: Locator, key: str = "Tab") -> None:
    """Press a key until the focus is there."""
    wanted.wait_for()
    for _ in range(MOST_PRESSES):
        if wanted.evaluate(HAS_FOCUS):
            return
        page.keyboard.press(key)
    at = page.evaluate("() => document.activeElement.outerHTML.slice(0, 200)")
    raise AssertionError(f"{key} does not lead to {wanted}; the focus is at {at}")


def command(page: Page, text: str, label: str) -> None:
    """Carry out a command from the palette."""
    page.keyboard.press("Control+Shift+C")
    page.locator(".lm-CommandPalette-input").wait_for()
    page.keyboard.insert_text(text)
    page.locator(".lm-CommandPalette-item.lm-mod-active", has_text=label).wait_for()
    page.keyboard.press("Enter")
    page.locator(".lm-CommandPalette-input").wait_for(state="hidden")


def to_the_sidebar(page: Page) -> None:
    """By the palette; the sidebar has the focus then, so that Tab goes on inside it."""
    command(page, "djinn sidebar", "Show the Sidebar")
    page.wait_for_function("() => document.activeElement.closest('#djinn-nb-sidebar') !== null")


def to_cell(page: Page, number: int) -> None:
    """To the notebook, in command mode, and up or down to a cell."""
    at_notebook = "() => document.activeElement.matches('.jp-Notebook .jp-Cell')"
    for _ in range(MOST_PRESSES):
        if page.evaluate(at_notebook):
            break
        page.keyboard.press("Tab")
    for _ in range(page.locator(".jp-Notebook .jp-Cell").count()):
        page.keyboard.press("ArrowUp")
    for _ in range(number):
        page.keyboard.press("ArrowDown")
    page.wait_for_function(
        "number => document.querySelectorAll('.jp-Notebook .jp-Cell')[number]"
        ".classList.contains('jp-mod-active')",
        arg=number,
    )


def layer(page: Page, number: int) -> Locator:
    return button(page, re.compile(rf"^layer {number}\b"))


def here(page: Page, text: str) -> None:
    """Wait until the sidebar says that of the current session."""
    side(page).locator(".jp-Djinn-where").filter(has_text=text).wait_for()


def test_from_a_prompt_to_an_edited_continuation_by_keyboard(lab: Lab, page: Page):
    open_notebook(lab, page, "by keyboard.ipynb", "%djinn_panel edit", "print(session.text)")
    to_the_sidebar(page)
    go_to(page, button(page, "Load djinn_nb"))
    page.keyboard.press("Enter")
    button(page, "Connect").wait_for()
    to_the_sidebar(page)
    go_to(page, button(page, "Connect"))
    page.keyboard.press("Space")
    layer(page, 0).wait_for()

    # a breakpoint: the ladder is one stop of the tab key, arrows go along it
    to_the_sidebar(page)
    go_to(page, layer(page, 0))
    go_to(page, layer(page, 8), "ArrowDown")
    page.keyboard.press("Space")
    side(page).get_by_text("next run").wait_for()
    assert layer(page, 8).get_attribute("aria-pressed") == "true"
    assert layer(page, 8).evaluate(HAS_FOCUS)
    go_to(page, side(page).get_by_role("textbox", name="Prompt"))
    page.keyboard.insert_text(PROMPT)
    go_to(page, button(page, "Run"))
    page.keyboard.press("Enter")
    here(page, "stopped at layers.8.output (breakpoint), forward 0")

    # run controls: one stop too, and a button that runs something keeps the focus
    to_the_sidebar(page)
    go_to(page, button(page, "Continue"))
    go_to(page, button(page, "Next layer"), "ArrowRight")
    page.keyboard.press("Enter")
    here(page, "stopped at layers.9.output")
    assert button(page, "Next layer").evaluate(HAS_FOCUS)
    go_to(page, button(page, "Step back"), "ArrowRight")
    page.keyboard.press("Space")
    here(page, "stopped at layers.8.output")
    go_to(page, layer(page, 8))
    page.keyboard.press("Enter")  # the breakpoint away, or it stops there in the next forward
    side(page).get_by_text("No breakpoints.").wait_for()

    # the edit, in the notebook
    to_cell(page, 0)
    page.keyboard.press("Control+Enter")
    edit = page.locator(".jp-Notebook .djinn-panel")
    go_to(page, edit.get_by_label("Kind"))
    page.keyboard.press("ArrowDown")  # moves in the list, and not from cell to cell
    page.keyboard.type("zero")  # and letters are no shortcuts of the notebook's
    assert edit.get_by_label("Kind").evaluate("one => one.value") == "zero"
    go_to(page, edit.get_by_role("button", name="Apply"))
    page.keyboard.press("Enter")
    side(page).get_by_text("1 edit").wait_for()
    page.keyboard.press("Control+F9")
    here(page, "finished")

    to_cell(page, 2)
    page.keyboard.press("Control+Enter")
    said = page.locator(".jp-Notebook .jp-OutputArea-output", has_text="a drink to")
    said.wait_for()
    assert "drink to Mary" not in said.inner_text()


def actions(page: Page) -> list[str]:
    """What was done here, newest first, as the sidebar notes it."""
    found = side(page).locator(".jp-Djinn-action .jp-Djinn-row .jp-Djinn-grow")
    return [text.strip() for text in found.all_inner_texts()]


def test_shortcuts_do_something_only_while_something_is_stopped(lab: Lab, page: Page):
    page.add_init_script(
        "window.taken = []; window.addEventListener('keydown', event => setTimeout(() => {"
        " if (/^F/.test(event.key)) window.taken.push(event.defaultPrevented) }), true)"
    )
    open_notebook(
        lab, page, "shortcuts.ipynb", f"{CONNECT}\n%djinn_break 8 --when prefill",
        f"%%djinn_run\n{PROMPT}",
    )  # fmt: skip
    keys = ("Control+F8", "Control+F9", "Control+F10", "Control+F11", "Control+Shift+F10")

    def none_is_taken() -> None:
        page.evaluate("() => { window.taken = [] }")
        for key in keys:
            page.keyboard.press(key)
        page.wait_for_function("many => window.taken.length >= many", arg=len(keys))
        assert page.evaluate("() => window.taken") == [False] * len(keys)

    to_cell(page, 0)
    page.keyboard.press("Shift+Enter")
    layer(page, 8).wait_for()
    none_is_taken()
    page.keyboard.press("Shift+Enter")
    here(page, "stopped at layers.8.output")
    assert actions(page) == []  # a cell did it; and the keys before did nothing

    page.keyboard.press("Control+F10")
    here(page, "stopped at layers.9.output")
    page.keyboard.press("Control+F11")
    here(page, "stopped at layers.10.")
    page.keyboard.press("Control+Shift+F11")
    here(page, "stopped at logits")
    page.keyboard.press("Control+Shift+F10")
    here(page, "stopped at layers.10.")
    page.keyboard.press("Control+F9")
    here(page, "finished")
    assert actions(page) == DONE
    none_is_taken()
    assert len(actions(page)) == len(DONE)


def test_a_run_is_paused_by_key_while_its_cell_runs(lab: Lab, page: Page):
    open_notebook(lab, page, "pause by key.ipynb", LONG, "stop = session.continue_()")
    to_cell(page, 0)
    page.keyboard.press("Shift+Enter")
    here(page, "stopped")
    page.keyboard.press("Control+Enter")
    page.locator("body[data-djinn-running=true]").wait_for(state="attached")
    page.keyboard.press("Control+F8")
    here(page, "(pause)")
    cell(page, 1).locator(".jp-InputPrompt", has_text="[2]").wait_for()
