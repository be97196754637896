"""Scratch forks: questions about a stop are computed beside it, and leave nothing behind."""

from __future__ import annotations

from typing import Any

import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import (
    BadArgument,
    BadEdit,
    BadSelector,
    DjinnError,
    NotSupported,
    QuotaExceeded,
    StaleStop,
)
from kernel_server.protocol.location import NOT_STARTED, final_norm_point, inner_point
from kernel_server.state import scratch
from kernel_server.state.instructions import ReadTensors, RunStretch
from tests.state.world import LOGITS, Limits, World, snapshot


@pytest.fixture
def stopped(world: World) -> str:
    """A session at layers.2.output of its prefill, with one edit there."""
    sid = world.launch()
    world.run(sid, m.RunTo, location="layers.2.output")
    world.edit(sid, kind="zero", location="layers.2.output")
    return sid


def zero(location: str, **more: Any) -> m.EditSpec:
    return m.EditSpec(kind="zero", location=location, **more)


def ask(world: World, kind: type, session_id: str, **what: Any) -> ReadTensors:
    """Send a question and let the engine work; returns what the engine is to answer from."""
    seen = world.session(session_id).stop_number
    request = world.send(kind(session_id=session_id, seen=seen, **what))
    world.work()
    return world.answer_to(request)


def stretches(world: World) -> list[RunStretch]:
    """Keep every stretch that the engine is given from now on."""
    given: list[RunStretch] = []
    begin = world.engine.begin

    def noting(stretch: RunStretch) -> None:
        given.append(stretch)
        begin(stretch)

    world.engine.begin = noting  # type: ignore[method-assign]
    return given


def test_a_preview_runs_with_and_without_the_edits_and_tells_nobody(world: World, stopped: str):
    before = snapshot(world.state.sessions[stopped])
    kinds, free, given = world.kinds(), world.state.pool.num_free, stretches(world)
    answer = ask(
        world, m.Preview, stopped, edits=(zero("layers.2.output"), zero("layers.3.middle"))
    )

    plain, edited = given
    assert (plain.point, plain.until, plain.edits) == (3, LOGITS, ())
    assert [plan.point for plan in edited.edits] == [inner_point(3, "middle")]
    assert answer.session_id == edited.session_id and answer.beside == (plain.session_id,)
    assert len(answer.changed) == 2 and all(answer.changed)
    assert snapshot(world.state.sessions[stopped]) == before
    assert world.kinds() == kinds
    assert world.state.pool.num_free == free
    listed = world.ask(m.ListSessions()).sessions
    assert [s.id for s in listed] == [stopped]


def test_a_preview_starts_from_the_stop_with_the_edits_made_there(world: World, stopped: str):
    world.prompt_edits = False
    seen = world.session(stopped).stop_number
    request = world.send(m.Preview(session_id=stopped, seen=seen, edits=(zero("layers.2.output"),)))
    (errand,) = world.errands

    assert [plan.edit_id for plan in errand.edits] == [1, 2]
    assert request not in world.replies
    world.apply_edits()
    world.work()
    assert isinstance(world.answer_to(request), ReadTensors)


def test_at_the_logits_a_preview_needs_no_run(world: World, stopped: str):
    world.run(stopped, m.StepOut)
    given = stretches(world)
    answer = ask(world, m.Preview, stopped, edits=(zero("logits"),))

    assert not given and len(answer.beside) == 1


def test_what_was_on_the_way_is_run_again_from_the_start_with_the_edits_of_the_way(
    world: World, stopped: str
):
    world.run(stopped, m.Next)
    given = stretches(world)
    answer = ask(
        world, m.ReadAttention, stopped, layer=1, heads=m.Selector(kind="indices", indices=(1,))
    )
    (stretch,) = given

    assert stretch.captures is not None
    assert (stretch.point, stretch.until) == (NOT_STARTED, inner_point(1, "attention.pattern"))
    assert stretch.captures.points == (stretch.until,)
    assert stretch.captures.elements == tuple(range(6, 12))
    assert answer.channels == stretch.captures.elements
    ask(world, m.ReadSites, stopped, locations=("layers.3.output", "embedding"))
    again = given[-1]
    assert [plan.point for plan in again.edits] == [3]
    assert again.captures is not None and again.captures.points == (0, 4)


def test_a_forward_run_again_writes_no_page_of_the_session(world: World, stopped: str):
    world.run(stopped, m.StepOut)
    world.run(stopped, m.Next)
    tables = list(world.state.sessions[stopped].tables)
    ask(world, m.ReadSites, stopped, locations=("logits",))

    assert world.state.sessions[stopped].tables == tables
    world.run(stopped)  # the engine would find other contents in its pages


@pytest.mark.parametrize(
    ("message", "error", "words"),
    [
        ((m.Preview, {"edits": ()}), BadEdit, "at least one"),
        ((m.Preview, {"edits": (zero("layers.0.output"),)}), BadEdit, "has passed"),
        ((m.Preview, {"edits": (zero("logits"),), "top_k": 0}), BadArgument, "top_k"),
        ((m.ReadAttention, {"layer": 5}), BadArgument, "layers 0 to 4"),
        ((m.ReadSites, {"locations": ()}), BadArgument, "at least one"),
        ((m.ReadSites, {"locations": ("logits", "logits")}), BadArgument, "twice"),
        ((m.ReadSites, {"locations": ("layers.4.mlp.neurons",)}), NotSupported, "a mixture"),
        ((m.ReadLensMap, {"locations": ()}), BadArgument, "at least one"),
        ((m.ReadLensMap, {"locations": ("3", "layers.3.output")}), BadArgument, "twice"),
        ((m.ReadLensMap, {"locations": ("logits",)}), NotSupported, "stop.lens"),
        ((m.ReadLensMap, {"locations": ("layers.1.attention.q",)}), NotSupported, "residual"),
        ((m.ReadLensMap, {"locations": ("embedding",), "top_k": 0}), BadArgument, "top_k"),
        (
            (m.ReadAttention, {"layer": 0, "tokens": m.Selector(kind="generated")}),
            BadSelector,
            "selects others",
        ),
        ((m.ReadAttribution, {"token_id": 50}), BadArgument, "vocabulary"),
        ((m.ReadRouter, {"layer": -1}), BadArgument, "layers 0 to 4"),
    ],
)
def test_a_bad_question_is_refused_and_changes_nothing(
    world: World, stopped: str, message: Any, error: type[DjinnError], words: str
):
    before = snapshot(world.state)
    with pytest.raises(error, match=words):
        ask(world, message[0], stopped, **message[1])

    after = snapshot(world.state)
    assert after[1]["sessions"] == before[1]["sessions"]
    assert after[1]["pool"] == before[1]["pool"]
    assert not world.state.questions


def test_a_lens_map_is_caught_at_its_locations_and_tokens_alone(world: World, stopped: str):
    given = stretches(world)
    last = m.Selector(kind="indices", indices=(-1,))
    answer = ask(
        world, m.ReadLensMap, stopped, locations=("final_norm", "layers.1.middle"), tokens=last
    )
    (stretch,) = given

    assert stretch.captures is not None
    points = inner_point(1, "middle"), final_norm_point(5)
    assert stretch.captures.points == points and stretch.until == points[-1]
    assert stretch.captures.rows == answer.rows == (len(world.state.sessions[stopped].tokens) - 1,)


def test_a_lens_map_of_too_many_cells_or_entries_is_refused(
    world: World, stopped: str, monkeypatch: pytest.MonkeyPatch
):
    count = len(world.state.sessions[stopped].tokens)
    monkeypatch.setattr(scratch, "MAX_LENS_CELLS", 2 * count)
    monkeypatch.setattr(scratch, "MAX_LENS_ENTRIES", 4 * count)
    two = {"locations": ("embedding", "final_norm")}

    ask(world, m.ReadLensMap, stopped, **two, top_k=2)
    with pytest.raises(QuotaExceeded, match=f"{6 * count} entries, 3 for each cell, the limit is"):
        ask(world, m.ReadLensMap, stopped, **two, top_k=3)
    with pytest.raises(QuotaExceeded, match=f"{3 * count} cells, the limit is {2 * count}"):
        ask(world, m.ReadLensMap, stopped, locations=("embedding", "layers.0.output", "final_norm"))
    assert not world.state.questions


def test_a_stale_question_is_refused(world: World, stopped: str):
    with pytest.raises(StaleStop):
        world.ask(m.Preview(session_id=stopped, seen=0, edits=(zero("logits"),)))


def test_a_question_whose_fork_fails_is_answered_with_why(world: World, stopped: str):
    seen = world.session(stopped).stop_number
    free = world.state.pool.num_free
    request = world.send(m.Preview(session_id=stopped, seen=seen, edits=(zero("logits"),)))
    world.fail(4)
    world.work()

    with pytest.raises(DjinnError):
        world.answer_to(request)
    assert world.session(stopped).status == "stopped"
    assert world.state.pool.num_free == free and not world.state.questions


def test_a_scratch_fork_belongs_to_nobody_who_asks_for_it(world: World, stopped: str):
    seen = world.session(stopped).stop_number
    world.send(m.Preview(session_id=stopped, seen=seen, edits=(zero("logits"),)))
    fork = world.stretch.session_id

    with pytest.raises(DjinnError, match="no session"):
        world.ask(m.Terminate(session_id=fork))
    world.ask(m.Terminate(session_id=stopped))
    world.work()
    assert not world.state.sessions and world.state.pool.num_free == world.state.pool.num_pages


def test_too_many_questions_at_once_are_refused():
    world = World(limits=Limits(scratch_per_owner=1))
    sid = world.launch()
    world.run(sid, m.Next)
    seen = world.session(sid).stop_number
    world.send(m.ReadAttention(session_id=sid, seen=seen, layer=0))

    with pytest.raises(QuotaExceeded, match="wait for their answers"):
        world.ask(m.ReadAttention(session_id=sid, seen=seen, layer=0))
    world.work()
    world.finish_checks()
