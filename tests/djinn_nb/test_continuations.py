"""Continuations from one stop: exact, in pairs of one seed, and leaving nothing behind."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import djinn_nb as djinn
from djinn_nb import errors
from tests.djinn_nb.conftest import HIDDEN, PROMPT

EDIT = {"add": np.full(HIDDEN, 2.0), "tokens": -1}


@pytest.fixture
def stop(server: djinn.Server) -> djinn.Stopped:
    session = server.launch(PROMPT, max_new_tokens=5)
    session.break_at("layers.1.output")
    found = session.run_to("layers.3.output")
    while found.location != "layers.3.output":
        found = session.run_to("layers.3.output")
    return found


def test_each_is_the_run_that_a_fork_with_that_seed_makes(stop: djinn.Stopped) -> None:
    frame = stop.continuations(3, seed=7, temperature=1.5, edit=EDIT)

    assert list(frame.columns) == ["arm", "seed", "text", "tokens", "token_ids", "differs_at"]
    assert list(frame.arm) == ["before", "after"] * 4
    assert frame.seed.isna().sum() == 2
    assert frame.seed.dropna().tolist() == [7, 7, 8, 8, 9, 9]
    session = stop.session
    for seed, temperature in ((None, 0.0), (8, 1.5)):
        for arm in ("before", "after"):
            child = session.fork(seed=seed, temperature=temperature)
            [point.remove() for point in child.breakpoints]
            if arm == "after":
                child.stop.edit(**EDIT)
            end = child.continue_()
            same = frame.seed.isna() if seed is None else frame.seed == seed
            row = frame[same & (frame.arm == arm)].iloc[0]
            assert list(row.token_ids) == end.generated_tokens
            assert (row.text, row.tokens) == (end.generated_text, 5)
            child.terminate()


def test_pairs_say_where_they_part(stop: djinn.Stopped) -> None:
    frame = stop.continuations(4, seed=1, edit=[EDIT, {"scale": 1.0}])

    assert frame[frame.arm == "before"].differs_at.isna().all()
    prompt = len(stop.session.tokens)
    for number in range(0, len(frame), 2):
        before, after = frame.iloc[number], frame.iloc[number + 1]
        pairs = list(zip(before.token_ids, after.token_ids, strict=True))
        parted = [prompt + i for i, (one, two) in enumerate(pairs) if one != two]
        if parted:
            assert after.differs_at == parted[0]
        else:
            assert pd.isna(after.differs_at)
    assert frame.differs_at.notna().any()
    same = stop.continuations(1, seed=1, edit={"scale": 1.0})
    assert same.differs_at.isna().all()


def test_the_session_stays_where_it_is_and_no_fork_is_left(
    server: djinn.Server, stop: djinn.Stopped
) -> None:
    before = stop.value.numpy()

    stop.continuations(2, edit=EDIT)

    assert len(server.sessions()) == 1
    assert stop.session.stop.number == stop.number
    assert len(stop.session.breakpoints) == 1 and stop.session.edits == []
    np.testing.assert_array_equal(stop.value.numpy(), before)


def test_without_an_edit_there_is_one_arm_and_max_new_tokens_is_of_the_whole(
    stop: djinn.Stopped,
) -> None:
    frame = stop.continuations(2, max_new_tokens=9)

    assert list(frame.arm) == ["before"] * 3
    assert set(frame.tokens) == {9}
    assert len(stop.continuations(0)) == 1


@pytest.mark.parametrize(
    ("wishes", "error", "words"),
    [
        ({"n": -1}, errors.BadArgument, "n is a whole number"),
        ({"n": 2000}, errors.BadArgument, "at most 1000"),
        ({"n": 1, "temperature": 0}, errors.BadArgument, "the greedy one is always there"),
        ({"n": 1, "top_p": 2.0}, errors.BadArgument, "top_p is 2.0"),
        ({"n": 1, "max_new_tokens": 0}, errors.BadArgument, "max_new_tokens"),
        ({"n": 1, "edit": "scale"}, errors.BadArgument, "edit is a dict"),
        ({"n": 1, "edit": []}, errors.BadArgument, "edit is a dict"),
        ({"n": 1, "edit": {"scale": 1, "add": 1}}, errors.BadEdit, "exactly one"),
        ({"n": 1, "edit": {"scale": 2, "tokens": 900}}, errors.DjinnError, "900"),
    ],
)
def test_a_wrong_wish_is_refused_and_leaves_no_fork(
    server: djinn.Server, stop: djinn.Stopped, wishes: dict, error: type, words: str
) -> None:
    with pytest.raises(error, match=words):
        stop.continuations(**wishes)
    assert len(server.sessions()) == 1


def test_an_interrupt_leaves_no_fork(
    server: djinn.Server, stop: djinn.Stopped, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(session: djinn.Session) -> None:
        assert len(server.sessions()) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr("djinn_nb.runs.run_out", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stop.continuations(2)
    assert len(server.sessions()) == 1


def test_a_stop_that_has_passed_is_stale(server: djinn.Server, stop: djinn.Stopped) -> None:
    stop.session.next()

    with pytest.raises(errors.StaleStop, match="has moved on since stop"):
        stop.continuations(1)
    assert len(server.sessions()) == 1


def test_a_fork_draws_as_it_is_told(server: djinn.Server) -> None:
    session = server.launch(PROMPT, max_new_tokens=4)
    session.run_to("logits")

    hot = session.fork(seed=3, temperature=3.0, top_p=0.9, max_new_tokens=6)
    alone = server.launch(PROMPT, max_new_tokens=6, seed=3, temperature=3.0, top_p=0.9)

    assert hot.continue_().tokens == alone.continue_().tokens
    assert len(session.continue_().generated_tokens) == 4
