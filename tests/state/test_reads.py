"""Requests that read tensors: passed to the engine with their selectors resolved, or refused."""

from __future__ import annotations

import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import BadArgument, BadSelector, NotStopped, StaleStop
from tests.state.world import World


def at(*indices: int) -> m.Selector:
    return m.Selector(kind="indices", indices=indices)


@pytest.fixture
def stopped(world: World) -> str:
    sid = world.launch()
    world.break_at(sid, "layers.2.output", once=True)
    world.run(sid)
    return sid


def test_reading_resolves_tokens_and_channels(world: World, stopped: str):
    read = world.ask(m.ReadValue(session_id=stopped, seen=1, tokens=at(2, -1), channels=at(-1, 0)))
    whole = world.ask(m.ReadValue(session_id=stopped, seen=1))

    assert (read.rows, read.channels, read.first_token, read.forward) == ((2, 5), (7, 0), 0, 0)
    assert (whole.rows, whole.channels) == (None, None)


def test_reading_in_a_decode_counts_rows_from_its_first_token(world: World, stopped: str):
    world.run(stopped, m.StepOut)
    world.run(stopped, m.Next)
    seen = world.session(stopped).stop_number
    read = world.ask(m.ReadValue(session_id=stopped, seen=seen, tokens=at(6)))

    assert (read.rows, read.first_token, read.forward) == ((0,), 6, 1)
    with pytest.raises(BadSelector, match="forward 1 feeds tokens 6 to 6, and 2 selects others"):
        world.ask(m.ReadValue(session_id=stopped, seen=seen, tokens=at(2)))
    with pytest.raises(BadSelector, match="and 2, 6 selects others"):
        world.ask(m.ReadValue(session_id=stopped, seen=seen, tokens=at(2, 6)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": at(6)}, "token 6 lies outside"),
        ({"tokens": at(1, 1)}, "listed twice"),
        ({"tokens": m.Selector(kind="generated")}, "selects others"),
        ({"channels": at(8)}, "channel 8"),
    ],
)
def test_a_selector_outside_the_tensor_is_refused(world: World, stopped: str, options, words):
    with pytest.raises(BadSelector, match=words):
        world.ask(m.ReadValue(session_id=stopped, seen=1, **options))
    assert world.reads == []


def test_reading_needs_the_stop_that_was_seen(world: World, stopped: str):
    with pytest.raises(StaleStop):
        world.ask(m.ReadValue(session_id=stopped, seen=0))
    world.go(stopped)
    with pytest.raises(NotStopped):
        world.ask(m.ReadLens(session_id=stopped, seen=1))
    world.work()
    waiting = world.launch()
    with pytest.raises(NotStopped, match="waiting before forward 0"):
        world.ask(m.ReadValue(session_id=waiting, seen=0))


def test_at_the_logits_only_the_last_token_is_kept(world: World, stopped: str):
    seen = world.run(stopped, m.StepOut).stop_number

    assert world.ask(m.ReadValue(session_id=stopped, seen=seen)).rows is None
    assert world.ask(m.ReadValue(session_id=stopped, seen=seen, tokens=at(-1))).rows is None
    with pytest.raises(BadSelector, match="last token only: select token 5"):
        world.ask(m.ReadValue(session_id=stopped, seen=seen, tokens=at(0)))


def test_a_lens_reads_layers_that_have_run(world: World, stopped: str):
    world.ask(m.ReadLens(session_id=stopped, seen=1, layers=(-1, 0, 2)))

    with pytest.raises(BadArgument, match="layer 3 has not run in forward 0"):
        world.ask(m.ReadLens(session_id=stopped, seen=1, layers=(3,)))
    with pytest.raises(BadArgument, match="layers 0 to 4"):
        world.ask(m.ReadLens(session_id=stopped, seen=1, layers=(5,)))
    with pytest.raises(BadArgument, match="top_k is 51: give 1 to 50"):
        world.ask(m.ReadLens(session_id=stopped, seen=1, top_k=51))


def test_capture_and_logits_can_be_read_while_it_runs(world: World, stopped: str):
    world.go(stopped)
    world.done()
    world.ask(m.ReadCapture(session_id=stopped))
    read = world.ask(m.ReadLogits(session_id=stopped))

    assert (read.session_id, read.forward, read.first_token) == (stopped, 1, 6)
    world.work()
