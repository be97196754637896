"""What the panels say in a browser when something is wrong, and that they find a stop again.

A plain Playwright test: nothing of the JupyterLab extension is used, so the panels stand alone here
as they do in any Jupyter client.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.notebooks import (
    CONNECT,
    PATIENCE_MS,
    PROMPT,
    RUN,
    open_notebook,
    panel,
    run_all,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Route

    from scripts.browser import Lab

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]


def button(page: Page, text: str) -> Locator:
    return page.locator(".djinn-panel button", has_text=text)


def until_saved(page: Page, file: Path, text: str) -> None:
    """Wait until a notebook's file has a text: the page says only for a moment that it is saved."""
    for _ in range(PATIENCE_MS // 100):
        if text in file.read_text(encoding="utf-8"):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"{file.name} is not saved")


def beside(lab: Lab, code: str) -> str:
    """What another client of the lab's kernel server prints."""
    done = subprocess.run(
        [sys.executable, "-c", f"import djinn_nb\nserver = djinn_nb.connect()\n{code}"],
        env=lab.environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_server_the_panel_says_how_to_connect_and_connects(lab: Lab, page: Page):
    open_notebook(lab, page, "none.ipynb", "%load_ext djinn_nb\n%djinn_panel sessions")
    run_all(page, 1)

    said = panel(page).get_by_role("status").filter(has_text="not connected to a server")
    said.wait_for()
    assert "Press Connect" in said.inner_text()
    button(page, "Connect").click()
    said.wait_for(state="detached")
    page.locator(".djinn-panel button:enabled", has_text="Launch").wait_for()


def test_nothing_stopped_says_how_something_stops(lab: Lab, page: Page):
    open_notebook(lab, page, "nothing.ipynb", f"{CONNECT}\n%djinn_panel edit")
    run_all(page, 1)

    panel(page).get_by_text("nothing is stopped: launch a prompt with a breakpoint").wait_for()
    assert button(page, "Apply").is_disabled()


def test_the_panels_work_where_the_extension_is_not(lab: Lab, page: Page):
    blocked: list[str] = []

    def block(route: Route) -> None:
        blocked.append(route.request.url)
        route.abort()

    page.route("**/extensions/djinn-nb/**", block)
    open_notebook(
        lab,
        page,
        "alone.ipynb",
        f"{CONNECT}\n%djinn_break 8",
        RUN,
        "%djinn_panel sessions",
        "%djinn_panel edit",
    )
    assert blocked and page.get_by_role("tab", name="Djinn", exact=True).count() == 0
    run_all(page, 4)
    panel(page).get_by_text("stopped at layers.8.output").first.wait_for()

    page.locator(".djinn-panel button:enabled", has_text="Apply").click()
    page.locator(".djinn-panel button:enabled", has_text="Undo").wait_for()
    page.locator(".djinn-panel button:enabled", has_text="Next layer").click()
    panel(page).get_by_text("stopped at layers.9.output").first.wait_for()


def test_a_stop_that_another_client_moved_is_said_to_be_taken_over(lab: Lab, page: Page):
    open_notebook(
        lab, page, "taken.ipynb", f"{CONNECT}\n%djinn_break 8",
        f"%%djinn_run --name taken\n{PROMPT}", "%djinn_panel sessions",
    )  # fmt: skip
    run_all(page, 3)
    panel(page).get_by_text("stopped at layers.8.output").first.wait_for()

    beside(lab, "server.attach('taken').next()")

    said = panel(page).get_by_role("status").filter(has_text="was moved by another client")
    said.wait_for()
    assert "Look again, to go on from there" in said.inner_text()
    button(page, "Look again").click()
    said.wait_for(state="detached")
    panel(page).get_by_text("stopped at layers.9.output").first.wait_for()


def test_two_notebooks_on_one_server_see_one_another(lab: Lab, page: Page, chromium: Browser):
    open_notebook(lab, page, "one.ipynb", f"{CONNECT}\n%djinn_panel sessions")
    run_all(page, 1)
    other = chromium.new_page()
    other.set_default_timeout(PATIENCE_MS)

    open_notebook(
        lab, other, "two.ipynb", f"{CONNECT}\n%djinn_break 3", f"%%djinn_run --name mine\n{PROMPT}"
    )
    run_all(other, 2)
    other.close()

    panel(page).get_by_role("row").filter(has_text="mine").wait_for()


def test_a_reloaded_page_and_a_restarted_kernel_find_the_stop_again(lab: Lab, page: Page):
    open_notebook(
        lab, page, "again.ipynb", f"{CONNECT}\n%djinn_break 5",
        f"%%djinn_run --name again\n{PROMPT}", "%djinn_panel sessions",
    )  # fmt: skip
    run_all(page, 3)
    panel(page).get_by_text("stopped at layers.5.output").first.wait_for()
    page.keyboard.press("Control+s")
    until_saved(page, lab.files / "again.ipynb", "stopped at layers.5.output")

    page.reload()
    panel(page).get_by_text("stopped at layers.5.output").first.wait_for()
    button(page, "Next layer").click()
    panel(page).get_by_text("stopped at layers.6.output").first.wait_for()

    # the session belongs to the server, not to the kernel that is killed
    assert "layers.6.output" in beside(lab, "print(server.attach('again').stop)")


def test_a_server_lost_in_mid_stop_is_said_to_be_lost(page: Page, tmp_path: Path):
    from scripts import browser as real

    with real.lab() as own:
        open_notebook(own, page, "lost.ipynb", f"{CONNECT}\n%djinn_break 8", RUN, "%djinn_panel")
        run_all(page, 3)
        panel(page).get_by_text("stopped at layers.8.output").first.wait_for()
        [file] = (own.home / "run" / "djinn").glob("*.json")
        os.kill(json.loads(file.read_text(encoding="utf-8"))["pid"], signal.SIGKILL)

        alert = panel(page).get_by_role("alert").first
        alert.wait_for()
        assert "server" in alert.inner_text()
        assert "connect" in alert.inner_text().lower()
