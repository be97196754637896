"""One lab and one browser for the tests of this folder; where a part is missing, they say which."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from scripts import browser as real
from tests.browser.notebooks import PATIENCE_MS

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

AUDIT = Path(__file__).parent / "audit"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say which part is missing, instead of failing in every test."""
    missing = [] if real.chromium_path() else ["no Chromium (apt-get install chromium)"]
    if importlib.util.find_spec("playwright") is None:
        missing.append("no playwright (make setup)")
    if missing:
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(pytest.mark.skip(reason=", ".join(missing)))


@pytest.fixture(scope="session")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes of the lab write down whom they call: a line each, see `audit`."""
    return tmp_path_factory.mktemp("calls") / "calls.log"


@pytest.fixture(scope="session")
def lab(calls: Path) -> Iterator[real.Lab]:
    """What `make lab` starts, its Python processes under audit."""
    paths = os.pathsep.join([str(AUDIT), str(real.ROOT)])
    with real.lab(environment={"PYTHONPATH": paths, "DJINN_AUDIT": str(calls)}) as running:
        yield running


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with real.chromium() as browser:
        yield browser


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    page = chromium.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(PATIENCE_MS)
    yield page
    page.close()
