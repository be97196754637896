"""Agents that act, think and act again: sessions asked for by turns, and left alone in between.

Each act is one decode, from the logits of a forward to those of the next. Whoever drives them waits
for nobody: requests are sent when they are due, and what has arrived is taken when it has. The time
of a wake is cut where the state decides: *queue* until the session's turn, *restore* until the last
page that it needs has arrived, *compute* the rest. Logits are compared bit for bit at every stop.
"""

from __future__ import annotations

import contextlib
import heapq
import queue
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from djinn_nb import Session, Stopped
from kernel_server.protocol import messages as m
from kernel_server.state.events import Requested
from kernel_server.state.server_state import ServerState
from notebooks.harness.exactness import Prompt, Trace, different
from notebooks.harness.faults import instead
from notebooks.harness.inprocess import Local
from notebooks.harness.latency import synchronize


@dataclass(slots=True)
class Wake:
    """One act of one session; seconds of the clock. absent: its pages that were off the device
    when it was asked for, or had left it, for others, by its turn."""

    session_id: str
    asked_s: float
    absent: int
    begun_s: float = 0.0
    arrived_s: float = 0.0
    done_s: float = 0.0

    @property
    def queue_ms(self) -> float:
        return 1e3 * (self.begun_s - self.asked_s)

    @property
    def restore_ms(self) -> float:
        return 1e3 * max(0.0, self.arrived_s - self.begun_s)

    @property
    def compute_ms(self) -> float:
        return 1e3 * (self.done_s - max(self.begun_s, self.arrived_s))

    @property
    def total_ms(self) -> float:
        return 1e3 * (self.done_s - self.asked_s)


@dataclass(slots=True)
class Wakes:
    """All acts so far, and those that have come to their stop and were not taken yet."""

    done: list[Wake] = field(default_factory=list)
    arrived: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    _open: dict[str, Wake] = field(default_factory=dict)


def _absent(state: ServerState, session: Any) -> set[int]:
    """Pages of a session that are not on the device, or on their way there still."""
    pages = {page for table in session.tables for page in table}
    return state._absent(session) | (pages & state.inbound.keys())


@contextlib.contextmanager
def watching_wakes(local: Local) -> Iterator[Wakes]:
    """Note when sessions are asked to run, when it is their turn, when their pages are there and
    when the device has come to their next stop."""
    state, wakes = local.kernel.state, Wakes()
    handle, bring, copies_done, stop = state.handle, state.bring, state.copies_done, state.stop

    def note_request(event: Any) -> Any:
        if isinstance(event, Requested) and isinstance(event.message, m.RunTo):
            session = state.sessions[event.message.session_id]
            wakes._open[session.id] = Wake(
                session.id, time.perf_counter(), len(_absent(state, session))
            )
        return handle(event)

    def note_turn(session: Any, *given: Any) -> Any:
        wake = wakes._open.get(session.id)
        # the token of the forward before is drawn first, without a page
        if wake is not None and session.point < 0:
            wake.begun_s = wake.begun_s or time.perf_counter()
            wake.absent = max(wake.absent, len(_absent(state, session)))
        return bring(session, *given)

    def note_copy(event: Any) -> None:
        copying = state.copying[event.ticket]
        wake = wakes._open.get(copying.session_id or "")
        if wake is not None and copying.moves.target == "device":
            wake.arrived_s = time.perf_counter()
        copies_done(event)

    def note_stop(session: Any, *given: Any, **named: Any) -> None:
        wake = wakes._open.pop(session.id, None)
        if wake is not None:
            synchronize(local)
            wake.done_s = time.perf_counter()
            wake.begun_s = wake.begun_s or wake.asked_s
            wakes.done.append(wake)
        stop(session, *given, **named)
        if wake is not None:
            wakes.arrived.put(session.id)

    with (
        instead(state, "handle", note_request),
        instead(state, "bring", note_turn),
        instead(state, "copies_done", note_copy),
        instead(state, "stop", note_stop),
    ):
        yield wakes


@dataclass(slots=True)
class Life:
    """What a life of agents came to. unlike: logits that differ from the reference runs', by act.

    seconds, resident, partly: at each sample the sessions whose pages are all on the device, and
    those of which some are.
    """

    unlike: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    partly: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Agent:
    """A session at the logits of a forward, with what it must come to and how often it acts."""

    session: Session
    reference: Trace
    acts: int
    hints: bool

    @classmethod
    def begin(cls, local: Local, prompt: Prompt, reference: Trace, acts: int, hints: bool) -> Agent:
        """Launch it and let it read its prompt."""
        session = prompt.launch(local)
        stop = session.run_to("logits")
        assert isinstance(stop, Stopped), stop
        return cls(session, reference, acts, hints)

    def ask(self) -> None:
        """Have it act, without waiting for it."""
        self.session.client.control(
            m.RunTo(session_id=self.session.id, seen=self.session.seen, location="logits")
        )

    def look(self) -> int:
        """Take its stop, and compare the logits there."""
        stop = self.session.wait()
        assert isinstance(stop, Stopped), stop
        if stop.error is not None:
            raise stop.error
        return different(stop.value.numpy()[0], self.reference.logits[stop.forward])

    def think(self, seconds: float) -> None:
        """Leave it alone; say for how long, if it is one that does."""
        if self.hints:
            self.session.hint(resume_in_s=seconds)


def live(
    local: Local, wakes: Wakes, agents: Sequence[Agent], think_s: Callable[[random.Random], float],
    seed: int = 0,
) -> Life:  # fmt: skip
    """Let all agents act and think until each has acted as often as it is to."""
    any_, life, began = random.Random(seed), Life(), time.monotonic()
    by_id = {agent.session.id: agent for agent in agents}
    due: list[tuple[float, str]] = []

    def schedule(agent: Agent) -> None:
        seconds = think_s(any_)
        agent.think(seconds)
        heapq.heappush(due, (time.monotonic() + seconds, agent.session.id))

    for agent in agents:
        schedule(agent)
    left, sampled = sum(agent.acts for agent in agents), 0.0
    while left:
        now = time.monotonic()
        if now - sampled > 0.1:
            sampled = now
            _sample(local, agents, life, now - began)
        while due and due[0][0] <= now:
            by_id[heapq.heappop(due)[1]].ask()
        try:
            agent = by_id[wakes.arrived.get(timeout=0.002)]
        except queue.Empty:
            continue
        try:
            life.unlike.append(agent.look())
        except Exception as error:
            life.errors.append(f"{agent.session.id}: {error}")
            agent.acts = 0
            left = sum(one.acts for one in agents)
            continue
        agent.acts -= 1
        left -= 1
        if agent.acts:
            schedule(agent)
    return life


def _sample(local: Local, agents: Sequence[Agent], life: Life, seconds: float) -> None:
    state, resident, partly = local.kernel.state, 0, 0
    with local.kernel.loop._lock:
        for agent in agents:
            tables = state.sessions[agent.session.id].tables
            count = state.residency.count(tables)["device"]
            resident += count == sum(map(len, tables))
            partly += 0 < count < sum(map(len, tables))
    life.seconds.append(seconds)
    life.resident.append(resident)
    life.partly.append(partly)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
