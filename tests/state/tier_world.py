"""Worlds with pages in three tiers, and sessions that stand in them."""

from __future__ import annotations

import dataclasses
from typing import Any

from kernel_server.protocol import messages as m
from kernel_server.state.events import Ticked
from kernel_server.state.server_state import Limits
from tests.state.world import SHAPE, World

#: pages of a stopped session with the world's prompt: two in each of three groups
PAGES = 6
PAGE = SHAPE.page_bytes


def tiers(
    device: int, host: int = 0, disk: int = 0, limits: Limits | None = None, kind: type = World
) -> Any:
    shape = dataclasses.replace(
        SHAPE, num_pages=device + host + disk, num_host_pages=host, num_disk_pages=disk
    )
    return kind(shape, limits)


def stopped(world: World, at: str = "logits", **options: Any) -> str:
    """A session that stands at a location, and whose copies have not been told of."""
    session_id = world.launch(max_new_tokens=options.pop("max_new_tokens", 2), **options)
    world.go(session_id, m.RunTo, location=at)
    while world.engine.stretch is not None:
        world.done()
    return session_id


def wait(world: World, seconds: float) -> None:
    world.now += seconds
    world.handle(Ticked(now=world.now))


def texts(world: World, session_id: str) -> list[str]:
    return [
        e.text for e in world.events["ada"] if e.kind == "swapped" and e.session_id == session_id
    ]


def evict(world: World, session_id: str, to: Any = "host") -> m.SessionReply:
    """The answer to an eviction, once copies were made."""
    request = world.send(m.Evict(session_id=session_id, to=to))
    world.work()
    found: m.SessionReply = world.answer_to(request)
    return found


def device_pages(world: World, session_id: str) -> int:
    state = world.state
    return state.residency.count(state.sessions[session_id].tables)["device"]


def pages_of(world: World, session_id: str) -> set[int]:
    return {page for table in world.state.sessions[session_id].tables for page in table}


def below(world: World, session_id: str) -> tuple[int, int, int]:
    """Pages of a session on the device, the host and the disk."""
    found = world.state.residency.count(world.state.sessions[session_id].tables)
    return found["device"], found["host"], found["disk"]


def all_stopped(world: World, count: int) -> list[str]:
    """Sessions of six pages each, stopped one after the other, all copies made."""
    found = []
    for _ in range(count):
        found.append(stopped(world))
        world.work()
        assert world.session(found[-1]).status == "stopped"
    return found


def budgets(world: World, **pages: int) -> tuple[m.Budget, ...]:
    """Set how many pages each of these tiers may hold."""
    sizes = {tier: count * PAGE for tier, count in pages.items()}
    return world.ask(m.SetBudget(**sizes)).budgets


def budget(world: World, tier: str, pages: int) -> m.Budget:
    (found,) = budgets(world, **{tier: pages})
    return found
