"""A session leaves without a copy, another writes where its pages were, and it comes back.

An eviction is *clean* when every page was copied down before it is asked for. That the device's
slots were free to be used then is looked at in the slots themselves: by a checksum of each, before
and after somebody else has used them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from djinn_nb import Session
from notebooks.harness import latency
from notebooks.harness.checkpoint import rest_unlike, stop_at, without_a_copy
from notebooks.harness.exactness import Prompt, Trace, Watch
from notebooks.harness.inprocess import Local
from notebooks.harness.pressure import evict, odd_numbers


@dataclass(slots=True)
class CleanEvictions:
    """Evictions of sessions whose pages were all copied before; lists have an entry per repetition.

    uncopied: pages that had no copy when the eviction was asked for.
    """

    request_ms: list[float] = field(default_factory=list)
    decided_ms: list[float] = field(default_factory=list)
    uncopied: int = 0


@dataclass(slots=True)
class Taken:
    """What became of the slots that a session had.

    changed: slots that hold other bytes than it left there. unlike: logits and tokens that differ
    from its reference run's after it has come back and gone on.
    """

    slots: int
    changed: int
    unlike: int


def clean_evictions(
    local: Local, prompt: Prompt, layer: int, repetitions: int
) -> tuple[CleanEvictions, Session, tuple[int, ...]]:
    """Evict sessions all of whose pages are copied; also the last of them, and the slots it had.

    The first time is not counted: it warms up.
    """
    found = CleanEvictions()
    for number in range(repetitions + 1):
        session = stop_at(local, prompt, layer, 1)
        found.uncopied += without_a_copy(local, session)
        slots = slots_of(local, session)
        with latency.timing(local) as clock:
            took = latency.timed_ms(local, evict, session)
            decided = clock.handled_s * 1e3
        assert session.refresh().device_pages == 0, "pages of an evicted session are there still"
        if number:
            found.request_ms.append(took)
            found.decided_ms.append(decided)
        if number < repetitions:
            session.terminate()
    return found, session, slots


def taken_by(
    local: Local, watch: Watch, session: Session, slots: Sequence[int], reference: Trace,
    other: Prompt, layer: int,
) -> Taken:  # fmt: skip
    """Let `other` take the slots that an evicted session had, then let that one go on to its end.

    What is taken together is taken from the shortest gap that holds it, so a session with as many
    pages takes those that were left, where no other gap is as short.
    Ends both.
    """
    before = sums_of(local, slots)
    taker = stop_at(local, other, layer, 1)
    changed = sum(a != b for a, b in zip(before, sums_of(local, slots), strict=True))
    unlike = rest_unlike(watch, session, reference, 1)
    session.terminate()
    taker.terminate()
    return Taken(len(slots), changed, unlike)


def slots_of(local: Local, session: Session) -> tuple[int, ...]:
    """The device's slots that hold a session's pages, all of which must be there."""
    state = local.kernel.state
    tables = state.sessions[session.id].tables
    return tuple(state.residency.device_slot(page) for table in tables for page in table)


def sums_of(local: Local, slots: Sequence[int]) -> list[int]:
    """A checksum of all bytes of each of these slots of the device.

    The sum of all 32-bit words, each times an odd number of its own, modulo 2⁶⁴.
    """
    words = local.cache.pool.view(torch.int32)
    odd = odd_numbers(words.shape[1:], words.device)
    totals = [(words[slot].to(torch.int64) * odd).sum() for slot in slots]
    found: list[int] = torch.stack(totals).tolist()  # one wait for the device
    return found
