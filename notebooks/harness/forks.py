"""Many forks of one stopped session: what each costs, and that none of them sees another.

A fork shares its parent's pages until one of the two writes. Pages are counted where they are
handed out, the time is that of a client's call in this process, and the memory of the host is what
Python allocates for a fork on both sides, client and server.
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from djinn_nb import Finished, Session
from notebooks.harness import latency
from notebooks.harness.checkpoint import rest_unlike, stop_at
from notebooks.harness.exactness import Prompt, Trace, Watch, different
from notebooks.harness.inprocess import Local
from notebooks.harness.tier_watch import wait_until_settled

#: Forks of which the memory is asked, and the one that draws other tokens.
BESIDE = 21
#: Forwards that the parent runs ahead of the fork that draws other tokens.
AHEAD = 3
#: New tokens that a prompt must ask for: the parent and a fork have some left when they have met.
NEW_TOKENS = 8
#: At this temperature hardly a token is the greedy one.
_HOT = 5.0


@dataclass(slots=True)
class Overtaken:
    """A parent that ran ahead, and a fork that then drew other tokens at the same positions.

    drawn_otherwise: of the fork's tokens. changed: bytes of the parent's pages that the fork's run
    changed. unlike: logits and tokens of the parent that differ from its reference run's.
    """

    drawn_otherwise: int
    changed: int
    unlike: int


@dataclass(slots=True)
class Family:
    """A stopped session and its forks. Lists have an entry per fork.

    fork_ms: of the client's call. decided_ms: of it, until the server's state had decided.
    unwritten_pages: pages that all forks added before any ran. decode_pages: that one of them added
    when it ran to the logits of the decode it stood in, and after one whole decode more.
    host_bytes: of a fork, by Python's allocator. unlike: logits and tokens of `compared` forks that
    differ from the reference run's. lost_pages: in use at the end and not at the beginning.
    """

    fork_ms: list[float] = field(default_factory=list)
    decided_ms: list[float] = field(default_factory=list)
    unwritten_pages: int = 0
    decode_pages: tuple[int, int] = (0, 0)
    host_bytes: int = 0
    compared: int = 0
    unlike: int = 0
    overtaken: Overtaken | None = None
    lost_pages: int = 0


def pages_in_use(local: Local) -> int:
    """Pages that somebody owns, wherever they lie; one that many share counts once."""
    pool = local.kernel.state.pool
    return pool.num_pages - pool.num_free


def family(
    local: Local, watch: Watch, prompt: Prompt, reference: Trace, layer: int, count: int,
    sample: int = 5,
) -> Family:  # fmt: skip
    """Stop a session in its first decode and fork it `count` times; run `sample` of the forks."""
    found, at_first = Family(), pages_in_use(local)
    parent = stop_at(local, prompt, layer, 1)
    wait_until_settled(local)
    before = pages_in_use(local)
    forks = _timed_forks(local, parent, count, found)
    found.host_bytes = _host_bytes(parent)
    found.unwritten_pages = pages_in_use(local) - before
    running, *others = forks[:: max(1, (count - 1) // sample)][: sample + 1]
    found.decode_pages = _decode(local, watch, running, reference, found)
    # what runs now runs beside pages that the parent and the others share
    found.overtaken = overtaken(local, watch, parent, reference)
    for fork, forward in ((running, 3), *((fork, 1) for fork in others)):
        found.unlike += rest_unlike(watch, fork, reference, forward)
    found.compared = 1 + len(others)
    for session in (*forks, parent):
        session.terminate()
    wait_until_settled(local)
    found.lost_pages = pages_in_use(local) - at_first
    return found


def _timed_forks(local: Local, parent: Session, count: int, found: Family) -> list[Session]:
    forks = []
    with latency.timing(local) as clock:
        for _ in range(count):
            began = time.perf_counter()
            forks.append(parent.fork())
            found.fork_ms.append((time.perf_counter() - began) * 1e3)
            found.decided_ms.append(clock.handled_s * 1e3)
    return forks


def _host_bytes(parent: Session, count: int = BESIDE - 1) -> int:
    """Bytes that Python holds for one more fork, here where client and server share a process.

    Tensors are none of them: a fork has its parent's.
    """
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        made = [parent.fork() for _ in range(count)]
        time.sleep(0.3)  # events come by themselves
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    for fork in made:
        fork.terminate()
    return (after - before) // count


def _decode(
    local: Local, watch: Watch, fork: Session, reference: Trace, found: Family
) -> tuple[int, int]:
    """Run a fork to the logits of its forward and then of the next; the pages it has added by
    then."""
    before = pages_in_use(local)
    added = []
    watch.logits.clear()
    for _ in range(2):
        fork.run_to("logits")
        added.append(pages_in_use(local) - before)
    found.unlike += different(np.concatenate(watch.logits), reference.logits[1:3])
    return added[0], added[1]


def overtaken(local: Local, watch: Watch, parent: Session, reference: Trace) -> Overtaken:
    """Let a stopped parent run ahead and a fork of it draw other tokens; then the parent goes on.

    The fork writes the positions that the parent has written: into pages of its own, or else what
    the parent reads from then on is another run's. Ends the fork; the parent is finished then.
    """
    fork = parent.fork(seed=1, temperature=_HOT)
    stop = parent.newest.stop
    assert stop is not None and len(reference.tokens) == NEW_TOKENS, (stop, reference.tokens)
    first = stop.first_token
    watch.logits.clear()
    for _ in range(AHEAD):
        parent.run_to("logits")
    ahead = list(watch.logits)
    wait_until_settled(local)
    before = _content(local, parent, first)
    end = fork.continue_()
    assert isinstance(end, Finished), end
    changed = sum(
        int((a != b).sum()) for a, b in zip(before, _content(local, parent, first), strict=True)
    )
    count = len(reference.tokens)
    otherwise = sum(a != b for a, b in zip(fork.tokens[-count:], reference.tokens, strict=False))
    fork.terminate()
    unlike = different(np.concatenate(ahead), reference.logits[1 : 1 + AHEAD])
    unlike += rest_unlike(watch, parent, reference, 1 + AHEAD)
    return Overtaken(otherwise, changed, unlike)


def _content(local: Local, session: Session, first: int) -> Sequence[Any]:
    """The bytes of a session's pages from the one that holds this position on."""
    state, shape = local.kernel.state, local.cache.shape
    found = []
    for table in state.sessions[session.id].tables:
        for page in table[first // shape.page_tokens :]:
            slot = state.residency.device_slot(page)
            found.append(local.cache.pool[slot].clone().view(torch.uint8))
    return found
