"""View models of pictures: what they show of a stop, and what a message to them does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from djinn_nb.panels import layers_model
from djinn_nb.panels.activation_model import ActivationModel
from djinn_nb.panels.attention_model import AttentionModel
from djinn_nb.panels.layers_model import LayersModel
from tests.djinn_nb.conftest import NUM_LAYERS, PROMPT
from tests.djinn_nb.drawing import Drawn, stop_at, until

KINDS = [LayersModel, AttentionModel, ActivationModel]

# -- every picture --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_without_a_stop_says_why_and_what_to_do(bench, kind) -> None:
    drawn = Drawn(kind, bench)
    texts = lambda: drawn.picture.shown["text"]  # noqa: E731

    until(lambda: "no session yet" in texts())
    session = bench.current.server.launch(PROMPT, max_new_tokens=1)
    bench.current.bind("session", session)
    until(lambda: "has not begun" in texts())
    bench.current.bind("stop", session.continue_())
    until(lambda: "is finished: go back" in texts())
    assert drawn.picture.shown["state"] == "empty"


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_drawn_anew_after_an_edit_and_a_step_and_not_otherwise(bench, kind) -> None:
    stop = stop_at(bench, 2)
    drawn = Drawn(kind, bench)
    first = drawn.ready()
    bench.select(token=3)
    until(lambda: drawn.picture.marks.get("token") == 3)
    bench.select(layer=1, head=2)
    until(lambda: drawn.picture.marks.get("head") == 2)

    if kind is LayersModel:
        assert drawn.picture.shown is first  # a choice is a mark, and reads nothing
    until(lambda: not drawn.picture.marks["reading"])
    version = drawn.ready()["version"]
    stop.edit(scale=0.5)
    until(lambda: drawn.picture.shown.get("version", version) != version)
    edited = drawn.ready()["version"]
    bench.current.bind("stop", stop.session.next())
    until(lambda: drawn.picture.shown.get("version", edited) != edited)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_message_is_a_notice_and_changes_nothing(bench, kind) -> None:
    stop = stop_at(bench, 2)
    drawn = Drawn(kind, bench)
    drawn.ready()
    before = stop.session.refresh().revision
    for message in (
        None,
        {"type": "nothing"},
        {"type": "select", "layer": NUM_LAYERS},
        {"type": "select", "token": "3"},
        {"type": "do", "verb": "terminate", "given": {}},
        {"type": "do", "verb": "run_to", "given": {"location": "layers.99.output"}},
        {"type": "do", "verb": "run_to", "given": {"nowhere": 1}},
    ):
        bench.notify(None)
        drawn.picture.take(message)
        assert bench.notice is not None, message

    assert stop.session.refresh().revision == before
    assert not bench.actions


# -- layers × tokens ------------------------------------------------------------------------------


def test_norms_of_all_tokens_and_rows_that_have_not_run(bench) -> None:
    stop = stop_at(bench, 3)
    drawn = Drawn(LayersModel, bench)
    shown = drawn.ready()
    norm = drawn.picture.norms()

    assert shown["rows"] == ["embedding", *(f"layers.{i}.output" for i in range(NUM_LAYERS))]
    assert shown["tokens"] == [token.text for token in stop.tokens]
    assert (shown["first"], shown["reached"]) == (0, 5)
    assert shown["stop"]["row"] == 4 and shown["stop"]["location"] == "layers.3.output"
    np.testing.assert_allclose(norm[4], stop.value.summary().norm_per_token, rtol=1e-5)
    assert np.isnan(norm[5:]).all() and np.isfinite(norm[:5]).all()


def test_in_decode_earlier_tokens_keep_their_whole_columns(bench) -> None:
    stop = stop_at(bench, "logits")
    stop = stop.session.run_to(2)
    bench.current.bind("stop", stop)
    drawn = Drawn(LayersModel, bench)
    shown = drawn.ready()
    norm = drawn.picture.norms()

    assert stop.forward == 1 and shown["first"] == norm.shape[1] - 1 == stop.tokens[0].position
    assert np.isfinite(norm[:, :-1]).all()
    assert np.isfinite(norm[:4, -1]).all() and np.isnan(norm[4:, -1]).all()
    message, _ = drawn.tile(0)
    assert (message["first"], message["count"], message["rows"]) == (shown["first"], 1, 4)


def test_a_tile_of_the_lens_is_what_the_stop_reads(bench, monkeypatch) -> None:
    monkeypatch.setattr(layers_model, "TILE_TOKENS", 5)
    stop = stop_at(bench, 3)
    drawn = Drawn(LayersModel, bench)
    drawn.ready(tile=5)

    message, (shares, entropy) = drawn.tile(1)

    assert (message["first"], message["count"], message["rows"]) == (5, 5, 5)
    here = stop.lens(top_k=3, tokens=slice(5, 10))
    texts = np.array(message["texts"], object).reshape(5, 5, 3)
    assert texts[4].reshape(-1).tolist() == here.text.tolist()
    found = np.frombuffer(shares, np.float32).reshape(5, 5, 3)
    np.testing.assert_allclose(found[4].reshape(-1), here.probability, rtol=1e-4)
    assert np.frombuffer(entropy, np.float32).shape == (25,)


def test_a_tile_is_read_once_per_stop_and_those_of_a_stop_left_are_not_told(
    bench, monkeypatch
) -> None:
    stop = stop_at(bench, 3)
    drawn = Drawn(LayersModel, bench)
    old = drawn.ready()["version"]
    first = drawn.tile(0)
    asked: list[object] = []
    ask = bench.ask
    monkeypatch.setattr(bench, "ask", lambda *given: (asked.append(given[0]), ask(*given)))

    assert drawn.tile(0)[0] is first[0] and not asked
    bench.current.bind("stop", stop.session.next())
    until(lambda: drawn.picture.shown.get("version", old) != old)
    drawn.ready()
    asked.clear()
    drawn.picture.take({"type": "need", "version": old, "tile": 0})
    assert not asked
    assert drawn.tile(0)[0]["rows"] == 6
    drawn.picture.take({"type": "need", "version": drawn.ready()["version"], "tile": 9})
    assert "no tile 9" in bench.notice.text


def test_a_long_prompt_has_tiles_that_the_server_takes(bench) -> None:
    stop_at(bench, 1, prompt=[5] * 2000)
    drawn = Drawn(LayersModel, bench)
    shown = drawn.ready()

    assert len(shown["tokens"]) == 2000 and shown["tile"] * shown["reached"] <= 4096
    message, _ = drawn.tile(1999 // shown["tile"])
    assert message["first"] + message["count"] == 2000


def test_a_cell_sets_a_breakpoint_runs_there_and_goes_back(bench) -> None:
    stop = stop_at(bench, 1)
    drawn = Drawn(LayersModel, bench)
    drawn.ready()

    def do(verb: str, **given: Any) -> None:
        drawn.picture.take({"type": "do", "verb": verb, "given": given})

    do("toggle_breakpoint", location="layers.4.output")
    until(lambda: drawn.picture.marks["breakpoints"] == ["layers.4.output"])
    do("run_to", location="layers.3.output")
    until(lambda: drawn.picture.shown.get("reached") == 5)
    do("rewind", forward=0, location="layers.0.output")
    until(lambda: drawn.picture.shown.get("reached") == 2)

    assert stop.session.location == "layers.0.output"
    assert [one.code for one in bench.snapshot().actions] == [
        "%djinn_break layers.4.output", "stop = session.run_to(3)", "stop = session.rewind(0, 0)",
    ]  # fmt: skip
    drawn.picture.take({"type": "select", "layer": 2, "token": 4})
    assert (bench.selection.layer, bench.selection.token) == (2, 4)
