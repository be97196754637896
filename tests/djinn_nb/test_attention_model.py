"""The picture of attention: weights of every head, those of the API; every gap says why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from djinn_nb.panels import attention_model
from djinn_nb.panels.attention import AttentionPanel
from djinn_nb.panels.attention_model import SMALL, AttentionModel, small
from kernel_server.protocol.errors import NotSupported
from tests.djinn_nb.conftest import NUM_LAYERS
from tests.djinn_nb.drawing import Drawn, stop_at, until


def head_of(drawn: Drawn, head: int) -> np.ndarray:
    """All weights `[tokens, keys]` of one head, asked for as a script does."""
    shown, before = drawn.picture.shown, len(drawn.sent)
    drawn.picture.take({"type": "need", "version": shown["version"], "head": head})
    until(lambda: len(drawn.sent) > before)
    message, [values] = drawn.sent[-1]
    assert message == {"type": "head", "head": head, "version": shown["version"]}
    return np.frombuffer(values, np.float32).reshape(shown["count"], shown["keys"])


def maps_of(shown: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(shown["maps"], np.uint8).reshape(len(shown["heads"]), *shown["shape"])


def test_every_head_has_a_map_and_its_weights_are_those_of_the_stop(bench) -> None:
    stop = stop_at(bench, 3)
    drawn = Drawn(AttentionModel, bench)
    shown = drawn.ready(layer=3)
    expected = stop.attention(layer=3)

    assert shown["heads"] == expected.heads == [0, 1, 2, 3]
    assert (shown["first"], shown["count"], shown["keys"]) == (0, 14, 14)
    assert shown["tokens"] == [token.text for token in stop.tokens]
    assert not shown["ahead"]
    for head in shown["heads"]:
        np.testing.assert_array_equal(head_of(drawn, head), expected.weights[:, head])
    found = (maps_of(shown) / 255.0) ** 2
    np.testing.assert_allclose(found, expected.weights.transpose(1, 0, 2), atol=0.005)


def test_a_layer_chosen_is_shown_and_one_that_has_not_run_says_so(bench) -> None:
    stop = stop_at(bench, 2)
    drawn = Drawn(AttentionModel, bench)
    drawn.ready(layer=2)

    drawn.picture.take({"type": "select", "layer": 1})
    assert not drawn.ready(layer=1)["ahead"]
    drawn.picture.take({"type": "select", "layer": 5})
    assert drawn.ready(layer=5)["ahead"]

    np.testing.assert_array_equal(head_of(drawn, 2), stop.attention(layer=5).weights[:, 2])
    assert drawn.picture.marks["num_layers"] == NUM_LAYERS
    assert drawn.picture.marks["of_layer"] == 5
    assert stop.session.refresh().layers_executed == 3  # read beside the session


def test_a_head_that_is_locked_is_chosen_in_every_panel_and_reads_nothing(bench) -> None:
    stop_at(bench, 2)
    drawn = Drawn(AttentionModel, bench)
    first = drawn.ready(layer=2)

    drawn.picture.take({"type": "select", "head": 3})
    until(lambda: drawn.picture.marks.get("head") == 3)
    assert bench.selection.head == 3
    drawn.picture.take({"type": "select", "token": 4})
    until(lambda: drawn.picture.marks.get("token") == 4)
    drawn.picture.take({"type": "select", "head": None})
    until(lambda: drawn.picture.marks.get("head") is None)

    assert drawn.picture.shown is first
    assert bench.selection.token == 4


def test_in_decode_there_is_one_row_over_all_keys(bench) -> None:
    stop = stop_at(bench, "logits").session.run_to(1)
    bench.current.bind("stop", stop)
    drawn = Drawn(AttentionModel, bench)
    shown = drawn.ready()

    assert (shown["first"], shown["count"], shown["keys"]) == (14, 1, 15)
    assert len(shown["tokens"]) == 15
    np.testing.assert_allclose(head_of(drawn, 0).sum(), 1, rtol=1e-5)


def test_of_many_tokens_a_window_is_read_that_follows_the_token_chosen(bench, monkeypatch) -> None:
    monkeypatch.setattr(attention_model, "WINDOW", 8)
    monkeypatch.setattr(attention_model, "STEP", 4)
    stop = stop_at(bench, 1, prompt=[3 + i for i in range(40)])
    drawn = Drawn(AttentionModel, bench)
    drawn.ready(first=32, count=8, keys=40)  # the last ones

    drawn.picture.take({"type": "select", "token": 13})
    shown = drawn.ready(first=10, count=8)

    expected = stop.attention(layer=1, tokens=slice(10, 18)).weights
    np.testing.assert_array_equal(head_of(drawn, 1), expected[:, 1])
    assert shown["keys"] == expected.shape[2]


def test_small_maps_hold_the_largest_weight_of_each_cell() -> None:
    weights = np.zeros((3, 200), np.float32)
    weights[1, 199], weights[2, 3] = 0.75, 0.25

    found = small(weights)

    assert found.shape == (3, SMALL)
    assert found[1, -1] == 0.75 and found[2, :2].max() == 0.25
    assert np.count_nonzero(found) == 2
    assert small(found) is found


def test_an_edit_made_before_is_seen_in_the_weights(bench) -> None:
    stop = stop_at(bench, 1)
    drawn = Drawn(AttentionModel, bench)
    before = drawn.ready(layer=1)["version"]
    drawn.picture.take({"type": "select", "layer": 2})
    plain = drawn.ready(layer=2)
    weights = head_of(drawn, 0)

    stop.edit(scale=-3.0, tokens=4)
    until(lambda: drawn.picture.shown.get("version") not in (before, plain["version"]))
    drawn.ready(layer=2)

    edited = head_of(drawn, 0)
    assert not np.array_equal(edited[4:], weights[4:])
    np.testing.assert_array_equal(edited, stop.attention(layer=2).weights[:, 0])


def test_bad_messages_are_notices_and_questions_of_a_stop_left_are_dropped(bench) -> None:
    stop_at(bench, 2)
    drawn = Drawn(AttentionModel, bench)
    before = drawn.ready()
    version = before["version"]

    for message in (
        {"type": "need", "version": version, "head": 4},
        {"type": "need", "version": version, "head": "0"},
        {"type": "need", "version": version},
        {"type": "select", "head": 99},
        {"type": "maps"},
    ):
        bench.notify(None)
        drawn.picture.take(message)
        assert bench.notice is not None and bench.notice.code == "BadArgument", message
    bench.notify(None)
    drawn.picture.take({"type": "need", "version": "s0 0 0", "head": 0})

    assert bench.notice is None
    assert not drawn.sent
    assert drawn.picture.shown is before


def test_where_the_model_shows_no_weights_that_is_said_and_another_layer_can_be_chosen(
    bench, monkeypatch
) -> None:
    stop = stop_at(bench, 2)
    read = type(stop).attention

    def refuse(self: Any, layer: int, **more: Any) -> Any:
        if layer == 3:
            raise NotSupported("layers.3 shows no attention weights")
        return read(self, layer=layer, **more)

    monkeypatch.setattr(type(stop), "attention", refuse)
    drawn = Drawn(AttentionModel, bench)
    drawn.ready()
    drawn.picture.take({"type": "select", "layer": 3})
    until(lambda: drawn.picture.shown["state"] == "refused")

    assert "shows no attention weights" in drawn.picture.shown["text"]
    assert drawn.picture.marks["num_layers"] == NUM_LAYERS
    drawn.picture.take({"type": "select", "layer": 4})
    drawn.ready(layer=4)


@pytest.mark.parametrize("head", [None, 2])
def test_the_static_form_is_a_picture_that_says_what_it_shows(bench, head) -> None:
    stop_at(bench, 2)
    panel = AttentionPanel(bench)
    assert panel.body is not None
    until(lambda: panel.picture.shown["state"] == "ready")
    bench.select(head=head)
    until(lambda: panel.picture.marks.get("head") == head)

    drawn = panel.html(bench.snapshot())

    assert drawn.count("<img") == 1 and "data:image/png;base64," in drawn
    assert "layers.2.attention.pattern, forward 0: attention weight by head" in drawn
    panel.close()
