"""Attention and activation in a real JupyterLab: what they draw is what a cell reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.notebooks import CONNECT, PATIENCE_MS, RUN, open_notebook, run_all

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

    from scripts.browser import Lab

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

#: Of the large map: pixels left of its first key and above its first token, and of a cell.
AXIS, HEAD, CELL = 104, 84, 17
START = [f"{CONNECT}\n%djinn_break 8", RUN]
WEIGHTS = """import json
found = stop.attention().weights
print(json.dumps({"heads": found.shape[1], "first": found[-1, 3, 0], "row": found[-1, 3].max(),
                  "last": stop.tokens[-1].position},
                 default=float))"""
VECTOR = """import json, numpy as np
one, other = (stop.value[i].numpy().astype(float) for i in (-1, 4))
print(json.dumps({"norm": np.linalg.norm(one), "largest": np.abs(one).argmax(), "last": one[-1],
                  "width": len(one), "token": stop.tokens[-1].position,
                  "unlike": np.abs(one - other).argmax(),
                  "cosine": one @ other / np.linalg.norm(one) / np.linalg.norm(other)},
                 default=float))"""


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    page = chromium.new_page(viewport={"width": 1400, "height": 2600})  # every output in sight
    page.set_default_timeout(PATIENCE_MS)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert errors == []


def view(page: Page, name: str) -> Locator:
    return page.locator(f".djinn-panel[aria-label='Djinn: {name}']")


def printed(page: Page) -> dict[str, Any]:
    """What the cell of figures read by the public API."""
    text = page.locator(".jp-OutputArea-output pre", has_text='{"').inner_text()
    found: dict[str, Any] = json.loads(text)
    return found


def number(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-"))


def until_painted(canvas: Locator, more_than: int = 0) -> None:
    """Wait until a canvas has more pixels than that which are not empty."""
    canvas.page.wait_for_function(
        """([canvas, least]) => canvas.getContext("2d")
             .getImageData(0, 0, canvas.width, canvas.height)
             .data.filter((value, index) => index % 4 === 3 && value > 0).length > least""",
        arg=[canvas.element_handle(), more_than],
    )


def test_a_head_is_hovered_chosen_and_followed_by_the_other_panel(lab: Lab, page: Page):
    open_notebook(
        lab, page, "attention.ipynb", *START, WEIGHTS,
        "%djinn_panel attention", "%djinn_panel activation",
    )  # fmt: skip
    run_all(page, 5)
    attention, activation = view(page, "attention"), view(page, "activation")
    expected = printed(page)
    last = int(expected["last"])
    heads = attention.get_by_role("group", name="heads").get_by_role("button")
    heads.first.wait_for()
    assert heads.count() == expected["heads"]
    for i in range(expected["heads"]):
        until_painted(heads.nth(i).locator("canvas"))
    activation.get_by_label("tensor of the layer").select_option("attention.heads")
    activation.get_by_text("layers.8.attention.heads, all").wait_for()

    heads.nth(3).hover()
    attention.get_by_text("Head 3 of layer 8, none is chosen").wait_for()
    attention.get_by_text(re.compile(r"^head 3: token .* → key .*: weight about")).wait_for()
    heads.nth(3).click()
    attention.get_by_text("Head 3 of layer 8, chosen").wait_for()
    activation.get_by_text(f"layers.8.attention.heads, head 3, token {last}").first.wait_for()
    assert heads.nth(3).get_attribute("aria-pressed") == "true"
    heads.nth(5).hover()  # what is chosen stays
    attention.get_by_text(re.compile(r"^head 5: token ")).wait_for()
    assert attention.get_by_text("Head 3 of layer 8, chosen").is_visible()

    large = attention.get_by_role("group", name="the head's weights")
    large.hover(position={"x": AXIS + CELL // 2, "y": HEAD + last * CELL + CELL // 2})
    told = attention.get_by_text(re.compile(rf"^head 3 · token {last} .* → key 0 .*: weight "))
    told.wait_for()
    weight, most = re.findall(r"weight (\S+) .* most: \d+ .*? ([\d.]+)(?:, |$)", told.inner_text())[
        0
    ]
    assert number(weight) == pytest.approx(expected["first"], rel=0.01)
    assert number(most) == pytest.approx(expected["row"], abs=0.001)
    large.click(position={"x": AXIS + CELL // 2, "y": HEAD + 5 * CELL + CELL // 2})
    activation.get_by_text("layers.8.attention.heads, head 3, token 5").first.wait_for()

    page.keyboard.press("Escape")
    attention.get_by_text(re.compile("of layer 8, none is chosen")).wait_for()
    activation.get_by_text("layers.8.attention.heads, all").wait_for()
    attention.get_by_label("layer", exact=True).select_option("2")
    attention.get_by_text(re.compile("of layer 2, none is chosen")).wait_for()
    activation.get_by_text("layers.2.attention.heads, all").wait_for()


def test_a_vector_its_histogram_its_channels_and_against_another_token(lab: Lab, page: Page):
    open_notebook(lab, page, "activation.ipynb", *START, VECTOR, "%djinn_panel activation")
    run_all(page, 4)
    activation, expected = view(page, "activation"), printed(page)
    activation.get_by_text(f"layers.8.output, token {expected['token']:.0f}").wait_for()
    words = activation.get_by_text(re.compile(r"^norm \S+ \(L2\)"))
    norm = re.findall(r"norm (\S+)", words.inner_text())[0]
    assert number(norm) == pytest.approx(expected["norm"], rel=0.01)
    line = activation.get_by_role("img", name="values over channels")
    bars = activation.get_by_role("img", name=f"histogram of {expected['width']:.0f} values")
    bars.wait_for()  # it has its name when it is drawn
    until_painted(line, 500)
    until_painted(bars, 500)
    rows = activation.get_by_role("table").locator("tbody tr")
    assert rows.count() == 12
    assert rows.first.get_by_role("rowheader").inner_text() == f"{expected['largest']:.0f}"

    line.focus()
    page.keyboard.press("End")
    last = f"channel {expected['width'] - 1:.0f} of {expected['width']:.0f}: "
    told = activation.get_by_text(re.compile(f"^{last}"))
    told.wait_for()
    value = number(told.inner_text().removeprefix(last))
    assert value == pytest.approx(expected["last"], rel=0.01)

    activation.get_by_label("compared with").select_option("token")
    activation.get_by_text("layers.8.output, token 0").wait_for()
    activation.get_by_label("which one").select_option("4")
    activation.get_by_text("layers.8.output, token 4").wait_for()
    activation.get_by_text(f"cosine {expected['cosine']:.4f}").wait_for()
    assert activation.get_by_text("channels that differ most").is_visible()
    assert rows.first.get_by_role("rowheader").inner_text() == f"{expected['unlike']:.0f}"
    assert rows.first.get_by_role("cell").count() == 3
    activation.get_by_label("compared with").select_option("nothing")
    activation.get_by_text("channels of the largest magnitude").wait_for()
