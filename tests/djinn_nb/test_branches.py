"""Going back, from a notebook to a real server and back."""

from __future__ import annotations

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
