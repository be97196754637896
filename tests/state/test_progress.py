"""How far a long forward is told, and that telling decides nothing."""

from __future__ import annotations

from kernel_server.protocol import messages as m
from kernel_server.state.events import StretchAdvanced
from kernel_server.state.instructions import Publish
from tests.state.world import World


def test_a_long_forward_tells_its_layers(world: World) -> None:
    session_id = world.launch()
    world.ask(m.Continue(session_id=session_id, seen=0))
    told = world.handle(StretchAdvanced(session_id=session_id, point=2))
    events = [i.event for i in told if isinstance(i, Publish)]
    world.done()

    assert [event.kind for event in events] == ["progress"]
    assert events[0].text.startswith("forward 0: 2 of")


def test_what_is_told_of_a_session_that_is_gone_is_dropped(world: World) -> None:
    session_id = world.launch()

    assert world.handle(StretchAdvanced(session_id=session_id, point=2)) == []
    assert world.handle(StretchAdvanced(session_id="s99", point=2)) == []
