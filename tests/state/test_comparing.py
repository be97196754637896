"""Two nodes compared: only what differs is run again, as it went, and nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import (
    BadSelector,
    DjinnError,
    NotFinished,
    NotStopped,
    QuotaExceeded,
    UnknownNode,
    UnknownSession,
)
from kernel_server.protocol.location import NOT_STARTED
from kernel_server.state.instructions import ReadTensors, RunStretch
from tests.state.test_scratch import stretches
from tests.state.world import LAYERS, PROMPT, SAMPLED, Limits, World, snapshot


def ask_diff(world: World, one: tuple[str, int], other: tuple[str, int], **more: Any) -> int:
    message = m.ReadDiff(
        session_id=one[0], node=one[1], other_id=other[0], other_node=other[1], **more
    )
    return world.send(message)


def diff(world: World, one: tuple[str, int], other: tuple[str, int], **more: Any) -> ReadTensors:
    request = ask_diff(world, one, other, **more)
    world.work()
    return world.answer_to(request)


@pytest.fixture
def branched(world: World) -> tuple[str, int, int]:
    """A session and two of its ends: one plain, one zeroed after layer 2 of forward 1."""
    sid = world.launch()
    world.run(sid)
    plain = world.session(sid).stop_number
    world.run(sid, m.Rewind, forward=1, location="layers.2.output")
    world.edit(sid, location="layers.2.output")
    world.run(sid)
    return sid, plain, world.session(sid).stop_number


def test_what_differs_is_run_again_by_two_forks_from_the_first_forward_that_does(
    world: World, branched: tuple[str, int, int]
):
    sid, plain, edited = branched
    given = stretches(world)
    answer = diff(world, (sid, plain), (sid, edited))

    by_fork: dict[str, list[RunStretch]] = {}
    for stretch in given:
        by_fork.setdefault(stretch.session_id, []).append(stretch)
    first, second = by_fork.values()
    for runs in (first, second):
        assert [(s.forward, s.point) for s in runs] == [(f, NOT_STARTED) for f in (1, 2, 3)]
        assert [s.until for s in runs] == [SAMPLED, SAMPLED, LAYERS]
        assert all(s.captures is not None and s.captures.what == "stream" for s in runs)
    assert [len(s.edits) for s in first] == [0, 0, 0]
    assert [len(s.edits) for s in second] == [1, 0, 0]
    assert (answer.beside, answer.session_id) == ((first[0].session_id,), second[0].session_id)
    assert (answer.first_token, answer.forward) == (len(PROMPT), 1)
    assert answer.compared is not None and answer.compared.end_token == len(PROMPT) + 3


def test_a_comparison_tells_nobody_and_leaves_nothing(world: World, branched: tuple[str, int, int]):
    sid, plain, edited = branched
    before, kinds = snapshot(world.state.sessions[sid]), world.kinds()
    free = world.state.pool.num_free
    diff(world, (sid, plain), (sid, edited))

    assert snapshot(world.state.sessions[sid]) == before
    assert world.kinds() == kinds and world.state.pool.num_free == free
    assert not world.state.questions
    assert [s.id for s in world.ask(m.ListSessions()).sessions] == [sid]


def test_two_ways_without_a_difference_run_their_last_forward(world: World):
    sid = world.launch()
    world.run(sid)
    first = world.session(sid).stop_number
    world.run(sid, m.Rewind, forward=1, location="layers.2.output")
    world.run(sid)
    given = stretches(world)
    diff(world, (sid, first), (sid, world.session(sid).stop_number))

    assert [(s.forward, s.edits) for s in given] == [(3, ()), (3, ())]


def test_both_run_to_the_last_place_that_both_have_reached(world: World):
    sid = world.launch()
    world.run(sid, m.RunTo, location="layers.1.output")
    early = world.session(sid).stop_number
    world.run(sid)
    given = stretches(world)
    diff(world, (sid, early), (sid, world.session(sid).stop_number))

    assert {(s.forward, s.until) for s in given} == {(0, 2)} and len(given) == 2


def test_an_edit_at_the_stop_where_it_stands_counts(world: World):
    sid = world.launch()
    world.run(sid, m.RunTo, location="layers.1.output")
    child = world.ask(m.Fork(session_id=sid)).session.id
    world.edit(sid, location="layers.1.output")
    given = stretches(world)
    here = (world.session(s).stop_number for s in (sid, child))
    diff(world, (sid, next(here)), (child, next(here)))

    assert [[plan.point for plan in s.edits] for s in given] == [[2], []]


def test_prompts_that_differ_are_run_whole_to_their_common_end(world: World):
    one, other = world.launch(), world.launch((3, 1, 4))
    for sid in (one, other):
        world.run(sid)
    given = stretches(world)
    nodes = [(sid, world.session(sid).stop_number) for sid in (one, other)]
    answer = diff(world, nodes[0], nodes[1])

    end = len(PROMPT[:3]) + 3
    assert answer.compared is not None and answer.compared.end_token == end
    runs = {(s.session_id.split("~")[0], s.forward) for s in given}
    assert runs == {(one, 0), *((other, f) for f in range(4))}


def test_only_the_tokens_asked_for_are_kept(world: World, branched: tuple[str, int, int]):
    sid, plain, edited = branched
    last = m.Selector(kind="indices", indices=(-1,))
    given = stretches(world)
    answer = diff(world, (sid, plain), (sid, edited), tokens=last)

    assert answer.rows == (len(PROMPT) + 2,)
    assert all(s.captures is not None and s.captures.rows == answer.rows for s in given)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"node": 99}, UnknownNode, "no node 99"),
        ({"node": 0}, NotFinished, "before the first layer"),
        ({"other_id": "s77"}, UnknownSession, "s77"),
        (
            {"tokens": m.Selector(kind="indices", indices=(0,))},
            BadSelector,
            "common past",
        ),
        ({"tokens": m.Selector(kind="indices", indices=(70,))}, BadSelector, "outside"),
    ],
)
def test_a_bad_comparison_is_refused_and_changes_nothing(
    world: World,
    branched: tuple[str, int, int],
    change: dict[str, Any],
    error: type[DjinnError],
    words: str,
):
    sid, plain, edited = branched
    asked: dict[str, Any] = {
        "session_id": sid, "node": plain, "other_id": sid, "other_node": edited,
    }  # fmt: skip
    before = snapshot(world.state)[1]
    with pytest.raises(error, match=words):
        world.ask(m.ReadDiff(**(asked | change)))

    after = snapshot(world.state)[1]
    assert after["sessions"] == before["sessions"] and after["pool"] == before["pool"]
    assert not world.state.questions


def test_what_runs_is_not_compared(world: World, branched: tuple[str, int, int]):
    sid, plain, _ = branched
    runs = world.launch()
    world.go(runs)
    with pytest.raises(NotStopped, match="is running"):
        world.ask(m.ReadDiff(session_id=sid, node=plain, other_id=runs, other_node=0))
    world.work()


def test_too_much_to_hold_is_refused_with_numbers():
    world = World(limits=Limits(captured_bytes=3000))
    sid = world.launch()
    world.run(sid)
    here = sid, world.session(sid).stop_number
    world.run(sid, m.Rewind, forward=0, location="embedding")
    world.edit(sid, location="embedding")
    world.run(sid)
    there = sid, world.session(sid).stop_number
    with pytest.raises(QuotaExceeded, match=r"9 tokens at 6 places about 3,456 bytes.*3,000"):
        diff(world, here, there)

    assert diff(world, here, there, tokens=m.Selector(kind="prompt"))
    world.finish_checks()


def test_a_comparison_whose_fork_fails_is_answered_with_why(
    world: World, branched: tuple[str, int, int]
):
    sid, plain, edited = branched
    free = world.state.pool.num_free
    request = ask_diff(world, (sid, plain), (sid, edited))
    world.fail(2)
    world.work()

    with pytest.raises(DjinnError, match="it broke"):
        world.answer_to(request)
    assert world.state.pool.num_free == free and not world.state.questions


def test_sessions_may_end_while_they_are_compared(world: World, branched: tuple[str, int, int]):
    sid, plain, edited = branched
    request = ask_diff(world, (sid, plain), (sid, edited))
    world.ask(m.Terminate(session_id=sid))
    world.work()

    assert isinstance(world.answer_to(request), ReadTensors)
    assert world.state.pool.num_free == world.state.pool.num_pages
