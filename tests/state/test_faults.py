"""Our own bugs: what is told, and that the other sessions go on."""

from __future__ import annotations

from typing import Any

import pytest

from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import BadMessage, SessionFailed
from kernel_server.state.events import Requested, StretchDone, StretchFailed
from kernel_server.state.instructions import Reply
from kernel_server.state.server_state import ServerState
from tests.state.world import PROMPT, SHAPE, World

LOST = m.ErrorInfo(code="SessionFailed", message="a fault of the server")


def test_a_fault_in_a_request_is_answered_once_with_the_sessions_story():
    state = ServerState(SHAPE)
    launch = m.Launch(token_ids=PROMPT, max_new_tokens=2)
    state.handle(Requested(request_id=1, owner="ada", message=launch, now=0.0))
    # no decoder lets this through; it stands for a mistake of ours
    broken: Any = m.AddEdit(session_id="s1", seen=0, edit="zero")  # type: ignore[arg-type]
    out = state.handle(Requested(request_id=2, owner="ada", message=broken, now=0.0))
    (reply,) = (i for i in out if isinstance(i, Reply))

    assert reply.message.error.code == "ServerFault"
    assert "internal error in AddEdit" in reply.message.error.message
    assert any("Launch" in line for line in reply.message.error.details["story"])
    state.check()


def test_a_message_that_is_no_request_is_refused(world: World):
    with pytest.raises(BadMessage, match="Initialize is not a request about sessions"):
        world.ask(m.Initialize(client="x"))


def test_an_answer_nobody_asked_for_is_a_fault_and_changes_nothing(world: World):
    sid = world.launch()
    world.go(sid)

    with pytest.raises(AssertionError, match="answered for"):
        world.state.handle(StretchDone(session_id="s9", point=3))
    with pytest.raises(AssertionError, match="came to point 77"):
        world.state.handle(StretchDone(session_id=sid, point=77))
    world.work()
    assert world.session(sid).status == "finished"


def test_a_session_lost_outside_the_engine_answers_all_that_waited(world: World):
    sid = world.launch(stop_on_entry=True)
    world.work()
    world.prompt_edits = False
    spec = m.EditSpec(kind="zero", location="embedding")
    pending = world.send(m.AddEdit(session_id=sid, seen=1, edit=spec))
    waiting = world.send(m.ReadLogits(session_id=sid))
    world.errands.clear()
    world.handle(StretchFailed(session_id=sid, point=-1, error=LOST, fatal=True))

    with pytest.raises(SessionFailed, match="a fault of the server"):
        world.answer_to(pending)
    with pytest.raises(SessionFailed, match="failed and holds no tensors"):
        world.answer_to(waiting)
    assert world.session(sid).status == "failed"
    assert world.state.pool.num_free == SHAPE.num_pages


def test_a_session_lost_in_the_queue_gives_up_its_turn(world: World):
    first, second = world.launch(), world.launch()
    world.go(first)
    world.go(second)
    world.handle(StretchFailed(session_id=second, point=-1, error=LOST, fatal=True))
    world.work()

    assert world.session(first).status == "finished"
    assert world.session(second).status == "failed"
