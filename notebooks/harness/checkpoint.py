"""What it costs to have a stopped session leave the device and come back, in parts.

Deciding and beginning (*dispatch*), the copy down and the copy up are timed apart: the first by the
wall clock where the work is given out, the copies by events of the device. Baselines move as many
bytes: tensor by tensor, as a script would, and in one copy.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from djinn_nb import Finished, Session, Stopped
from notebooks.harness import latency
from notebooks.harness.exactness import Prompt, Trace, Watch, different
from notebooks.harness.faults import instead
from notebooks.harness.inprocess import Local
from notebooks.harness.pressure import evict, restore
from notebooks.harness.tier_watch import tick, wait_until_settled


@dataclass(slots=True)
class Cost:
    """One session out and back, repeated; lists have an entry per repetition.

    unlike: logits that differ from the reference run's after going on.
    """

    nbytes: int = 0
    dispatch_ms: list[float] = field(default_factory=list)
    evict_ms: list[float] = field(default_factory=list)
    restore_ms: list[float] = field(default_factory=list)
    evict_gb_s: list[float] = field(default_factory=list)
    restore_gb_s: list[float] = field(default_factory=list)
    unlike: int = 0


def stop_at(local: Local, prompt: Prompt, layer: int, forward: int) -> Session:
    """Launch a session and stop it after a layer of this forward."""
    session = prompt.launch(local)
    session.break_at(layer, ignore=forward, once=True)
    stop = session.continue_()
    assert isinstance(stop, Stopped) and stop.reason == "breakpoint", stop
    assert stop.forward == forward, stop
    return session


def rest_unlike(watch: Watch, session: Session, reference: Trace, forward: int) -> int:
    """Run a session on from a stop in this forward to its end; logits and tokens that differ from
    its reference run's."""
    watch.logits.clear()
    end = session.continue_()
    assert isinstance(end, Finished), end
    count = len(reference.tokens)
    wrong = different(np.concatenate(watch.logits), reference.logits[forward:])
    return wrong + sum(
        a != b for a, b in zip(session.tokens[-count:], reference.tokens, strict=True)
    )


@contextlib.contextmanager
def no_write_behind(local: Local) -> Iterator[None]:
    """Nothing is copied down beforehand."""
    wait_until_settled(local)
    with instead(local.kernel.state, "write_behind", lambda: None):
        yield


@contextlib.contextmanager
def _beginnings(local: Local) -> Iterator[list[float]]:
    """Seconds the engine's thread takes to begin each copy."""
    copier = local.kernel.engine._copier
    assert copier is not None, "this kernel has one tier"
    begin, found = copier.begin, list[float]()

    def note(copy: Any) -> None:
        began = time.perf_counter()
        begin(copy)
        found.append(time.perf_counter() - began)

    with instead(copier, "begin", note):
        yield found


def out_and_back(
    local: Local, watch: Watch, prompt: Prompt, reference: Trace, layer: int, forward: int,
    repetitions: int,
) -> Cost:  # fmt: skip
    """Evict a stopped session nothing of which is copied yet, restore it, run on to the logits.

    The first time is not counted: it warms up.
    """
    found = Cost()
    with no_write_behind(local), latency.timing(local) as clock, _beginnings(local) as begun:
        for _ in range(repetitions + 1):
            session = stop_at(local, prompt, layer, forward)
            with latency.copy_spans(local) as spans:
                begun.clear()
                evict(session)
                found.dispatch_ms.append((clock.handled_s + sum(begun)) * 1e3)
                restore(session)
                wait_until_settled(local)
            found.nbytes = sum(n for way, n, _, _ in spans.copies if way == "device-host")
            found.evict_ms.append(spans.milliseconds("device-host"))
            found.restore_ms.append(spans.milliseconds("host-device"))
            found.evict_gb_s.append(spans.rate("device-host"))
            found.restore_gb_s.append(spans.rate("host-device"))
            watch.logits.clear()
            session.step_out()
            wanted = reference.logits[forward : forward + 1]
            found.unlike += different(watch.logits[-1], wanted)
            session.terminate()
    for times in (found.dispatch_ms, found.evict_ms, found.restore_ms):
        del times[0]
    del found.evict_gb_s[0], found.restore_gb_s[0]
    return found


def by_tensor(device: str, nbytes: int, pieces: int, repetitions: int) -> dict[str, list[float]]:
    """Milliseconds of moving so many bytes tensor by tensor with `.cpu()` and `.to(device)`.

    On a CPU, where these would move nothing, each tensor is cloned.
    """
    cuda = device.startswith("cuda")
    size = max(1, nbytes // pieces)
    there = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(pieces)]
    found: dict[str, list[float]] = {"device-host": [], "host-device": []}
    for _ in range(repetitions + 1):
        began = _now(cuda)
        here = [piece.cpu() if cuda else piece.clone() for piece in there]
        found["device-host"].append(1e3 * (_now(cuda) - began))
        began = _now(cuda)
        there = [piece.to(device) if cuda else piece.clone() for piece in here]
        found["host-device"].append(1e3 * (_now(cuda) - began))
    for times in found.values():
        del times[0]
    return found


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def uncopied_pages(local: Local, prompt: Prompt, layer: int) -> int:
    """Pages of a stopped session that have no copy below once nothing is being copied."""
    session = stop_at(local, prompt, layer, 1)
    count = without_a_copy(local, session)
    session.terminate()
    return count


def without_a_copy(local: Local, session: Session) -> int:
    """Pages of a session that have no copy below, once nothing is being copied."""
    tick(local)
    wait_until_settled(local)
    state = local.kernel.state
    pages = {p for table in state.sessions[session.id].tables for p in table}
    return len(pages & state.residency.dirty)
