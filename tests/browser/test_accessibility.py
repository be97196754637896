"""What axe finds in the sidebar, the banner, the stop card and every panel, in both themes.

axe looks for what keeps out readers with a screen reader, a keyboard or poor sight: missing names,
wrong roles, poor contrast. Only our own elements are looked at, JupyterLab's are its own.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from djinn_nb.panels import PANELS
from tests.browser.notebooks import (
    CONNECT,
    PATIENCE_MS,
    RUN,
    open_notebook,
    panel,
    run_all,
    sidebar,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

    from scripts.browser import Lab

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

THEMES = ("JupyterLab Light", "JupyterLab Dark")
GRAVE = ("serious", "critical")
SIDEBAR, BANNER = "#djinn-nb-sidebar", ".jp-Djinn-banner"
STOP_CARD, PANEL_CELL = ".jp-OutputArea [role=region]", ".jp-OutputArea:has(.djinn-panel)"


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    page = chromium.new_page(viewport={"width": 1600, "height": 1100})
    page.set_default_timeout(PATIENCE_MS)
    yield page
    page.close()


@pytest.fixture(params=THEMES, ids=["light", "dark"])
def theme(request: pytest.FixtureRequest, lab: Lab) -> Iterator[str]:
    """The lab in a theme; afterwards in the one it had."""
    _set_theme(lab, request.param)
    yield request.param
    _set_theme(lab, THEMES[0])


def _set_theme(lab: Lab, theme: str) -> None:
    request = urllib.request.Request(
        f"{lab.address}/lab/api/settings/@jupyterlab/apputils-extension:themes",
        data=json.dumps({"raw": json.dumps({"theme": theme})}).encode(),
        headers={"Authorization": f"token {lab.token}", "Content-Type": "application/json"},
        method="PUT",
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 204


def _findings(page: Page, context: str) -> list[dict[str, Any]]:
    """What axe has against the elements of a selector, and that it did look at some."""
    from axe_playwright_python.sync_playwright import Axe

    assert page.locator(context).count(), f"nothing is {context}"
    response = Axe().run(page, context=context).response
    assert len(response["passes"]) > 3, f"axe looked at nothing in {context}"
    return list(response["violations"])


def _grave(page: Page, context: str) -> list[str]:
    """The findings that keep somebody from using it, a line each."""
    return [
        f"{context}: {found['id']} ({found['impact']}): {node['html'][:200]}"
        for found in _findings(page, context)
        if found["impact"] in GRAVE
        for node in found["nodes"]
    ]


def _headers(page: Page) -> Locator:
    return page.locator(f"{PANEL_CELL} .jupyter-widget-Collapse-header")


def _stop_with_panels(lab: Lab, page: Page, name: str) -> None:
    open_notebook(lab, page, name, f"{CONNECT}\n%djinn_break 8", RUN, "%djinn_panel")
    run_all(page, 3)
    sidebar(page).get_by_text("stopped at layers.8.output").first.wait_for()
    panel(page).get_by_text("stopped at layers.8.output").first.wait_for()


def test_nobody_is_kept_out_of_the_sidebar_and_the_panels(lab: Lab, page: Page, theme: str):
    _stop_with_panels(lab, page, f"axe {theme}.ipynb")
    is_light = page.locator("body").get_attribute("data-jp-theme-light")
    assert is_light == str(theme.endswith("Light")).lower()

    found = [line for part in (SIDEBAR, BANNER, STOP_CARD) for line in _grave(page, part)]
    headers = _headers(page)
    assert headers.count() == len(PANELS)
    for i, name in enumerate(PANELS):
        if i:  # the first is open
            headers.nth(i).click()
        shown = page.get_by_role("region", name=f"Djinn: {name}", exact=True)
        shown.wait_for()
        if (drawn := shown.locator("canvas, [role=listbox], [role=grid]")).count():
            drawn.first.wait_for()
        found += _grave(page, PANEL_CELL)

    assert found == []


def test_a_sidebar_that_has_nothing_to_show_keeps_nobody_out(lab: Lab, page: Page, theme: str):
    open_notebook(lab, page, f"axe nothing {theme}.ipynb", "%load_ext djinn_nb")
    side = sidebar(page)
    side.get_by_role("button", name="Load djinn_nb").wait_for()
    found = _grave(page, SIDEBAR)
    run_all(page, 1)
    side.get_by_text("This notebook is not connected to a server").wait_for()
    side.get_by_role("button", name="Another server…").click()
    side.get_by_role("form").wait_for()

    assert found + _grave(page, SIDEBAR) == []


def test_a_button_without_a_name_would_be_found(lab: Lab, page: Page):
    """The control: what the tests above are to find is found."""
    open_notebook(lab, page, "axe control.ipynb", f"{CONNECT}\n%djinn_panel sessions")
    run_all(page, 1)
    sidebar(page).get_by_role("heading", name="Layers").wait_for()
    panel(page).get_by_role("button", name="Launch").wait_for()
    for place in (SIDEBAR, ".djinn-panel"):
        assert _grave(page, place) == []

        page.locator(place).evaluate(
            "one => one.append(Object.assign(document.createElement('button'), {id: 'planted'}))"
        )

        [line] = _grave(page, place)
        assert "button-name (critical)" in line and "planted" in line
        page.locator("#planted").evaluate("one => one.remove()")


def test_every_section_of_the_panels_opens_by_key_and_says_whether_it_is_open(lab: Lab, page: Page):
    _stop_with_panels(lab, page, "axe keys.ipynb")
    headers = _headers(page)

    for i, key in ((2, "Enter"), (8, "Space")):
        header = headers.nth(i)
        assert header.get_attribute("aria-expanded") == "false"
        header.focus()
        page.keyboard.press(key)
        name = list(PANELS)[i]
        page.get_by_role("region", name=f"Djinn: {name}", exact=True).wait_for()
        page.wait_for_function(
            "one => one.getAttribute('aria-expanded') === 'true'", arg=header.element_handle()
        )
