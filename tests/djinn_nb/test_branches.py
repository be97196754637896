"""Going back, from a notebook to a real server and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import djinn_nb as djinn
from djinn_nb import Finished, Stopped, errors


def test_step_back_gives_the_stop_before_and_the_same_continuation(session: djinn.Session):
    first = session.run_to(1)
    assert isinstance(first, Stopped)
    value = first.value.numpy()
    end = session.continue_()
    tokens, logits = session.tokens, session.logits

    again = session.step_back()
    assert isinstance(end, Finished) and isinstance(again, Stopped)
    assert (again.location, session.tokens) == (first.location, tokens[: len(session.tokens)])
    assert np.array_equal(again.value.numpy(), value)
    session.continue_()
    assert session.tokens == tokens and np.array_equal(session.logits, logits)


def test_a_stop_from_before_is_stale_until_it_is_returned_to(session: djinn.Session):
    first = session.run_to(1)
    session.next()
    with pytest.raises(errors.StaleStop):
        first.edit(scale=2.0)
    there = session.go_to(first)

    assert isinstance(there, Stopped) and there.number > first.number
    assert there.edit(scale=2.0).elements_changed > 0


def test_rewind_goes_where_it_did_not_stop(session: djinn.Session):
    session.continue_()
    tokens = session.tokens
    stop = session.rewind(2, "layers.0.output")

    assert (stop.forward, stop.location) == (2, "layers.0.output")
    session.continue_()
    assert session.tokens == tokens
    with pytest.raises(errors.BadArgument, match="not been passed"):
        session.rewind(60, 0)


def test_branches_are_a_tree_and_a_table(session: djinn.Session):
    first = session.run_to(0)
    ahead = session.run_to(1)
    session.step_back()
    session.run_to("logits")
    branches = session.branches()
    frame = branches.frame()

    assert list(frame.index) == [node.number for node in branches]
    assert list(frame["parent"].dropna()) == [0, first.number, first.number]
    assert frame["current"].sum() == 1 and frame["location"].iloc[-1] == "logits"
    lines = repr(branches).splitlines()
    assert lines[0] == f"session {session.id}, 4 nodes"
    assert lines[1].startswith("  0: start") and lines[4].startswith(">   4: logits")

    left = session.prune(ahead.number)
    assert [node.number for node in left] == [0, first.number, 4]
    with pytest.raises(errors.UnknownNode):
        session.go_to(ahead)


def test_the_start_can_be_returned_to(session: djinn.Session):
    session.continue_()
    tokens = session.tokens

    assert session.go_to(0) is None
    assert session.status == "waiting"
    session.continue_()
    assert session.tokens == tokens


def test_a_diff_says_where_two_ways_part(session: djinn.Session):
    plain = session.continue_()
    stop = session.rewind(0, 5)
    assert isinstance(stop, Stopped)
    stop.edit(scale=-2.0, tokens=-2)
    edited = session.continue_()
    found = session.diff(plain, edited)
    prompt = len(session.newest.tokens) - 6
    first = found.first_divergence

    assert first is not None
    assert first[:3] == (0, "layers.5.output", prompt - 2)
    assert first.token == stop.tokens[-2].text
    assert found.difference.loc["layers.5.output", prompt - 2] > 0
    assert (found.changed.drop(index="layers.5.output") == 0).all(axis=None)
    assert "\n" not in repr(found) and "layers.5.output, forward 0" in repr(found)
    assert {"forward", "location", "position", "cosine", "kl"} <= set(found.frame().columns)
    axes, bar = found.plot("kl").axes
    assert axes.get_legend() is not None and "nats" in bar.get_ylabel()
    assert found._repr_html_().startswith("<")


def test_a_diff_of_what_did_not_part_says_so(session: djinn.Session, server: djinn.Server):
    stop = session.run_to(2)
    assert isinstance(stop, Stopped)
    child = session.fork()
    found = stop.diff(child)

    assert found.first_divergence is None and found.is_same
    assert "no divergence" in repr(found) and found.tokens.empty
    assert found.plot().axes[0].get_legend() is None
    with pytest.raises(errors.BadArgument, match="'difference', 'cosine' or 'kl'"):
        found.plot("angle")
    with pytest.raises(errors.UnknownNode):
        session.diff(40)
    with pytest.raises(errors.BadArgument):
        session.diff("the start")
    other = server.launch([1, 2, 3], max_new_tokens=2)
    with pytest.raises(errors.NotFinished):
        stop.diff(other)


def test_sessions_of_two_servers_are_not_compared(
    session: djinn.Session, model_folder: Path, tmp_path: Path
):
    from tests.djinn_nb.conftest import Process, make_model

    session.run_to(1)
    for folder, error in (
        (model_folder, errors.NotSupported),
        (make_model(tmp_path / "other", dtype="bfloat16"), errors.WrongModel),
    ):
        process = Process(tmp_path / error.__name__, "--model", str(folder))
        try:
            with process.connect() as elsewhere:
                there = elsewhere.launch([1, 2, 3], max_new_tokens=2)
                there.run_to(1)
                with pytest.raises(error, match="launch both prompts on one"):
                    session.diff(there)
        finally:
            process.end()
