"""What must hold when pages leave the device and come back, whatever the device."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from djinn_nb import Finished, Session, Stopped, errors
from kernel_server.loop import REPLY_DEADLINE_S
from kernel_server.protocol import messages as m
from kernel_server.state import copies
from kernel_server.state.refusing import READS
from notebooks.harness.exactness import Trace, different, reference_run, watching
from notebooks.harness.faults import instead
from notebooks.harness.inprocess import Local
from tests.kernel.cases import prompt_of


def ask(session: Session, kind: type, **what: Any) -> Any:
    return session.client.call(kind(session_id=session.id, **what), object)


def wait_until(holds: Callable[[], bool], timeout_s: float = 90.0) -> None:
    """Wait for what another thread does by and by; the limit is for what hangs, not for what is
    slow."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


def settled(local: Local) -> None:
    """Wait until no copy is under way."""

    def none_is() -> bool:
        with local.kernel.loop._lock:  # not in the middle of counting the last one
            return not local.kernel.state.copying

    wait_until(none_is)


def nothing_is_left(local: Local) -> None:
    """The state is sound, and every page came back, in every tier."""
    settled(local)
    state = local.kernel.state
    with local.kernel.loop._lock:  # the clock ticks on
        state.check()
        assert state.pool.num_free == state.shape.num_pages
        assert not any(slots.used for slots in state.residency.slots.values())


def an_evicted_session_goes_on_bit_for_bit(local: Local, to: str) -> None:
    """Pages taken off the device in the middle of a forward come back as they were."""
    prompt = prompt_of(local, 2.6, new_tokens=5)
    with watching(local) as watch:
        reference = reference_run(local, watch, prompt)
    for place, forward in (("layers.2.output", 0), ("embedding", 2), ("logits", 3)):
        session = prompt.launch(local)
        for _ in range(forward):
            session.run_to("logits")
        session.run_to(place)
        ask(session, m.Evict, to=to)
        info = session.refresh()
        assert info.device_pages == 0 and info.num_pages > 0, (place, info)
        assert (info.host_pages if to == "host" else info.disk_pages) == info.num_pages
        assert isinstance(session.continue_(), Finished)
        assert tuple(session.tokens[len(prompt.ids) :]) == reference.tokens
        assert different(session.logits, reference.last) == 0, place
        session.terminate()


def more_sessions_than_the_device_holds(local: Local) -> None:
    """Many stopped sessions, a half more pages than the device has; all of them go on exactly."""
    shape = local.kernel.state.shape
    length = len(prompt_of(local, 2.5).ids) + 1
    count = int(1.5 * shape.num_device_pages / (shape.num_groups * shape.pages_for(length))) + 1
    prompts = [prompt_of(local, 2.5, new_tokens=3, seed=i) for i in range(count)]
    references: list[Trace] = []
    with watching(local) as watch:
        for prompt in prompts:
            references.append(reference_run(local, watch, prompt))
    sessions = []
    for prompt in prompts:
        session = prompt.launch(local)
        session.run_to("logits")
        session.run_to("layers.2.output")
        sessions.append(session)
    slots = local.kernel.state.residency.slots
    held = sum(session.refresh().num_pages for session in sessions)
    assert held > slots["device"].capacity, "no pressure: nothing was tested"
    for session, prompt, reference in zip(sessions, prompts, references, strict=True):
        assert isinstance(session.continue_(), Finished)
        assert tuple(session.tokens[len(prompt.ids) :]) == reference.tokens
        assert different(session.logits, reference.last) == 0
    for session in sessions:
        session.terminate()
    settled(local)


def random_moves_end_alike(local: Local, seed: int, steps: int = 80) -> None:
    """Sessions stepped, forked, evicted, restored, pinned in any order end as if left alone."""
    rng = random.Random(seed)
    prompts = [prompt_of(local, c, 4, seed + i) for i, c in enumerate((0.5, 1.4, 2.6))]
    references: list[Trace] = []
    with watching(local) as watch:
        for prompt in prompts:
            references.append(reference_run(local, watch, prompt))
    live: list[tuple[Session, int]] = [(p.launch(local), i) for i, p in enumerate(prompts)]
    moved = 0
    for _ in range(steps):
        session, which = rng.choice(live)
        status = session.status
        choice = rng.randrange(7)
        if choice < 3 and status != "finished":
            move = rng.choice([session.next, session.step_out, session.step_in])
            move()
        elif choice == 3 and status in ("stopped", "finished"):
            ask(session, m.Evict, to=rng.choice(["host", "disk"]))
            moved += 1
        elif choice == 4 and status == "stopped" and rng.random() < 0.5:
            ask(session, m.Restore)
        elif choice == 5 and len(live) < 9 and status != "finished":
            live.append((session.fork(), which))
        elif choice == 6 and status == "stopped":
            stop = Stopped(session, session.refresh())
            stop.edit(scale=0.5)
            stop.undo()
    assert moved > 3
    for session, which in live:
        if session.status != "finished":
            assert isinstance(session.continue_(), Finished)
        length = len(prompts[which].ids)
        assert tuple(session.tokens[length:]) == references[which].tokens
        assert different(session.logits, references[which].last) == 0
        session.terminate()
    settled(local)


def pages_change_places(local: Local, spare: int) -> None:
    """With a few slots more than pages in all tiers, sessions go on by turns, bit for bit."""
    count, state = 3, local.kernel.state
    prompts = [prompt_of(local, 1.4, new_tokens=5, seed=20 + i) for i in range(count)]
    references: list[Trace] = []
    with watching(local) as watch:
        for prompt in prompts:
            references.append(reference_run(local, watch, prompt))
    settled(local)
    shape = state.shape
    pages = shape.num_groups * shape.pages_for(len(prompts[0].ids) + prompts[0].new_tokens)
    before = {tier: slots.capacity for tier, slots in state.residency.slots.items()}
    budgets(local, device=pages, host=pages * (count - 1) + spare, disk=0)
    sessions = []
    for prompt in prompts:
        session = prompt.launch(local)
        session.run_to("logits")
        sessions.append(session)
        settled(local)
    turns = []
    exchange = state._exchange

    def noting(session: Any, *rest: Any) -> bool:
        turns.append(session.id)
        return exchange(session, *rest)

    with instead(state, "_exchange", noting):
        for _ in range(3):
            for session in sessions:
                session.next()
        for session, prompt, reference in zip(sessions, prompts, references, strict=True):
            assert isinstance(session.continue_(), Finished)
            assert tuple(session.tokens[len(prompt.ids) :]) == reference.tokens
            assert different(session.logits, reference.last) == 0
    assert turns, "everything found room below: nothing was tested"
    for session in sessions:
        session.terminate()
    settled(local)
    budgets(local, **before)


def a_full_disk_is_told_and_loses_nothing(local: Local) -> None:
    """Nothing can be written to the disk for a while: who asks for it is told at once, others go
    on, one that finds no room waits, and afterwards all of them end as if left alone."""
    prompts = [prompt_of(local, 1.4, new_tokens=18, seed=40 + i) for i in range(2)]
    crowd = [prompt_of(local, 2.5, new_tokens=3, seed=50 + i) for i in range(64)]
    with watching(local) as watch:
        references = [reference_run(local, watch, prompt) for prompt in prompts]
        last = reference_run(local, watch, crowd[0])
    settled(local)
    state, attempts = local.kernel.state, 0
    disk = local.kernel.tiers._disk
    assert disk is not None
    pwrite = os.pwrite

    def full(file: int, content: Any, offset: int) -> int:
        nonlocal attempts
        if file != disk._file:
            return pwrite(file, content, offset)
        attempts += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    session = prompts[0].launch(local)
    session.run_to("logits")
    waiting: list[Session] = []
    with instead(os, "pwrite", full):
        began = time.monotonic()
        with pytest.raises(errors.OutOfPages, match="No space left on device") as caught:
            ask(session, m.Evict, to="disk")
        assert time.monotonic() - began < REPLY_DEADLINE_S / 4, "the call was left to its deadline"
        assert caught.value.details["refused"] == {"disk": "No space left on device"}
        info = session.refresh()
        assert info.device_pages == info.num_pages > 0 and info.status == "stopped"
        other = prompts[1].launch(local)
        assert isinstance(other.continue_(), Finished)
        assert tuple(other.tokens[len(prompts[1].ids) :]) == references[1].tokens
        assert different(other.logits, references[1].last) == 0
        other.terminate()
        for prompt in crowd:
            waiting.append(prompt.launch(local))
            try:
                waiting[-1].run_to("logits")
            except errors.OutOfPages as found:
                assert "No space left on device" in found.message
                break
        else:
            raise AssertionError("there was room for all: nothing was tested")
        assert waiting[-1].refresh().status == "waiting"
        assert 0 < attempts < 200, "it was tried again and again"
    # one that was begun while nothing could be written may still fail
    settled(local)
    # a budget, even the same one, has the tier tried at once
    budgets(local, disk=state.shape.num_disk_pages)
    waiting[-1].run_to("logits")
    assert ask(session, m.Evict, to="disk").session.disk_pages == info.num_pages
    assert isinstance(session.continue_(), Finished)
    assert tuple(session.tokens[len(prompts[0].ids) :]) == references[0].tokens
    assert len(references[0].tokens) > 16
    assert different(session.logits, references[0].last) == 0
    for one in waiting:
        assert isinstance(one.continue_(), Finished)
    assert tuple(waiting[0].tokens[len(crowd[0].ids) :]) == last.tokens
    assert different(waiting[0].logits, last.last) == 0
    for one in (session, *waiting):
        one.terminate()
    settled(local)


def a_copy_that_brings_nothing_is_made_again(local: Local, group: int) -> None:
    """The copy of a page of this group fails while a stretch waits for it, and those after it are
    made: the page comes a moment later, and nothing was computed without it."""
    prompt = prompt_of(local, 2.6, new_tokens=18)
    with watching(local) as watch:
        reference = reference_run(local, watch, prompt)
    session = prompt.launch(local)
    session.run_to("logits")
    ask(session, m.Evict)
    copier, state = local.kernel.engine._copier, local.kernel.state
    assert copier is not None
    carry_out, broken = copier._carry_out, []
    page = state.sessions[session.id].tables[group][0]

    def fails(made: Any, *rest: Any) -> None:
        moves = state.copying[made.copy.ticket].moves
        up = made.copy.way == "host-device" and page in moves.pages
        if up and len(broken) < READS - 1:
            broken.append(made)
            raise RuntimeError("CUDA error: invalid argument")
        carry_out(made, *rest)

    with instead(copier, "_carry_out", fails), instead(copies, "RUN", 1):
        assert isinstance(session.continue_(), Finished)
    assert len(broken) == READS - 1
    assert tuple(session.tokens[len(prompt.ids) :]) == reference.tokens
    assert different(session.logits, reference.last) == 0
    session.terminate()
    settled(local)


def budgets(local: Local, **pages: int) -> None:
    """Set how many pages each tier may hold."""
    size = local.kernel.state.shape.page_bytes
    local.server.set_budget(**{tier: count * size for tier, count in pages.items()})


def copies_that_are_late_take_no_old_bytes_for_new(local: Local) -> None:
    """Pages written while their copy down has not been made: what comes back is what was written.

    Offloading that raced with the computation of the same pages, with the bytes of both.
    """
    prompt = prompt_of(local, 1.4, new_tokens=5)
    with watching(local) as watch:
        reference = reference_run(local, watch, prompt)
    settled(local)
    copier = local.kernel.engine._copier
    assert copier is not None
    carry_out, gate, held_up = copier._carry_out, threading.Event(), []

    def late(made: Any, *rest: Any) -> None:
        if made.copy.way == "device-host" and not gate.is_set():
            # the bytes are read before the page is written, and told of after
            carry_out(made, *rest)
            held_up.append(made)
            assert gate.wait(120.0)
            return
        carry_out(made, *rest)

    with instead(copier, "_carry_out", late):
        try:
            session = prompt.launch(local)
            session.run_to("logits")
            wait_until(lambda: bool(held_up))
            session.run_to("layers.2.output")
            session.step_out()
        finally:
            gate.set()
        settled(local)
    ask(session, m.Evict)
    assert session.refresh().device_pages == 0
    assert isinstance(session.continue_(), Finished)
    assert tuple(session.tokens[len(prompt.ids) :]) == reference.tokens
    assert different(session.logits, reference.last) == 0
    session.terminate()
    settled(local)


def what_follows_pressure_is_as_before(local: Local) -> None:
    """Once those that pressed are gone a session decodes without a copy, as it did before."""
    prompt = prompt_of(local, 1.4, new_tokens=8)

    def copied() -> int:
        session = prompt.launch(local)
        session.run_to("logits")
        settled(local)
        begun = local.kernel.state._tickets_made
        session.run_to("logits")
        ways = local.kernel.state._tickets_made - begun
        session.continue_()
        settled(local)
        session.terminate()
        return ways

    before = copied()
    more_sessions_than_the_device_holds(local)
    assert local.kernel.state.residency.slots["host"].used == 0
    assert copied() <= before and not local.kernel.state.pressing
