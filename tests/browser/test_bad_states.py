"""What panel and sidebar say when something is wrong or slow, and that their ways out work."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.models import altered_model
from tests.browser.notebooks import (
    CONNECT,
    LONG,
    open_notebook,
    panel,
    run_all,
    sidebar,
)
from tests.djinn_nb.held_back import held_back

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

    from scripts.browser import Lab

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

LONG_RUN = f"{LONG.removeprefix(CONNECT)}\nstop = session.continue_()"
#: An ipykernel as those before 7 are: one thread for all that a front end asks.
WITHOUT_SUBSHELLS = """
from ipykernel.kernelapp import IPKernelApp

class App(IPKernelApp):
    def init_control(self, context):
        super().init_control(context)
        self.shell_channel_thread = None

App.launch_instance()
"""


@pytest.fixture
def old_kernel(lab: Lab) -> str:
    """A kernel of the lab that has no subshells."""
    folder = lab.home / "jupyter-data" / "kernels" / "without-subshells"
    folder.mkdir(parents=True, exist_ok=True)
    spec = {
        "argv": [sys.executable, "-c", WITHOUT_SUBSHELLS, "-f", "{connection_file}"],
        "display_name": "No subshells (ipykernel)",
        "language": "python",
    }
    (folder / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder.name


def _address_and_token(lab: Lab) -> tuple[str, str]:
    """Of the lab's kernel server: where it listens, and whom it lets in."""
    code = (
        "import djinn_nb; from kernel_server.wire import find_token;"
        " print(djinn_nb.connect().address, find_token())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=lab.environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    address, token = done.stdout.split()
    return address, token


def _face(page: Page, code: str) -> Locator:
    return sidebar(page).locator(f"[data-code={code}]")


def _control(page: Page, name: str) -> Locator:
    """A run control of the sidebar."""
    toolbar = sidebar(page).get_by_role("toolbar", name="run controls")
    return toolbar.get_by_role("button", name=name, exact=True)


def _run_cell(page: Page, index: int) -> None:
    page.locator(".jp-CodeCell").nth(index).locator(".jp-InputArea-editor").click()
    page.keyboard.press("Control+Enter")


def _run_long(page: Page) -> None:
    """Run both cells of a notebook: a panel, and a session that a cell waits for."""
    _run_cell(page, 0)
    panel(page).locator("button:enabled", has_text="Launch").wait_for()
    sidebar(page).get_by_text("connected", exact=False).first.wait_for()
    _run_cell(page, 1)
    sidebar(page).locator(".jp-Djinn-where[data-status=running]").wait_for()


def _end_session(page: Page) -> None:
    """Leave the lab's server free of it."""
    sidebar(page).locator(".jp-Djinn-where[data-status=stopped]").wait_for()
    _control(page, "Terminate").click()
    sidebar(page).locator(".jp-Djinn-where").wait_for(state="detached")


def test_the_sidebar_hears_that_djinn_was_loaded(lab: Lab, page: Page):
    open_notebook(lab, page, "heard.ipynb", "%load_ext djinn_nb")
    face = _face(page, "NotLoaded")
    face.wait_for()
    assert "inserts a cell with %load_ext djinn_nb" in face.inner_text()

    run_all(page, 1)

    _face(page, "NotConnected").wait_for()
    assert face.count() == 0


def test_a_refused_token_is_said_everywhere_and_another_one_connects(lab: Lab, page: Page):
    address, token = _address_and_token(lab)
    open_notebook(
        lab, page, "refused.ipynb", "%load_ext djinn_nb\n%djinn_panel sessions",
        f"%djinn_connect {address} --token wrong",
    )  # fmt: skip
    run_all(page, 2)

    alert = panel(page).get_by_role("alert")
    alert.wait_for()
    face = _face(page, "AccessDenied")
    face.wait_for()
    for said in (alert, face, page.locator(".jp-OutputArea-output", has_text="AccessDenied")):
        assert "does not know this access token" in said.inner_text()
    for said in (alert, face):
        assert "%djinn_connect ADDRESS --token TOKEN" in said.inner_text()
    page.get_by_text("Djinn: access token refused").wait_for()

    face.get_by_role("button", name="Give a token…").click()
    form = sidebar(page).get_by_role("form", name="connect to a server")
    assert form.get_by_label("Address").input_value() == address
    form.get_by_label("Access token").fill(token)
    form.get_by_role("button", name="Connect").click()
    alert.wait_for(state="detached")
    face.wait_for(state="detached")
    panel(page).locator("button:enabled", has_text="Launch").wait_for()


def test_a_model_that_loads_shows_how_far_it_is_in_panel_and_sidebar(
    lab: Lab, page: Page, tmp_path: Path
):
    model = altered_model(tmp_path / "model")
    open_notebook(
        lab, page, "loads.ipynb", "%load_ext djinn_nb\n%djinn_panel sessions",
        f"%djinn_load {model}",
    )  # fmt: skip
    sidebar(page)
    _run_cell(page, 0)
    panel(page).get_by_text("not connected to a server").wait_for()
    _face(page, "NotConnected").wait_for()
    with held_back(model / "config.json") as held:
        _run_cell(page, 1)
        said = panel(page).get_by_role("status").filter(has_text=re.compile("loading the model.*%"))
        said.wait_for()
        assert "Nothing to do" in said.inner_text()
        face = _face(page, "ModelLoading").filter(has_text="loading the model")
        face.locator("progress[value]").wait_for()
        assert "You can go on as soon as it is there" in face.inner_text()
        while not held.is_read():
            page.wait_for_timeout(100)
        held.give()
        panel(page).locator("button:enabled", has_text="Launch").wait_for()
        page.locator(".jp-OutputArea-output", has_text="Server unix:").wait_for()
    _face(page, "ModelLoading").wait_for(state="detached")


def test_a_panel_says_that_it_waits_for_a_cell_and_the_sidebar_does_not(lab: Lab, page: Page):
    open_notebook(lab, page, "waits.ipynb", f"{CONNECT}\n%djinn_panel sessions", LONG_RUN)
    sidebar(page)
    _run_long(page)

    said = panel(page).get_by_role("status").filter(has_text="what is clicked here waits for it")
    said.wait_for()
    assert "press Pause in the sidebar; or interrupt the kernel" in said.inner_text()
    assert _face(page, "NoSubshells").count() == 0
    _control(page, "Pause").click()
    said.wait_for(state="detached")
    _end_session(page)


def test_without_subshells_pause_says_that_it_waits_and_how_to_go_on(
    lab: Lab, page: Page, old_kernel: str
):
    open_notebook(
        lab, page, "old.ipynb", f"{CONNECT}\n%djinn_panel sessions", LONG_RUN, kernel=old_kernel
    )
    sidebar(page)
    _run_long(page)
    assert "While a cell runs, Pause waits for it" in _face(page, "NoSubshells").inner_text()

    _control(page, "Pause").click()
    waiting = _face(page, "WaitingForKernel")
    waiting.wait_for()
    assert "waits until the kernel’s cell ends" in waiting.inner_text()
    assert sidebar(page).locator(".jp-Djinn-where[data-status=running]").is_visible()
    waiting.get_by_role("button", name="Interrupt the kernel").click()

    waiting.wait_for(state="detached")
    page.locator(".jp-OutputArea-output", has_text="interrupted: ").wait_for()
    _end_session(page)


def test_without_subshells_terminate_interrupts_the_cell(lab: Lab, page: Page, old_kernel: str):
    open_notebook(
        lab, page, "old end.ipynb", f"{CONNECT}\n%djinn_panel sessions", LONG_RUN, kernel=old_kernel
    )
    sidebar(page)
    _run_long(page)

    _control(page, "Terminate").click()

    sidebar(page).locator(".jp-Djinn-where").wait_for(state="detached")
    page.locator(".jp-OutputArea-output", has_text="interrupted: ").wait_for()
    _face(page, "WaitingForKernel").wait_for(state="detached")
