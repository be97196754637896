"""The sidebar in a real JupyterLab: used by mouse, while a cell runs, and after a reload.

The words of sidebar and panels are the same, so everything is looked for in one of the two.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from tests.browser.notebooks import (
    CONNECT,
    LONG,
    PROMPT,
    RUN,
    open_notebook,
    run_all,
    sidebar,
)

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

    from scripts.browser import Lab

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

STOPPED = re.compile("stopped at")
#: From the click itself, as the page hears it, to a status that says "stopped".
WATCH = """() => {
  const status = document.querySelector("body > .jp-Djinn-live");
  window.took = new Promise((told) => {
    let clicked = null;
    document.addEventListener("click", (event) => { clicked = event.timeStamp; },
                              {capture: true, once: true});
    const watch = new MutationObserver(() => {
      if (clicked !== null && status.textContent.startsWith("stopped at")) {
        watch.disconnect();
        told(performance.now() - clicked);
      }
    });
    watch.observe(status, {childList: true, characterData: true, subtree: true});
  });
}"""


def cells(page: Page) -> Locator:
    return page.get_by_role("feed", name="Cells")


def press(page: Page, name: str) -> None:
    sidebar(page).get_by_role("button", name=name, exact=True).click()


def layer(page: Page, number: int) -> Locator:
    return sidebar(page).get_by_role("button", name=re.compile(rf"^layer {number}\b"))


def here(page: Page, text: str | re.Pattern[str]) -> None:
    """Wait until the sidebar says that of the current session."""
    sidebar(page).locator(".jp-Djinn-where").filter(has_text=text).wait_for()


def stopped_layer(page: Page, number: int) -> None:
    """Wait until the ladder shows the session stopped at a layer, and at no other."""
    sidebar(page).locator("[aria-current=true][aria-label^='layer ']").filter(
        has_text=re.compile(rf"^{number}\s*stopped")
    ).wait_for()
    assert sidebar(page).locator("[aria-current=true][aria-label^='layer ']").count() == 1


def choose_from(page: Page, menu: str, item: str) -> None:
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.get_by_role("menuitem", name=re.compile(f"^{item}( |$)")).click()


def run_cell(page: Page, number: int) -> None:
    """Click a cell, and the notebook's run button."""
    page.locator(".jp-CodeCell").nth(number).locator(".jp-Editor").click()
    page.get_by_role("button", name=re.compile("^Run this cell and advance")).click()


def test_from_a_prompt_to_an_edited_continuation_by_mouse(lab: Lab, page: Page):
    open_notebook(lab, page, "by mouse.ipynb", "%djinn_panel edit", "print(session.text)")
    press(page, "Load djinn_nb")
    press(page, "Connect")
    layer(page, 8).click()
    sidebar(page).get_by_text("next run").wait_for()
    assert layer(page, 8).get_attribute("aria-pressed") == "true"
    press(page, "Run a prompt…")
    page.keyboard.insert_text(PROMPT)  # into the field that the button has put the cursor in
    press(page, "Run")
    here(page, "stopped at layers.8.output (breakpoint), forward 0")
    stopped_layer(page, 8)
    page.get_by_role("status", name="Djinn").filter(
        has_text="stopped at layers.8.output"
    ).wait_for()

    press(page, "Next layer")
    stopped_layer(page, 9)
    press(page, "Step back")
    stopped_layer(page, 8)
    run_cell(page, 0)
    edit = cells(page).locator(".djinn-panel")
    edit.get_by_label("Kind").select_option("zero")
    edit.get_by_role("button", name="Apply").click()
    sidebar(page).get_by_text("1 edit").wait_for()
    layer(page, 8).click()
    sidebar(page).get_by_text("No breakpoints.").wait_for()
    press(page, "Continue")
    here(page, "finished")
    run_cell(page, 2)
    edited = cells(page).locator(".jp-OutputArea-output", has_text="a drink to").last.inner_text()
    assert "drink to Mary" not in edited

    # the control: without the edit it says something else
    edited_one = sidebar(page).locator(".jp-Djinn-where").inner_text().partition(":")[0]
    press(page, "Run")
    here(page, re.compile(rf"^\s*(?!{edited_one}:)\S+: finished"))  # another session than before
    run_cell(page, 2)
    cells(page).locator(".jp-OutputArea-output", has_text="a drink to Mary").wait_for()


def test_pause_stops_within_300_ms_a_session_that_a_cell_runs(
    lab: Lab, page: Page, record_property: Callable[[str, object], None]
):
    open_notebook(lab, page, "pause.ipynb", LONG, "stop = session.continue_()")
    sidebar(page)
    run_cell(page, 0)
    here(page, STOPPED)
    cell = page.locator(".jp-CodeCell").nth(1)
    pause = sidebar(page).get_by_role("button", name="Pause", exact=True)
    times = []
    for _ in range(7):
        run_cell(page, 1)
        page.locator("body[data-djinn-running=true]").wait_for(state="attached")
        sidebar(page).locator(".jp-Djinn-busy").filter(has_text=re.compile(r"\d+ of")).wait_for()
        assert cell.locator(".jp-InputPrompt").inner_text() == "[*]:"
        page.evaluate(WATCH)
        pause.click()
        times.append(page.evaluate("() => window.took"))
        page.get_by_text("(ipykernel) | Idle").wait_for()  # the cell has ended with the stop
        here(page, "(pause)")

    shown = ", ".join(f"{time:.0f}" for time in times)
    print(
        f"click on Pause to 'stopped', a cell running, ms: {shown}; {statistics.median(times)=:.0f}"
    )
    record_property("pause while a cell runs, ms", shown)
    assert statistics.median(times) <= 300


def test_a_pause_that_waits_for_the_cell_would_be_seen_to_wait(lab: Lab, page: Page):
    """The control of the test above: what a second cell asks for waits for the first."""
    from playwright.sync_api import TimeoutError as NotWithin

    open_notebook(lab, page, "waits.ipynb", LONG, "stop = session.continue_()", "session.pause()")
    sidebar(page)
    run_cell(page, 0)
    here(page, STOPPED)
    run_cell(page, 1)
    page.locator("body[data-djinn-running=true]").wait_for(state="attached")
    page.evaluate(WATCH)
    run_cell(page, 2)
    with pytest.raises(NotWithin):
        page.get_by_role("status", name="Djinn").filter(has_text=STOPPED).wait_for(
            state="attached", timeout=900
        )
    for number in (1, 2):
        prompt = page.locator(".jp-CodeCell").nth(number).locator(".jp-InputPrompt")
        assert prompt.inner_text() == "[*]:"

    press(page, "Pause")
    here(page, "(pause)")


def test_a_reloaded_page_shows_the_stop_again_and_goes_on(lab: Lab, page: Page):
    open_notebook(lab, page, "reload.ipynb", f"{CONNECT}\n%djinn_break 8 --when prefill", RUN)
    sidebar(page)
    run_all(page, 2)
    stopped_layer(page, 8)

    page.reload()
    stopped_layer(page, 8)
    press(page, "Next layer")
    stopped_layer(page, 9)
    press(page, "Continue")
    here(page, "finished")


def test_a_restarted_kernel_finds_the_stop_again_and_goes_on(lab: Lab, page: Page):
    open_notebook(
        lab, page, "restart.ipynb", f"{CONNECT}\n%djinn_break 8 --when prefill",
        f"%%djinn_run --max-new-tokens 24 --name survivor\n{PROMPT}",
    )  # fmt: skip
    sidebar(page)
    run_all(page, 2)
    stopped_layer(page, 8)

    choose_from(page, "Kernel", "Restart Kernel…")
    page.get_by_role("button", name="Confirm Kernel Restart").click()
    press(page, "Load djinn_nb")
    press(page, "Connect")
    session = sidebar(page).get_by_role("button", name=re.compile("survivor"))
    session.filter(has_text="stopped at layers.8.output").click()
    stopped_layer(page, 8)
    press(page, "Next layer")
    stopped_layer(page, 9)
    press(page, "Continue")
    here(page, "finished")


def test_the_sidebar_follows_the_notebook_in_front(lab: Lab, page: Page):
    names = {"left.ipynb": 3, "right.ipynb": 12}
    for name, number in reversed(names.items()):
        open_notebook(
            lab, page, name, f"{CONNECT}\n%djinn_break {number}",
            f"%%djinn_run --name {name.split('.')[0]}\n{PROMPT}",
        )  # fmt: skip
    page.locator(".jp-DirListing-item", has_text="right.ipynb").dblclick()
    page.get_by_role("tab", name="right.ipynb").wait_for()
    for name, number in names.items():
        page.get_by_role("tab", name=name).click()
        sidebar(page).get_by_role("definition").filter(has_text=name).wait_for()
        sidebar(page).get_by_text("djinn_nb is not loaded in this notebook").wait_for()
        choose_from(page, "Run", "Run All Cells")
        stopped_layer(page, number)

    for name, number in names.items():
        page.get_by_role("tab", name=name).click()
        sidebar(page).get_by_role("definition").filter(has_text=name).wait_for()
        stopped_layer(page, number)
        # one server: each lists both, and only its own as current
        for other in names:
            session = sidebar(page).get_by_role("button", name=re.compile(other.split(".")[0]))
            session.wait_for()
            assert (session.get_attribute("aria-current") == "true") is (other == name)
    press(page, "Next layer")
    stopped_layer(page, 13)
    page.get_by_role("tab", name="left.ipynb").click()
    stopped_layer(page, 3)
