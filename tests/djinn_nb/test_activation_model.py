"""The picture of an activation: vectors and figures are those of the API; gaps have reasons."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from djinn_nb.panels.activation import ActivationPanel
from djinn_nb.panels.activation_model import BINS, CHANNELS, ActivationModel, figures
from tests.djinn_nb.conftest import HIDDEN, NUM_LAYERS, PROMPT
from tests.djinn_nb.drawing import Drawn, stop_at, until


def rows_of(shown: dict[str, Any]) -> list[np.ndarray]:
    return [np.frombuffer(one["values"], np.float32) for one in shown["series"]]


def pair(drawn: Drawn, **wanted: Any) -> dict[str, Any]:
    """What is shown, once it is of two."""
    until(lambda: len(drawn.picture.shown.get("series", ())) == 2)
    return drawn.ready(**wanted)


def compare(drawn: Drawn, kind: str, value: object) -> None:
    drawn.picture.take({"type": "against", "kind": kind, "value": value})


def test_the_vector_its_norm_its_histogram_and_its_largest_channels(bench) -> None:
    stop = stop_at(bench, 3)
    drawn = Drawn(ActivationModel, bench)
    shown = drawn.ready(location="layers.3.output", position=13)
    expected = stop.value[13].numpy()

    [row] = rows_of(shown)
    np.testing.assert_array_equal(row, expected)
    assert shown["series"][0]["norm"] == pytest.approx(np.linalg.norm(expected), rel=1e-6)
    assert "layers.3.output, token 13" in shown["series"][0]["name"]
    [counts], edges = shown["bins"]["counts"], shown["bins"]["edges"]
    assert (len(counts), sum(counts)) == (BINS, HIDDEN)
    assert (edges[0], edges[-1]) == pytest.approx((expected.min(), expected.max()))
    assert shown["channels"] == np.argsort(-np.abs(expected), kind="stable")[:CHANNELS].tolist()
    assert shown["cosine"] is None and shown["distance"] is None and shown["unlike"] is None


def test_a_token_and_a_layer_chosen_elsewhere_are_followed_also_ahead(bench) -> None:
    stop = stop_at(bench, 2)
    drawn = Drawn(ActivationModel, bench)
    drawn.ready(location="layers.2.output")

    bench.select(token=4, layer=5)
    shown = drawn.ready(location="layers.5.output", position=4)

    expected = stop.session.capture(5, what="tensor", tokens=4)["layers.5.output"][0]
    np.testing.assert_array_equal(rows_of(shown)[0], expected)
    assert stop.session.refresh().layers_executed == 3


def test_a_tensor_of_the_layer_and_one_head_of_it(bench) -> None:
    stop = stop_at(bench, 2)
    drawn = Drawn(ActivationModel, bench)
    drawn.ready()
    assert {"attention.heads", "mlp.output", "output"} <= set(drawn.picture.marks["sites"])
    assert "attention.pattern" not in drawn.picture.marks["sites"]  # no vector of a token

    drawn.picture.take({"type": "site", "value": "attention.heads"})
    place = "layers.2.attention.heads"
    whole = drawn.ready(location=place)
    expected = stop.session.capture(place, what="tensor", tokens=13)[place][0]
    np.testing.assert_array_equal(rows_of(whole)[0], expected.reshape(-1))
    assert "all 4 heads" in whole["series"][0]["name"]

    bench.select(head=3)
    until(lambda: "head 3" in drawn.picture.shown["series"][0]["name"])
    np.testing.assert_array_equal(rows_of(drawn.ready())[0], expected[3])
    drawn.picture.take({"type": "site", "value": ""})
    drawn.ready(location="layers.2.output")


def test_at_a_stop_inside_a_layer_that_tensor_is_shown(bench) -> None:
    stop = stop_at(bench, "layers.2.mlp.output")
    drawn = Drawn(ActivationModel, bench)

    shown = drawn.ready(location="layers.2.mlp.output")
    np.testing.assert_array_equal(rows_of(shown)[0], stop.value[13].numpy())
    bench.select(layer=1)
    drawn.ready(location="layers.1.mlp.output")


@pytest.mark.parametrize(("kind", "value", "place", "token"), [
    ("token", 4, "layers.2.output", 4), ("layer", 1, "layers.1.output", 13),
])  # fmt: skip
def test_against_another_token_or_layer(bench, kind, value, place, token) -> None:
    stop = stop_at(bench, 2)
    drawn = Drawn(ActivationModel, bench)
    drawn.ready()

    compare(drawn, kind, value)
    shown = pair(drawn)

    one = stop.value[13].numpy().astype(np.float64)
    other = stop.session.capture(place, what="tensor", tokens=token)[place][0].astype(np.float64)
    np.testing.assert_array_equal(rows_of(shown)[1], other.astype(np.float32))
    cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert shown["cosine"] == pytest.approx(cosine)
    assert shown["distance"] == pytest.approx(np.linalg.norm(one - other))
    assert shown["channels"] == np.argsort(-np.abs(one - other), kind="stable")[:CHANNELS].tolist()
    assert f"{place}, token {token}" in shown["series"][1]["name"]
    assert (drawn.picture.marks["against"], drawn.picture.marks["value"]) == (kind, value)


def test_against_a_branch_and_again_when_that_has_moved(bench) -> None:
    stop = stop_at(bench, 2)
    other = stop.session.fork(name="other")
    other.stop.edit(scale=0.5, tokens=-1)
    drawn = Drawn(ActivationModel, bench)
    drawn.ready()
    until(lambda: other.id in drawn.picture.marks["sessions"])
    assert stop.session.id not in drawn.picture.marks["sessions"]

    compare(drawn, "session", other.id)
    shown = pair(drawn)
    one, half = rows_of(shown)
    np.testing.assert_allclose(half, one / 2, rtol=1e-6)
    assert shown["cosine"] == pytest.approx(1)
    assert other.id in shown["series"][1]["name"]
    drawn.picture.take({"type": "select", "layer": 3})
    before = pair(drawn, location="layers.3.output")
    moved = other.run_to(3)
    moved.edit(scale=0.0, tokens=-1)
    other.run_to(4)

    def is_zero() -> bool:
        rows = rows_of(drawn.ready())
        return len(rows) == 2 and not rows[1].any()

    assert rows_of(before)[1].any()
    until(is_zero)


def test_a_session_that_has_gone_says_so_and_nothing_brings_the_vector_back(bench) -> None:
    stop = stop_at(bench, 2)
    other = stop.session.fork()
    drawn = Drawn(ActivationModel, bench)
    drawn.ready()
    until(lambda: other.id in drawn.picture.marks["sessions"])
    compare(drawn, "session", other.id)
    pair(drawn)
    other.terminate()
    until(lambda: drawn.picture.shown["state"] == "refused")

    assert other.id in drawn.picture.shown["text"]
    compare(drawn, "nothing", None)
    assert len(drawn.ready()["series"]) == 1


def test_tokens_of_earlier_forwards_say_why_they_are_not_shown(bench) -> None:
    stop = stop_at(bench, "logits").session.run_to(1)
    bench.current.bind("stop", stop)
    drawn = Drawn(ActivationModel, bench)
    drawn.ready(position=14)

    bench.select(token=3)
    until(lambda: drawn.picture.shown["state"] == "refused")

    assert (
        "token 3 was fed in an earlier forward: this one has token 14 alone"
        in (drawn.picture.shown["text"])
    )
    bench.select(token=None)
    drawn.ready(position=14)


def test_the_logits_are_those_of_the_last_token(bench) -> None:
    stop = stop_at(bench, "logits")
    bench.select(token=2)
    drawn = Drawn(ActivationModel, bench)

    shown = drawn.ready(location="logits", position=13)

    np.testing.assert_array_equal(rows_of(shown)[0], stop.value[-1].numpy())
    compare(drawn, "layer", 2)
    shown = pair(drawn)
    assert "512 and 32 channels: not compared" in shown["unlike"]
    assert shown["cosine"] is None and shown["distance"] is None


def test_bad_messages_are_notices_and_change_nothing(bench) -> None:
    stop = stop_at(bench, 2)
    drawn = Drawn(ActivationModel, bench)
    before = drawn.ready()

    for message in (
        {"type": "site", "value": "attention.pattern"},
        {"type": "site", "value": "mlp"},
        {"type": "site"},
        {"type": "against", "kind": "yesterday"},
        {"type": "against", "kind": "token", "value": None},
        {"type": "against", "kind": "token", "value": True},
        {"type": "against", "kind": "token", "value": 14},
        {"type": "against", "kind": "token", "value": -1},
        {"type": "against", "kind": "layer", "value": NUM_LAYERS},
        {"type": "against", "kind": "layer", "value": "1"},
        {"type": "against", "kind": "session", "value": "nobody"},
        {"type": "against", "kind": "nothing", "value": 1},
        {"type": "against", "kind": []},
        {"type": "channel", "value": 3},
    ):
        bench.notify(None)
        drawn.picture.take(message)
        assert bench.notice is not None and bench.notice.code == "BadArgument", message

    assert drawn.picture.shown is before
    assert (drawn.picture.site, drawn.picture.against) == (None, ("nothing", None))
    assert not stop.session.edits


def test_values_that_are_no_numbers_are_counted_come_first_and_pass_as_json() -> None:
    one = np.float32([1, np.nan, -3, np.inf])
    for series in ([("a", one)], [("a", one), ("b", np.float32([1, 2, 3, 4]))]):
        found = figures(series)

        assert found["num_broken"] == 2
        assert set(found["channels"][:2]) == {1, 3}
        assert sum(found["bins"]["counts"][0]) == 2
        assert found["series"][0]["norm"] is None
        assert found["cosine"] is None and found["distance"] is None
        plain = [{k: v for k, v in each.items() if k != "values"} for each in found["series"]]
        json.dumps({**found, "series": plain}, allow_nan=False)


def test_a_constant_vector_and_one_of_zeros_have_a_histogram_and_no_cosine() -> None:
    found = figures([("a", np.zeros(4, np.float32)), ("b", np.zeros(4, np.float32))])

    assert found["cosine"] is None and found["distance"] == 0
    assert [sum(counts) for counts in found["bins"]["counts"]] == [4, 4]


def test_the_static_form_says_the_norms_and_the_comparison(bench) -> None:
    stop = stop_at(bench, 2, prompt=PROMPT)
    panel = ActivationPanel(bench)
    assert panel.body is not None
    until(lambda: panel.picture.shown["state"] == "ready")
    panel.picture.take({"type": "against", "kind": "token", "value": 2})
    until(lambda: len(panel.picture.shown.get("series", ())) == 2)

    drawn = panel.html(bench.snapshot())

    norm = float(np.linalg.norm(stop.value[13].numpy()))
    assert drawn.count("<img") == 1
    assert f"norm {norm:.4g} (L2)" in drawn
    assert "cosine" in drawn and "distance" in drawn
    panel.close()
