"""What must hold when sessions are saved, loaded and outlive their kernel, whatever the device."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from djinn_nb import Session, Stopped
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import NotSupported
from notebooks.harness.exactness import different
from notebooks.harness.inprocess import Local
from tests.kernel.branch_cases import ends_as, references_of
from tests.kernel.cases import prompt_of
from tests.kernel.lease_cases import is_at_rest, let_rest
from tests.kernel.tier_cases import ask

#: Starts a kernel with the journal in a folder, after the one before has ended.
Start = Callable[[], AbstractContextManager[Local]]


def sequences_end_alike(start: Start, folder: Path, seed: int, kernels: int, steps: int) -> None:
    """Sessions stepped, forked, evicted, saved, loaded, taken back and restarted, in any order,
    end as if left alone."""
    rng = random.Random(seed)
    live: list[tuple[str, int]] = []
    for life in range(kernels):
        with start() as local:
            if not life:
                prompts = [prompt_of(local, c, 5, seed + i) for i, c in enumerate((0.5, 1.4))]
                references = references_of(local, prompts)
                for made in local.server.sessions().index:
                    local.server.attach(made).terminate()
                live = [(p.launch(local).id, i) for i, p in enumerate(prompts)]
            sessions = [(local.server.attach(key), which) for key, which in live]
            assert all(session.newest.dormant or not life or not session.newest.forward
                       for session, _ in sessions)  # fmt: skip
            _walk(rng, local, sessions, folder / str(life), steps)
            live = [(session.id, which) for session, which in sessions]
            if life < kernels - 1:
                continue
            for session, which in sessions:
                ends_as(session, prompts[which], references[which])
                session.terminate()


def _walk(
    rng: random.Random,
    local: Local,
    sessions: list[tuple[Session, int]],
    folder: Path,
    steps: int,
) -> None:
    for step in range(steps):
        session, which = rng.choice(sessions)
        status, choice = session.status, rng.randrange(10)
        if choice < 3 and status != "finished":
            rng.choice([session.next, session.step_out, session.step_in])()
        elif choice == 3 and status != "finished":
            session.run_to(rng.randrange(local.num_layers))
        elif choice == 4 and session.newest.forward and status in ("stopped", "finished"):
            forward = rng.randrange(session.newest.forward)
            session.rewind(forward, rng.randrange(local.num_layers))
        elif choice == 5 and len(sessions) < 6:
            sessions.append((session.fork(), which))
        elif choice == 6 and len(sessions) < 6:
            path = session.save(folder.with_name(f"{folder.name}-{step}"))
            sessions.append((local.server.load(path), which))
        elif choice == 7 and status in ("stopped", "finished") and not session.newest.dormant:
            if local.kernel.state.residency.slots["host"].capacity:
                ask(session, m.Evict, to=rng.choice(["host", "disk"]))
        elif choice == 8:
            session.go_to(rng.choice(session.branches()).number)
        elif status == "stopped" and session.stop is not None:
            session.stop.edit(scale=0.5)
            session.stop.undo()


def an_edited_stop_comes_back(start: Start, folder: Path) -> None:
    """Value, logits and what follows at a stop with edits on the way and there, in every way."""
    with start() as local:
        session = prompt_of(local, 1.4, new_tokens=6).launch(local)
        session.run_to("layers.1.output").edit(add=np.ones(_hidden(local), np.float32), alpha=0.5)
        stop = session.run_to("logits")
        stop.edit(scale=1.5)
        site = session.run_to("layers.2.middle")
        site.edit(scale=0.75, tokens=-1)
        site.edit(scale=1.25, sticky=True)
        stop = session.run_to("layers.3.output")
        stop.edit(zero=True, channels=[1, 3])
        value, logits = stop.value.numpy(), session.logits
        expected = session.fork()
        expected.continue_()
        ends = expected.tokens, expected.logits
        recipe = session.recipe()
        path = recipe.save(folder / "saved")
        key = session.id
    with start() as local:
        loaded = local.server.load(path)
        for again in (local.server.attach(key), loaded):
            stop = again.stop
            assert isinstance(stop, Stopped) and stop.location == "layers.3.output"
            assert different(stop.value.numpy(), value) == 0
            assert different(again.logits, logits) == 0
            assert [e.description for e in again.newest.edits] == [
                e.description for e in loaded.newest.edits
            ]
            again.continue_()
            assert again.tokens == ends[0] and different(again.logits, ends[1]) == 0
        replayed = local.server.replay(path)
        assert replayed.same and replayed.stops == 4
        for session_id in local.server.sessions().index:
            local.server.attach(session_id).terminate()


def what_is_compared_with_the_location_before_is_compared_again(start: Start) -> None:
    """A data breakpoint on the lens's top token stops at the same places, whatever came between."""

    def watched(local: Local) -> Session:
        session = prompt_of(local, 1.4, new_tokens=4).launch(local)
        session.break_when(top_token_changes=True)
        return session

    with start() as local:
        expected = _places(watched(local))
        assert len(expected) > 6, "the control: it stops often enough to miss one"
        keys = []
        for stops in (1, 2, len(expected) - 2):
            session = watched(local)
            for _ in range(stops):
                session.continue_()
            keys.append((session.id, stops))
        late = prompt_of(local, 1.4, new_tokens=4).launch(local)
        late.run_to("layers.2.output")
        late.break_when(top_token_changes=True)  # which has read nothing in this forward
        told = _places(late.fork())
    with start() as local:
        for key, stops in keys:
            assert _places(local.server.attach(key)) == expected[stops:]
        assert _places(local.server.attach(late.id)) == told
        back = watched(local)
        _places(back)
        first = next(i for i, place in enumerate(expected) if place[0] and place[1])
        back.rewind(expected[first][0], f"layers.{expected[first][1]}.middle")
        assert _places(back) == expected[first:]
        for session_id in local.server.sessions().index:
            local.server.attach(session_id).terminate()


def a_pin_outlives_its_kernel(start: Start) -> None:
    """Of two sessions left alone after a restart, only the pinned one has no lease.

    Starts kernels with a lease of `lease_cases.LEASE_S`.
    """
    with start() as local:
        prompt = prompt_of(local, 1.4, new_tokens=4)
        (reference,) = references_of(local, [prompt])
        pinned, other = (prompt.launch(local) for _ in range(2))
        for session in (pinned, other):
            session.run_to("layers.2.output")
        pinned.pin()
        keys = pinned.id, other.id
    with start() as local:
        pinned, other = map(local.server.attach, keys)
        assert pinned.residency.pinned and not other.residency.pinned
        assert pinned.newest.dormant and not pinned.residency.pages
        for session in (pinned, other):
            session.restore()
        let_rest(local, other)
        assert not is_at_rest(local, pinned)
        with pytest.raises(NotSupported, match="pinned"):
            pinned.evict()
        assert pinned.residency.is_resident and not pinned.refresh().dormant
        pinned.pin(False)
    with start() as local:
        pinned, other = map(local.server.attach, keys)
        assert not pinned.residency.pinned
        for session in (pinned, other):
            ends_as(session, prompt, reference)
        for session_id in local.server.sessions().index:
            local.server.attach(session_id).terminate()


def _places(session: Session) -> list[tuple[int, int, list[int]]]:
    """Forward, layer and tokens of every stop from here on, at the outputs of layers."""
    found = []
    while isinstance(stop := session.continue_(), Stopped):
        found.append((stop.forward, int(stop.location.split(".")[1]), stop.hit_tokens))
    return found


def _hidden(local: Local) -> int:
    return local.kernel.info.hidden_size
