"""Which token stands for which, and a score between two runs."""

from __future__ import annotations

import numpy as np
import pytest

import djinn_nb as djinn
from djinn_nb import errors
from djinn_nb.metrics import LogitDifference, OnText, Probability
from tests.djinn_nb.conftest import PROMPT

CORRUPT = PROMPT.replace("When Mary and John", "When Anna and John")


def test_prompts_of_one_length_are_paired_by_position() -> None:
    found = djinn.align([5, 6, 7], [5, 9, 7])

    assert found.same_length
    assert found.positions == {0: 0, 1: 1, 2: 2}
    assert found.differs == [1]
    assert found.note is None
    assert found.to_corrupt(-1) == 2


def test_a_shift_inside_prompts_of_one_length_is_told() -> None:
    found = djinn.align([1, 2, 3, 4, 5, 9], [7, 1, 2, 3, 4, 5])

    assert found.positions[3] == 3
    assert found.note is not None and "5 equal ones stand at other positions" in found.note
    assert "note: both have 6 tokens" in repr(found)


def test_prompts_of_other_lengths_are_paired_by_equal_runs() -> None:
    found = djinn.align([1, 2, 3, 4, 5, 6], [1, 2, 8, 9, 4, 7, 6])

    assert found.positions == {0: 0, 1: 1, 3: 4, 4: 5, 5: 6}
    assert found.differs == [2, 4]
    assert found.note == "the lengths differ: 3 tokens have no counterpart"
    with pytest.raises(
        errors.BadSelector, match="position 2 of the clean prompt has no counterpart"
    ):
        found.to_corrupt(2)
    with pytest.raises(errors.BadSelector, match="outside the 6 tokens"):
        found.to_corrupt(6)


def test_prompts_with_nothing_in_common_are_aligned_and_it_is_told() -> None:
    assert djinn.align([1, 2], [3, 4]).note == "no token is the same in both prompts"
    assert djinn.align([1, 2], [3]).positions == {}


def test_texts_and_sessions_are_aligned_by_the_models_tokens(server: djinn.Server) -> None:
    by_text = djinn.align(PROMPT, CORRUPT, model=server.model)
    one, two = (server.launch(p, max_new_tokens=2) for p in (PROMPT, CORRUPT))
    one.continue_()

    assert djinn.align(one, two) == by_text
    (row,) = [row for row in by_text if row.differs]
    assert (row.clean_text, row.corrupt_text) == (" Mary", " Anna")
    frame = by_text.frame()
    assert list(frame.columns) == ["clean", "corrupt", "clean_text", "corrupt_text", "differs"]
    assert int(frame.differs.sum()) == 1


def test_what_cannot_be_aligned_is_refused() -> None:
    with pytest.raises(errors.BadPrompt, match=r"model=server.model"):
        djinn.align("a", "b")
    with pytest.raises(errors.BadPrompt, match="empty"):
        djinn.align([], [1])
    with pytest.raises(errors.BadPrompt, match="a text, a list of token ids or a session"):
        djinn.align([1], 3.5)


def test_a_score_is_0_in_the_corrupt_run_and_1_in_the_clean_one() -> None:
    clean, corrupt = np.zeros(4, np.float32), np.zeros(4, np.float32)
    clean[1], corrupt[1] = 3.0, -1.0
    pair = djinn.Pair(clean, corrupt, LogitDifference(1, 2))

    assert (pair.clean_value, pair.corrupt_value) == (3.0, -1.0)
    assert [pair.score(value) for value in (-1.0, 3.0, 1.0, 7)] == [0.0, 1.0, 0.5, 2.0]
    assert pair.score(clean) == 1.0


def test_runs_that_the_metric_does_not_tell_apart_have_no_score() -> None:
    clean = np.zeros(4, np.float32)
    with pytest.raises(errors.BadArgument, match="0 in the clean run and 0 in the corrupt one"):
        djinn.Pair(clean, clean, LogitDifference(1, 2))
    small = clean.copy()
    small[1] = 20.0
    assert djinn.Pair(clean, small, Probability(3)).score(0.25) == 1.0


def test_a_pair_of_prompts_is_run_once_and_leaves_no_session(server: djinn.Server) -> None:
    pair = djinn.Pair(PROMPT, CORRUPT, LogitDifference(" Mary", " John"))
    with pytest.raises(errors.NotFinished, match=r"pair.measure\(server\)"):
        pair.score(1.0)

    assert pair.measure(server) is pair
    assert len(server.sessions()) == 0
    session = server.launch(PROMPT, max_new_tokens=1)
    session.continue_()
    assert pair.score(session.logits) == 1.0
    assert pair.alignment is not None and len(pair.alignment.differs) == 1


def test_a_pair_is_judged_by_logits() -> None:
    with pytest.raises(errors.BadArgument, match="metric of logits"):
        djinn.Pair([1], [2], OnText(len))
