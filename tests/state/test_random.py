"""Any clients, any engine: random requests and outcomes against every invariant.

The state checks itself after every event; the engine checks that each page holds what it must.
Here: one answer per request, nothing changed by a refusal, nobody starved, nothing left behind.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kernel_server.protocol import messages as m
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.location import Point
from kernel_server.state.events import StretchDone, Ticked
from kernel_server.state.server_state import Limits, ServerState
from tests.state.world import SAMPLED, SHAPE, World, noted, result_of, snapshot

POOL = dataclasses.replace(SHAPE, num_pages=22)
LIMITS = Limits(
    sessions_per_owner=4, breakpoints_per_session=4, edits_per_session=4, deferred_per_session=3,
    nodes_per_session=9, branches_per_session=3, kept_stops_per_session=3,
    kept_bytes=40_000, tensor_bytes=160_000,
)  # fmt: skip
OWNERS = ("ada", "bob", "cyd")

owners = st.sampled_from(OWNERS)
#: one of the sessions there are, by number; a few numbers mean one that is gone
picks = st.integers(0, 23)
locations = st.sampled_from(
    [
        *["embedding", "layers.0.output", "layers.1.output", "layers.3.output"],
        *["layers.4.output", "final_norm", "logits", "layers.2.input", "layers.9.output"],
        *["layers.0.attention.heads", "layers.3.middle", "layers.4.mlp.output"],
        *["layers.2.attention.pattern", "layers.4.mlp.neurons"],
    ]
)
conditions = st.sampled_from([None, None, "norm > 3", "position == 2 or hits > 1", "norm >"])
indices = st.lists(st.integers(-4, 9), min_size=1, max_size=3)
selectors = st.one_of(
    st.sampled_from(["all", "prompt", "generated"]).map(lambda kind: m.Selector(kind=kind)),
    indices.map(lambda found: m.Selector(kind="indices", indices=tuple(found))),
    st.tuples(*[st.none() | st.integers(-6, 9)] * 2).map(
        lambda ends: m.Selector(kind="slice", start=ends[0], stop=ends[1])
    ),
    st.sets(st.integers(0, 5)).map(
        lambda ids: m.Selector(kind="text", text="a", token_ids=tuple(ids))
    ),
)
#: each kind with what it takes, and now and then something it does not
ARGUMENTS: dict[str, dict[str, Any]] = {
    "scale": {"factor": 2.0},
    "add": {"value": Array.from_numpy(np.float32(1)), "alpha": 2.0},
    "set": {"value": Array.from_numpy(np.float32(1))},
    "zero": {},
    "clamp": {"minimum": -1.0},
    "project_out": {"value": Array.from_numpy(np.ones(8, np.float32))},
    "mean": {},
    "swap": {},
    "force": {"token_ids": (3,)},
    "ban": {"token_ids": (3, 4)},
    "replace": {"token_ids": (3, 4)},
}
edits = st.builds(
    lambda kind, others, **where: m.EditSpec(kind=kind, **ARGUMENTS[others or kind], **where),
    kind=st.sampled_from(m.EDIT_KINDS),
    others=st.sampled_from([None] * 9 + ["scale", "clamp", "ban"]),
    location=locations,
    tokens=selectors,
    heads=st.sampled_from([m.ALL, m.ALL, m.Selector(kind="indices", indices=(1,))]),
    sticky=st.booleans(),
)


def boundary(point: Point, how_far: int) -> Point:
    """Where an engine that is cut short stands: at a whole point, unless it did not move."""
    return math.floor(point) + how_far if how_far else point


class Clients(RuleBasedStateMachine):
    """Three owners and an engine, all doing what they like within their rights."""

    pool, limits = POOL, LIMITS

    @initialize()
    def start(self) -> None:
        self.world = World(self.pool, self.limits)
        self.world.prompt_edits = False
        for owner in OWNERS[:2]:
            self.world.launch(owner=owner, max_new_tokens=5)
        #: session -> turns of others it may still have to wait for
        self.patience: dict[str, int] = {}

    # -- clients ----------------------------------------------------------------------------

    def send(self, message: Any, owner: str) -> None:
        before = snapshot(self.world.state)
        request_id = self.world.send(message, owner)
        reply = self.world.replies.get(request_id)
        if isinstance(reply, m.ErrorReply):
            assert snapshot(self.world.state) == before, f"refused, and changed: {message}"
            assert reply.error.code != "ServerFault", reply.error

    def pick(self, number: int, *wanted: str) -> tuple[str, str, int]:
        """A session with its owner and its stop number, of a wanted status where there is one."""
        sessions = [s for s in self.world.state.sessions.values() if not s.scratch]
        if number == 23 or not sessions:
            return "nobody", "ada", 0
        sessions = [s for s in sessions if s.status in wanted] or sessions
        session = sessions[number % len(sessions)]
        return session.id, session.owner, session.stop_number

    def room(self) -> bool:
        return sum(not s.branch for s in self.world.state.sessions.values()) < 6

    @precondition(room)
    @rule(
        owner=owners,
        prompt=st.lists(st.integers(0, 5), max_size=9),
        new=st.integers(1, 6),
        entry=st.booleans(),
    )
    def launch(self, owner: str, prompt: list[int], new: int, entry: bool) -> None:
        message = m.Launch(token_ids=tuple(prompt), max_new_tokens=new, stop_on_entry=entry)
        self.send(message, owner)

    @rule(number=picks, kind=st.sampled_from([m.Continue, m.Next, m.StepIn, m.StepOut]))
    def run_on(self, number: int, kind: Any) -> None:
        session_id, owner, seen = self.pick(number, "waiting", "stopped")
        self.send(kind(session_id=session_id, seen=seen), owner)

    @rule(number=picks, kind=st.sampled_from([m.Continue, m.Next, m.StepIn, m.StepOut]))
    def run_on_too_late(self, number: int, kind: Any) -> None:
        session_id, owner, seen = self.pick(number, "running", "stopped")
        self.send(kind(session_id=session_id, seen=seen - number % 2), owner)

    @rule(number=picks, location=locations)
    def run_to(self, number: int, location: str) -> None:
        session_id, owner, seen = self.pick(number, "waiting", "stopped")
        self.send(m.RunTo(session_id=session_id, seen=seen, location=location), owner)

    @rule(number=picks, kind=st.sampled_from([m.Describe, m.ReadStory]))
    def ask(self, number: int, kind: Any) -> None:
        session_id, owner, _ = self.pick(number)
        self.send(kind(session_id=session_id), owner)

    @rule(number=picks)
    def pause(self, number: int) -> None:
        session_id, owner, _ = self.pick(number, "running")
        self.send(m.Pause(session_id=session_id), owner)

    @precondition(room)
    @rule(number=picks, seed=st.none() | st.integers(0, 3))
    def fork(self, number: int, seed: int | None) -> None:
        session_id, owner, _ = self.pick(number, "stopped")
        self.send(m.Fork(session_id=session_id, seed=seed), owner)

    @precondition(lambda self: len(self.world.state.sessions) > 3)
    @rule(number=picks, stranger=owners)
    def terminate(self, number: int, stranger: str) -> None:
        session_id, owner, _ = self.pick(number, *([] if number % 2 else ["failed", "finished"]))
        self.send(m.Terminate(session_id=session_id), owner if number < 20 else stranger)

    @rule(
        number=picks,
        location=locations,
        when=st.sampled_from(["any", "prefill", "decode"]),
        condition=conditions,
        ignore=st.integers(0, 2),
        once=st.booleans(),
    )
    def set_breakpoint(self, number: int, location: str, **what: Any) -> None:
        session_id, owner, _ = self.pick(number)
        self.send(m.SetBreakpoint(session_id=session_id, locations=(location,), **what), owner)

    @rule(
        number=picks,
        places=st.lists(locations, min_size=1, max_size=4),
        kind=st.sampled_from(["data breakpoint", "logpoint"]),
        when=st.sampled_from(["any", "prefill", "decode"]),
        condition=conditions,
        tokens=selectors,
        on_full=st.sampled_from(["drop", "stop"]),
    )
    def watch(self, number: int, places: list[str], **what: Any) -> None:
        session_id, owner, _ = self.pick(number)
        message = m.SetBreakpoint(
            session_id=session_id, locations=tuple(places), max_bytes=5000, **what
        )
        self.send(message, owner)

    @rule(number=picks, logpoint=st.integers(1, 4), after=st.integers(0, 4), release=st.booleans())
    def read_log(self, number: int, logpoint: int, after: int, release: bool) -> None:
        session_id, owner, _ = self.pick(number)
        message = m.ReadLog(
            session_id=session_id, breakpoint_id=logpoint, after=after, release=release
        )
        self.send(message, owner)

    @rule(number=picks, breakpoint_id=st.integers(1, 4), enabled=st.none() | st.booleans())
    def change_breakpoint(self, number: int, breakpoint_id: int, enabled: bool | None) -> None:
        session_id, owner, _ = self.pick(number)
        which = {"session_id": session_id, "breakpoint_id": breakpoint_id}
        if enabled is None:
            self.send(m.RemoveBreakpoint(**which), owner)
        else:
            self.send(m.EnableBreakpoint(**which, enabled=enabled), owner)

    @rule(number=picks, edit=edits, here=st.booleans())
    def add_edit(self, number: int, edit: m.EditSpec, here: bool) -> None:
        session_id, owner, seen = self.pick(number, "stopped")
        session = self.world.state.sessions.get(session_id)
        if here and session is not None and session.stop is not None:
            edit = dataclasses.replace(edit, location=session.stop.location)
        self.send(m.AddEdit(session_id=session_id, seen=seen, edit=edit), owner)

    @rule(number=picks, edit_id=st.integers(1, 4), enabled=st.none() | st.booleans())
    def change_edit(self, number: int, edit_id: int, enabled: bool | None) -> None:
        session_id, owner, _ = self.pick(number)
        which = {"session_id": session_id, "edit_id": edit_id}
        if enabled is None:
            self.send(m.RemoveEdit(**which), owner)
        else:
            self.send(m.EnableEdit(**which, enabled=enabled), owner)

    @rule(number=picks)
    def undo(self, number: int) -> None:
        session_id, owner, seen = self.pick(number)
        self.send(m.UndoEdit(session_id=session_id, seen=seen), owner)

    @rule(number=picks, tokens=selectors, lens=st.booleans())
    def read(self, number: int, tokens: m.Selector, lens: bool) -> None:
        session_id, owner, seen = self.pick(number)
        kind = m.ReadLens if lens else m.ReadValue
        self.send(kind(session_id=session_id, seen=seen, tokens=tokens), owner)
        self.send(m.ReadLogits(session_id=session_id), owner)
        self.send(m.ReadCapture(session_id=session_id), owner)

    @rule(number=picks, edit=edits, here=st.booleans())
    def preview(self, number: int, edit: m.EditSpec, here: bool) -> None:
        session_id, owner, seen = self.pick(number, "stopped")
        session = self.world.state.sessions.get(session_id)
        if here and session is not None and session.stop is not None:
            edit = dataclasses.replace(edit, location=session.stop.location)
        self.send(m.Preview(session_id=session_id, seen=seen, edits=(edit,)), owner)

    @rule(number=picks, location=locations, layer=st.integers(-1, 5))
    def look_at_what_is_not_kept(self, number: int, location: str, layer: int) -> None:
        session_id, owner, seen = self.pick(number, "stopped")
        where = {"session_id": session_id, "seen": seen}
        if number % 3 == 0:
            self.send(m.ReadAttention(**where, layer=layer), owner)
        elif number % 3 == 1:
            self.send(m.ReadSites(**where, locations=(location, "final_norm")), owner)
            self.send(m.ReadLensMap(**where, locations=(location, "embedding")), owner)
        else:
            self.send(m.ReadAttribution(**where), owner)

    @rule(number=picks, forward=st.integers(-1, 5), location=locations)
    def go_back(self, number: int, forward: int, location: str) -> None:
        session_id, owner, seen = self.pick(number, "stopped", "finished")
        if number % 3:
            self.send(m.StepBack(session_id=session_id, seen=seen - (number == 22)), owner)
        else:
            where = {"forward": forward, "location": location}
            self.send(m.Rewind(session_id=session_id, seen=seen, **where), owner)

    @rule(number=picks, which=st.integers(0, 30), prune=st.booleans())
    def climb_about(self, number: int, which: int, prune: bool) -> None:
        session_id, owner, seen = self.pick(number, "stopped", "finished")
        session = self.world.state.sessions.get(session_id)
        nodes = [0] if session is None else [*session.tree.nodes, 999]
        node = nodes[which % len(nodes)]
        self.send(m.ListBranches(session_id=session_id), owner)
        if prune:
            self.send(m.PruneBranch(session_id=session_id, node=node), owner)
        else:
            self.send(m.GoTo(session_id=session_id, seen=seen, node=node), owner)

    # -- engine -----------------------------------------------------------------------------

    def busy(self) -> bool:
        return self.world.engine.stretch is not None

    @precondition(busy)
    @rule(holds=st.booleans(), eos=st.integers(0, 9), times=st.integers(1, 3))
    def come_to_the_end(self, holds: bool, eos: int, times: int) -> None:
        self.world.judge = lambda check: (self.world.stretch.first_token,) if holds else ()
        self.world.draw = lambda position: 49 if eos == 9 else (position + eos) % 6
        for _ in range(times):
            if self.busy():
                self.count_turn()
                self.world.done()

    @precondition(lambda self: self.busy() and self.world.engine.interrupted)
    @rule(how_far=st.integers(0, 9), holds=st.booleans())
    def be_cut_short(self, how_far: int, holds: bool) -> None:
        stretch = self.world.stretch
        reach = min(stretch.until, self.world.engine.reach(stretch))
        logs, point = noted(stretch, min(boundary(stretch.point, how_far), reach))
        reached = [c for c in stretch.checks if c.point == point] if how_far else []
        self.count_turn()
        token = self.world.token() if point == SAMPLED else None
        self.world.engine.answer(point)
        self.world.handle(
            StretchDone(
                session_id=stretch.session_id,
                point=point,
                held={c.breakpoint_id: (stretch.first_token,) for c in reached if holds},
                edits=tuple(result_of(p) for p in stretch.edits if p.point <= point),
                logs=logs,
                token=token,
                layers_run=how_far,
            )
        )

    @precondition(busy)
    @rule(how_far=st.integers(0, 9), fatal=st.integers(0, 4), really=st.integers(0, 3))
    def break_down(self, how_far: int, fatal: int, really: int) -> None:
        stretch = self.world.stretch
        self.count_turn()
        if really < 3:
            self.world.done()
        else:
            reach = self.world.engine.reach(stretch)
            whole = boundary(stretch.point, how_far)
            point = min(whole, stretch.until, reach, SAMPLED - 1)
            self.world.fail(point, fatal=fatal == 4)

    @precondition(lambda self: self.world.errands)
    @rule(fail=st.integers(0, 4))
    def apply_edits(self, fail: int) -> None:
        self.world.apply_edits(fail=fail == 4)

    def count_turn(self) -> None:
        """Nobody waits for more turns than there were sessions before it, times the owners."""
        state = self.world.state
        queued = state.scheduler.queued()
        running = self.world.stretch.session_id
        for session_id in queued:
            most = len(OWNERS) * (LIMITS.sessions_per_owner + 1) * (SAMPLED + 1)
            self.patience[session_id] = self.patience.get(session_id, most) - 1
            assert self.patience[session_id] >= 0, f"{session_id} starves"
        self.patience.pop(running, None)

    # -- the end ------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        world.prompt_edits = True
        world.judge = lambda check: ()
        world.draw = lambda position: 3
        while world.errands:
            world.apply_edits()
        for _ in range(4000):
            if self.busy():
                self.count_turn()
                world.done()
            elif world.engine.copies:
                world.land()
            else:
                break
        assert not self.busy() and not world.state.arriving, "the engine never came to rest"
        world.finish_checks()
        assert world.state.recorded is not None
        again = ServerState.replay(self.pool, world.state.recorded, self.limits)
        assert snapshot(again) == snapshot(world.state), "the replay went another way"
        for session in [s for s in world.state.sessions.values() if not s.branch]:
            world.ask(m.Terminate(session_id=session.id), session.owner)
        while world.engine.copies:
            world.land()
        assert world.state.pool.num_free == self.pool.num_pages, "pages are left behind"
        slots = world.state.residency.slots.values()
        assert not any(tier.used for tier in slots), "slots are left behind"
        assert world.engine.sessions == {}, "tensors are left behind"


Clients.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
test_any_clients_and_any_engine = Clients.TestCase


class TieredClients(Clients):
    """The same with a device for half of the pages, and the others below."""

    pool = dataclasses.replace(SHAPE, num_pages=50, num_host_pages=14, num_disk_pages=20)
    limits = dataclasses.replace(LIMITS, copies_from_ticks=True)

    @precondition(lambda self: self.world.engine.copies)
    @rule(which=st.integers(0, 5), fails=st.integers(0, 9))
    def land(self, which: int, fails: int) -> None:
        """A copy arrives, in any order; now and then one fails."""
        tickets = sorted(self.world.engine.copies)
        ticket = tickets[which % len(tickets)]
        error = None
        if not fails:
            error = m.ErrorInfo(code="OutOfDeviceMemory", message="no space left")
        self.world.land(ticket, error)

    @rule(number=picks, to=st.sampled_from(["host", "disk", "device"]))
    def move_pages(self, number: int, to: Any) -> None:
        session_id, owner, _ = self.pick(number, "stopped", "finished")
        if to == "device":
            self.world.send(m.Restore(session_id=session_id), owner)
        else:
            self.world.send(m.Evict(session_id=session_id, to=to), owner)

    @rule(number=picks, pinned=st.booleans(), seconds=st.none() | st.floats(0, 50))
    def say_what_is_to_come(self, number: int, pinned: bool, seconds: float | None) -> None:
        session_id, owner, _ = self.pick(number)
        if number % 2:
            self.world.send(m.Pin(session_id=session_id, pinned=pinned), owner)
        else:
            self.world.send(m.Hint(session_id=session_id, resume_in_s=seconds), owner)

    @rule(tier=st.sampled_from(["device", "host", "disk"]), pages=st.integers(0, 24))
    def change_a_budget(self, tier: Any, pages: int) -> None:
        self.world.send(m.SetBudget(**{tier: pages * SHAPE.page_bytes}), "ada")

    @rule(seconds=st.floats(0, 60))
    def wait(self, seconds: float) -> None:
        self.world.now += seconds
        self.world.handle(Ticked(now=self.world.now))


TieredClients.TestCase.settings = Clients.TestCase.settings
test_any_clients_and_pages_in_three_tiers = TieredClients.TestCase
test_any_clients_and_pages_in_three_tiers.pytestmark = [pytest.mark.timeout(400)]
#: a fault found is made short first, which takes longer than a test may
test_any_clients_and_any_engine.pytestmark = [pytest.mark.timeout(400)]
