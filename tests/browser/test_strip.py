"""The strip of tokens and the bar of actions in a real browser, as widgets run their scripts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from djinn_nb.panels.scripts import script, style

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

NUM_TOKENS = 2000
#: A widget's model as its script sees it, and the modules as files of the page.
HARNESS = """
const listeners = {};
window.sent = [];
const url = (text) => URL.createObjectURL(new Blob([text], {type: "text/javascript"}));
window.start = async ({scripts, values, data}) => {
  if (values) data.tokens.shown.values = new DataView(Float32Array.from(values).buffer);
  for (const name of Object.keys(scripts)) {
    const model = {
      get: (key) => data[name][key], send: (message) => window.sent.push(message), off() {},
      on: (event, told) => (listeners[name + event] ??= []).push(told),
    };
    const el = document.getElementById(name);
    (await import(url(scripts[name]))).default.render({model, el});
  }
  window.change = (name, key, value) => {
    data[name][key] = value;
    for (const told of listeners[`${name}change:${key}`] ?? []) told();
  };
};
"""


def _strip(count: int) -> dict[str, Any]:
    words = ["When", " Mary", " and", " John", " went", " to", " the", " store", ","]
    return {
        "state": "ready", "text": "", "version": "s1 3 1", "prompt": count - 10, "first": 0,
        "tokens": [words[i % len(words)] for i in range(count)], "ids": list(range(count)),
        "measure": "entropy", "unit": "entropy of the logit lens, nats",
        "location": "layers.20.output", "missing": "of an earlier forward",
        "measures": [["norm", "", ""], ["entropy", "", ""], ["difference", "", "no other node"]],
        "others": [], "other": None,
    }  # fmt: skip


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    made = chromium.new_page(viewport={"width": 1000, "height": 700})
    errors: list[str] = []
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.set_content(
        f"<!doctype html><style>{style()}</style><div id='tokens'></div>"
        f"<div class='djinn-panel'><div id='actions'></div></div><script>{HARNESS}</script>"
    )
    code = "stop = session.next()"
    data = {
        "tokens": {"shown": _strip(NUM_TOKENS), "marks": {"token": 25}},
        "actions": {
            "actions": [{"number": 7, "code": code, "outcome": "done", "error": None}],
            "said": "", "label": "Djinn: tokens",
        },
    }  # fmt: skip
    given = {
        "scripts": {name: script(name) for name in data},
        "values": [1 + i % 50 for i in range(NUM_TOKENS)],
        "data": data,
    }
    made.evaluate(f"window.start({json.dumps(given)})")
    yield made
    made.close()
    assert errors == []


def test_a_token_is_chosen_by_keyboard_and_the_page_shows_it_before_any_answer(page: Page) -> None:
    strip = page.get_by_role("listbox", name="tokens")
    assert page.get_by_role("listbox").get_by_role("option").count() == NUM_TOKENS
    strip.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")

    chosen = strip.get_by_role("option", selected=True)
    sent = page.evaluate("window.sent")
    assert chosen.count() == 1
    assert strip.get_attribute("aria-activedescendant") == chosen.get_attribute("id")
    assert [message["token"] for message in sent[:2]] == [0, 1]
    assert sent[2]["token"] > 10  # a line further down
    assert "entropy of the logit lens, nats" in (chosen.get_attribute("aria-label") or "")


def test_a_choice_made_elsewhere_moves_the_mark_and_sends_nothing(page: Page) -> None:
    page.evaluate("window.change('tokens', 'marks', {token: 1500})")

    chosen = page.get_by_role("listbox").get_by_role("option", selected=True)
    assert (chosen.get_attribute("id") or "").endswith("-1500")
    assert chosen.is_visible()
    assert page.evaluate("window.sent") == []


def test_a_measure_that_cannot_be_chosen_says_why(page: Page) -> None:
    option = page.locator("option", has_text="difference")

    assert option.evaluate("option => option.disabled")
    assert "no other node" in option.inner_text()
    page.get_by_label("colour by").select_option("norm")
    assert page.evaluate("window.sent") == [{"type": "measure", "name": "norm", "other": None}]


def test_a_click_among_two_thousand_tokens_is_painted_soon(page: Page) -> None:
    times = page.evaluate(
        """async () => {
          const options = [...document.querySelectorAll("[role=option].djinn-token")];
          const found = [];
          for (let i = 0; i < 25; i++) {
            const begun = performance.now();
            options[(i * 61) % 250].click();
            await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
            found.push(performance.now() - begun);
          }
          return found;
        }"""
    )

    print(f"click to painted frame, ms: median {statistics.median(times):.1f}, of {len(times)}")
    assert statistics.median(times) <= 100


def test_the_code_is_copied_put_in_a_cell_and_the_panel_has_a_name(page: Page) -> None:
    page.get_by_text("The same as Python").click()
    page.get_by_role("button", name="Insert cell").click()
    page.get_by_role("button", name="Copy code").click()

    assert {"insert": 7} in page.evaluate("window.sent")
    page.get_by_text("copied", exact=True).wait_for()
    assert page.get_by_role("region", name="Djinn: tokens").count() == 1
    page.evaluate("window.change('actions', 'said', 'inserted below the active cell')")
    assert page.get_by_text("inserted below the active cell").is_visible()
