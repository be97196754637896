"""A session that runs, and what others do meanwhile: stand still, swap, or hold a lock.

The time between two tokens is taken where the state is told of a drawn token, when the token is a
number in the host's memory: the device has finished it. Nothing of the running session is asked for
in between.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from djinn_nb import Finished, Session
from kernel_server.protocol import messages as m
from kernel_server.state.copies import LONG_RUN
from kernel_server.state.events import StretchDone
from kernel_server.state.instructions import RunStretch
from kernel_server.state.leaving import DECODES_BETWEEN
from notebooks.harness.checkpoint import stop_at
from notebooks.harness.exactness import Prompt
from notebooks.harness.faults import instead
from notebooks.harness.inprocess import InProcessTransport, Local
from notebooks.harness.tier_watch import (
    counting_copies,
    give_up_copies,
    tick,
    wait_until_copied,
    wait_until_settled,
)

#: Tokens at the beginning of a run that are not timed: the prefill, and what warms up.
WARM = 3


@contextlib.contextmanager
def token_times(local: Local) -> Iterator[dict[str, list[float]]]:
    """Seconds of the clock at which each session drew its tokens, by session."""
    state, found = local.kernel.state, dict[str, list[float]]()
    handle = state.handle

    def note(event: Any) -> Any:
        if isinstance(event, StretchDone) and event.token is not None:
            found.setdefault(event.session_id, []).append(time.perf_counter())
        return handle(event)

    with instead(state, "handle", note):
        yield found


def inter_token_ms(times: Sequence[float]) -> list[float]:
    """Milliseconds between the tokens of one run, those of its beginning left out."""
    after = times[WARM:]
    return [1e3 * (b - a) for a, b in itertools.pairwise(after)]


def run_alone(local: Local, prompt: Prompt) -> tuple[list[float], tuple[int, ...]]:
    """Launch a session and run it to its end; time between its tokens, and the tokens."""
    with token_times(local) as times:
        session = prompt.launch(local)
        end = session.continue_()
        assert isinstance(end, Finished), end
        found = inter_token_ms(times[session.id])
    tokens = tuple(session.tokens[len(prompt.ids) :])
    session.terminate()
    return found, tokens


@dataclass(frozen=True, slots=True)
class Beside:
    """One run of a session beside something that is done again and again.

    between_ms: of its tokens. done: how often, in so many seconds, or what part of it; nbytes: that
    were copied between tiers meanwhile, whichever way; its own, which are copied once it has ended,
    among them.
    """

    between_ms: list[float]
    tokens: tuple[int, ...]
    done: float
    seconds: float
    nbytes: int


def run_beside(
    local: Local,
    prompt: Prompt,
    work: Callable[[], contextlib.AbstractContextManager[Sequence[float]]],
) -> Beside:
    """Run a session from its launch to its end, with `work` beside it: `writing_behind`,
    or another client that swaps."""
    wait_until_copied(local)  # nothing is left of what was done in the round before
    with counting_copies(local) as copied:
        began = time.perf_counter()
        with work() as done:
            found, tokens = run_alone(local, prompt)
        seconds = time.perf_counter() - began
    return Beside(found, tokens, done[0], seconds, copied.total())


def stopped_for_copying(local: Local, prompt: Prompt, layer: int, decodes: int) -> list[Session]:
    """Sessions stopped after `layer` of their first decode, as many as have more pages than are
    copied beforehand beside so many decodes, but at most half of the device's."""
    most = local.kernel.state.residency.slots["device"].capacity // 2
    wanted = LONG_RUN * (1 + decodes // DECODES_BETWEEN)
    stopped = [stop_at(local, prompt, layer, 1)]
    each = pages = stopped[0].newest.num_pages
    while pages < wanted and pages + each <= most:
        stopped.append(stop_at(local, prompt, layer, 1))
        pages += each
    return stopped


@contextlib.contextmanager
def writing_behind(local: Local, sessions: Sequence[Session]) -> Iterator[list[float]]:
    """Have stopped sessions' pages copied down beforehand while another decodes, and at no other
    time; yields a list that holds, at the end, how many whole sessions that came to.

    When this begins none of the pages has a copy: they are given up, which is what writing the
    pages would do. Nothing but the server's own copying goes on during the run.
    """
    state, done = local.kernel.state, [0.0]
    copy_beforehand = state.write_behind

    def beside_decodes() -> None:
        if state.slot is not None and not state.slot.long:
            copy_beforehand()

    with instead(state, "write_behind", beside_decodes):
        pages = set[int]().union(*(give_up_copies(local, session) for session in sessions))
        with local.kernel.loop._lock:
            state.to_clean.update(dict.fromkeys(session.id for session in sessions))
        yield done
        wait_until_settled(local)
        done[0] = len(sessions) * (1 - len(state.residency.dirty & pages) / len(pages))
    tick(local)


def start(session: Session) -> None:
    """Have a session run, without waiting for it."""
    session.client.control(m.Continue(session_id=session.id, seen=session.seen))


def control_call_us(session: Session, calls: int) -> list[float]:
    """Microseconds of each of so many small control calls, answered by the state."""
    found = []
    for _ in range(calls):
        began = time.perf_counter()
        session.client.call(m.Describe(session_id=session.id), m.SessionReply)
        found.append(1e6 * (time.perf_counter() - began))
    return found


# -- a fault ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def engine_lock(local: Local) -> Iterator[threading.Lock]:
    """A lock that the engine takes for every stretch; whoever stops a session holds it until then.

    This is how a debugger would be built that stops the program instead of the session.
    """
    engine, lock = local.kernel.engine, threading.Lock()
    run_stretch = engine._run_stretch

    def locked(stretch: RunStretch) -> None:
        with lock:
            run_stretch(stretch)

    with instead(engine, "_run_stretch", locked):
        yield lock


def tokens_within(local: Local, session: Session, seconds: float) -> int:
    """Continue a session and wait so long for its end; how many tokens it has drawn by then."""
    with token_times(local) as times:
        start(session)
        end = time.monotonic() + seconds
        while time.monotonic() < end and session.refresh().status == "running":
            time.sleep(0.002)
        return len(times.get(session.id, ()))


# -- bytes between client and server ---------------------------------------------------------------


@dataclass(slots=True)
class Wire:
    """Bytes of every message between the client and the kernel, events included."""

    sent: int = 0
    received: int = 0
    calls: int = 0

    @property
    def total(self) -> int:
        return self.sent + self.received


@contextlib.contextmanager
def counting_bytes(local: Local) -> Iterator[Wire]:
    """Count the bytes of messages: those a socket would carry, without its framing."""
    transport, wire = local.server._client.transport, Wire()
    assert isinstance(transport, InProcessTransport)
    gateway, lock = transport._gateway, threading.Lock()
    handle = gateway.handle

    def note(owner: str, kind: Any, payload: bytes) -> bytes:
        answer = handle(owner, kind, payload)
        with lock:
            wire.sent += len(payload)
            wire.received += len(answer)
            wire.calls += 1
        return answer

    with instead(gateway, "handle", note):
        yield wire
