"""The strip of tokens: its numbers are those of the API, and every gap has a reason."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell

import djinn_nb as djinn
from djinn_nb.panels.tokens import TokensPanel
from djinn_nb.panels.tokens_model import MEASURES, NO_OTHER, TokensModel
from djinn_nb.workbench import Workbench, workbench
from tests.djinn_nb.conftest import PROMPT


@pytest.fixture
def bench(make_shell: Callable[[], InteractiveShell], server: djinn.Server) -> Workbench:
    made = workbench(make_shell())
    made.current.bind("server", server)
    return made


@pytest.fixture
def strip(bench: Workbench) -> TokensModel:
    made = TokensModel(bench)
    bench.subscribe(made.follow)
    return made


def until(holds: Callable[[], bool], timeout_s: float = 200.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def ready(strip: TokensModel, **wanted: Any) -> dict[str, Any]:
    def holds() -> bool:
        shown = strip.shown
        return shown["state"] == "ready" and all(shown.get(k) == v for k, v in wanted.items())

    until(holds)
    return strip.shown


def stop_at(bench: Workbench, location: object, **more: Any) -> djinn.Stopped:
    session = bench.current.server.launch(PROMPT, **{"max_new_tokens": 4, **more})
    bench.current.bind("session", session)
    stop = session.run_to(location)
    bench.current.bind("stop", stop)
    return stop


def test_norms_are_those_of_the_stop(bench, strip):
    stop = stop_at(bench, 3)

    shown = ready(strip, location="layers.3.output")

    assert shown["tokens"] == [token.text for token in stop.tokens]
    assert shown["ids"] == stop.session.tokens[: len(shown["tokens"])]
    assert (shown["prompt"], shown["first"], shown["measure"]) == (14, 0, "norm")
    expected = stop.capture().norm.loc["layers.3.output"].to_numpy()
    np.testing.assert_allclose(strip.values(), expected, rtol=1e-6)
    assert "norm" in shown["unit"]


def test_a_layer_chosen_elsewhere_is_followed_as_far_as_the_model_has_run(bench, strip):
    stop = stop_at(bench, 3)
    ready(strip)
    bench.select(layer=1)
    ready(strip, location="layers.1.output")

    expected = stop.capture().norm.loc["layers.1.output"].to_numpy()
    np.testing.assert_allclose(strip.values(), expected, rtol=1e-6)

    bench.select(layer=5)  # not run in this forward
    ready(strip, location="layers.3.output")


@pytest.mark.parametrize(
    ("measure", "column"), [("entropy", "entropy_nats"), ("probability", "probability")]
)
def test_what_the_lens_reads(bench, strip, measure, column):
    stop = stop_at(bench, 2)
    ready(strip)

    strip.take({"type": "measure", "name": measure})

    shown = ready(strip, measure=measure)
    expected = stop.session.lens(2, top_k=1)[column].to_numpy()
    np.testing.assert_allclose(strip.values(), expected, rtol=1e-5)
    assert shown["unit"] == MEASURES[measure]


def test_tokens_of_earlier_forwards_have_norms_and_say_why_they_have_no_lens(bench, strip):
    stop = stop_at(bench, "logits")
    bench.current.bind("stop", stop.session.run_to(2))
    shown = ready(strip, first=14)
    assert np.isfinite(strip.values()).all()

    strip.take({"type": "measure", "name": "entropy"})
    shown = ready(strip, measure="entropy")

    assert np.isnan(strip.values()[:14]).all() and np.isfinite(strip.values()[14:]).all()
    assert "earlier forward" in shown["missing"]


def test_the_difference_to_another_node_is_that_of_the_api_and_names_the_node(bench, strip):
    stop = stop_at(bench, 1)
    shown = ready(strip)
    assert [why for name, _, why in shown["measures"] if name == "difference"] == [NO_OTHER]
    session = stop.session
    bench.current.bind("stop", session.run_to(3))
    first = session.newest.stop_number
    bench.current.bind("stop", session.go_to(stop.number))
    bench.current.stop.edit(scale=0.5, tokens=-1)
    bench.current.bind("stop", session.run_to(3))
    until(lambda: first in [number for number, _ in strip.shown.get("others", [])])

    strip.take({"type": "measure", "name": "difference", "other": first})

    shown = ready(strip, measure="difference", other=first, location="layers.3.output")
    table = session.diff(first, lens=False).difference.loc["layers.3.output"]
    expected = np.full(len(shown["tokens"]), np.nan)
    expected[list(table.index)] = table.to_numpy()
    np.testing.assert_allclose(strip.values(), expected, rtol=1e-6)
    assert strip.values()[-1] > 0
    assert f"node {first}" in dict(map(tuple, shown["others"]))[first]


def test_a_measure_that_there_is_not_is_a_notice_and_changes_nothing(bench, strip):
    stop_at(bench, 2)
    before = ready(strip)
    for wrong in ({"name": "colour"}, {}, {"name": "norm", "other": "x"}):
        strip.take({"type": "measure", **wrong})
        until(lambda: bench.snapshot().notice is not None)
        assert bench.snapshot(fresh=True).notice.code == "BadArgument"
        bench.notify(None)

    assert strip.shown is before


def test_a_token_chosen_is_chosen_for_all(bench, strip):
    stop_at(bench, 2)
    ready(strip)

    strip.take({"type": "select", "token": 5})

    until(lambda: strip.marks.get("token") == 5)
    assert bench.selection.token == 5


def test_the_static_form_has_every_token_a_legend_with_a_unit_and_the_choice(bench):
    stop_at(bench, 2)
    panel = TokensPanel(bench)
    assert panel.body is not None
    until(lambda: panel.picture.shown["state"] == "ready")
    bench.select(token=3)
    until(lambda: panel.picture.marks.get("token") == 3)

    drawn = panel.html(bench.snapshot())

    assert drawn.count("<span title='position") == 14
    assert "L2 norm of the token&#x27;s vector, at layers.2.output" in drawn
    assert drawn.count("outline:2px solid") == 1
    ring = drawn[drawn.index("outline:2px solid") :]
    assert ring.index("background:") > ring.index("<span")  # in the page's ink, not the token's
    panel.close()


def test_two_thousand_tokens_are_ready_soon(bench, strip):
    prompt = [3 + i % 400 for i in range(2000)]
    session = bench.current.server.launch(prompt, max_new_tokens=2)
    bench.current.bind("session", session)
    bench.current.bind("stop", session.run_to(1))

    shown = ready(strip)

    assert len(shown["tokens"]) == len(strip.values()) == 2000
