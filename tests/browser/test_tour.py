"""The plain smoke test: what `make lab` opens runs in a browser, says so, and calls nobody.

Needs Chromium and Playwright, nothing of JupyterLab's own test tools; the extension's suite, which
needs those, is in extension/ui-tests.
"""

from __future__ import annotations

import ipaddress
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from tests.browser.notebooks import PATIENCE_MS

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from scripts.browser import Lab

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

TOUR_S = 400_000  # ms; a tenth of it on an idle machine
#: Nobody's: the name is reserved for this use.
ELSEWHERE = "http://djinn.invalid/"
AUDIT = Path(__file__).parent / "audit"


@dataclass
class Watched:
    """All a page asked for, and all it complained of."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, page: Page) -> Watched:
        """Watch a page from before its first request."""
        watched = cls()
        page.context.on("request", lambda request: watched.requests.append(request.url))
        page.on("websocket", lambda socket: watched.requests.append(socket.url))
        page.on("pageerror", lambda error: watched.complaints.append(f"uncaught: {error}"))
        page.on(
            "console",
            lambda line: line.type == "error" and watched.complaints.append(line.text),
        )
        return watched

    def elsewhere(self) -> list[str]:
        """The requests that were not to this machine."""
        return [
            url
            for url in self.requests
            if urlsplit(url).scheme not in ("data", "blob") and not is_here(urlsplit(url).hostname)
        ]


def is_here(host: str | None) -> bool:
    """Whether a host, an address or the path of a Unix socket is this machine."""
    if not host or host == "localhost" or host.startswith("/"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def called_elsewhere(calls: Path) -> list[str]:
    """The lines of an audit that name another machine."""
    lines = calls.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not is_here(re.split(r"[ ']+", line)[1])]


@pytest.fixture(scope="module")
def run(lab: Lab, chromium: Browser) -> Iterator[tuple[Page, Watched]]:
    """The tour, opened and run to its end as a person does it."""
    context = chromium.new_context(viewport={"width": 1600, "height": 1000})
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    watched = Watched.of(page)
    page.goto(lab.url())
    page.get_by_text("(ipykernel) | Idle").wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".jp-OutputArea-output", has_text="the sessions of this tour are gone").wait_for(
        timeout=TOUR_S
    )
    yield page, watched
    context.close()


@pytest.fixture
def page(run: tuple[Page, Watched]) -> Page:
    return run[0]


@pytest.fixture
def watched(run: tuple[Page, Watched]) -> Watched:
    return run[1]


def test_the_tour_runs_to_its_end_and_no_cell_fails(page: Page):
    # of all cells, those that are scrolled out of sight too
    numbered = page.locator(".jp-CodeCell .jp-InputArea-prompt").all_text_contents()

    assert len(numbered) > 20
    assert [text for text in numbered if not re.fullmatch(r"\[\d+\]:", text.strip())] == []
    assert page.locator(".jp-OutputArea-output[data-mime-type*='error']").count() == 0


def test_a_stop_shows_its_panel(page: Page):
    panel = page.get_by_role("region", name="Djinn: stopped at layers.20.output").first
    panel.scroll_into_view_if_needed()

    assert panel.get_by_role("img", name="Heat map of L2 norms").is_visible()
    assert panel.get_by_text("logit lens at position 14").is_visible()


def test_nothing_on_the_page_complains(watched: Watched):
    assert watched.complaints == []


def test_no_request_leaves_the_machine(watched: Watched, calls: Path):
    assert len(watched.requests) > 50
    assert any(url.startswith("ws:") for url in watched.requests)
    assert watched.elsewhere() == []
    assert len(calls.read_text(encoding="utf-8").splitlines()) > 3
    assert called_elsewhere(calls) == []


def test_a_request_that_leaves_the_machine_would_be_seen(
    lab: Lab, chromium: Browser, tmp_path: Path
):
    """The control of the test above, of both its halves."""
    page = chromium.new_page()
    page.set_default_timeout(PATIENCE_MS)
    watched = Watched.of(page)
    page.goto(lab.url())
    page.evaluate("url => fetch(url).catch(() => null)", ELSEWHERE)
    page.evaluate("url => { new WebSocket(url) }", ELSEWHERE.replace("http", "ws"))
    for _ in range(600):  # the browser tells of them when it gets to it
        if {urlsplit(url).scheme for url in watched.elsewhere()} == {"http", "ws"}:
            break
        page.wait_for_timeout(100)
    page.close()
    code = "import urllib.request; urllib.request.urlopen('http://192.0.2.1/', timeout=0.1)"
    calls = tmp_path / "calls.log"
    subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(AUDIT), "DJINN_AUDIT": str(calls)},
        stderr=subprocess.DEVNULL,
    )

    assert {urlsplit(url).scheme for url in watched.elsewhere()} == {"http", "ws"}
    assert len(called_elsewhere(calls)) >= 1
