"""Stops many sessions, keeps a checksum of each one's keys and values, and resumes them.

What is compared is the bits: every logit of every forward after the stop with the session's
reference run, and every page with what it held when the session stopped. Where pages were in the
meantime is watched in `tier_watch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from djinn_nb import Finished, Session, Stopped
from kernel_server.protocol import messages as m
from kernel_server.state import tensor_bytes
from notebooks.harness.exactness import Prompt, Trace, Watch, different
from notebooks.harness.inprocess import Local


@dataclass(frozen=True, slots=True)
class Extent:
    """The part of a session's pages that is computed: `after` tokens in the first `layers` layers
    of the model, `before` in the others."""

    layers: int
    after: int
    before: int


@dataclass(frozen=True, slots=True)
class Sums:
    """A checksum per page, and how many bytes they were taken of."""

    pages: tuple[int, ...]
    nbytes: int

    def differ_from(self, other: Sums) -> int:
        """Pages whose checksum is another."""
        wrong = sum(a != b for a, b in zip(self.pages, other.pages, strict=False))
        return wrong + abs(len(self.pages) - len(other.pages))


@dataclass(frozen=True, slots=True)
class Held:
    """A stopped session with what it must come to.

    activation_bytes: of the residual stream it holds.
    """

    session: Session
    prompt: Prompt
    reference: Trace
    forward: int
    extent: Extent
    sums: Sums
    num_pages: int
    activation_bytes: int


@dataclass(frozen=True, slots=True)
class Resumed:
    """What a resumed session came to. differ: logits and tokens unlike the reference run's."""

    differ: int
    torn: int
    new_tokens: int


def extent_of(info: m.SessionInfo) -> Extent:
    """What of a stopped session's pages is computed."""
    assert info.stop is not None, f"session {info.id} is {info.status}"
    return Extent(info.layers_executed, info.stop.end_token, info.stop.first_token)


def checksums(local: Local, session_id: str, extent: Extent) -> Sums:
    """Sums of the computed rows of every page of a session whose pages are on the device.

    The sum of all 32-bit words, each times an odd number of its own, modulo 2⁶⁴: no change of one
    word keeps it, and one of many words does with a chance of 2⁻⁶⁴.
    """
    state, cache = local.kernel.state, local.cache
    shape = cache.shape
    words = cache.pool.view(torch.int32)  # [pages, group_layers, 2, page_tokens, words of a row]
    odd = odd_numbers(words.shape[1:], words.device)
    found: list[Tensor] = []
    nbytes = 0
    for group, table in enumerate(state.sessions[session_id].tables):
        first = group * shape.group_layers
        done = min(max(extent.layers - first, 0), shape.group_layers)
        in_group = min(shape.group_layers, local.num_layers - first)
        parts = ((slice(0, done), extent.after), (slice(done, in_group), extent.before))
        # pages that a later forward adds hold nothing of what is computed here
        tokens = max(count for layers, count in parts if layers.start < layers.stop)
        for number, page in enumerate(table[: shape.pages_for(tokens)]):
            content = words[state.residency.device_slot(page)]
            total = torch.zeros((), dtype=torch.int64, device=words.device)
            for layers, count in parts:
                rows = min(max(count - number * shape.page_tokens, 0), shape.page_tokens)
                part = content[layers, :, :rows]
                total = total + (part.to(torch.int64) * odd[layers, :, :rows]).sum()
                nbytes += part.numel() * 4
            found.append(total)
    return Sums(tuple(torch.stack(found).tolist()), nbytes)


def hold(local: Local, prompt: Prompt, reference: Trace, layer: int, forward: int) -> Held:
    """Launch a session and stop it after `layer` in this forward."""
    session = prompt.launch(local)
    session.break_at(layer, ignore=forward, once=True)
    stop = session.continue_()
    assert isinstance(stop, Stopped) and stop.reason == "breakpoint", stop
    assert stop.forward == forward, stop
    info = session.refresh()
    extent = extent_of(info)
    sums = checksums(local, session.id, extent)
    rows = extent.after - extent.before
    width = local.server.model.hidden_size * local.cache.shape.dtype.itemsize
    return Held(session, prompt, reference, forward, extent, sums, info.num_pages, rows * width)


def resume(local: Local, watch: Watch, held: Held) -> Resumed:
    """Continue a stopped session to its end and compare; ends it.

    At its end all its pages are on the device, and no row that was computed before the stop is
    written again: the checksums are taken there, of what the resumed forwards have read.
    """
    watch.logits.clear()
    end = held.session.continue_()
    assert isinstance(end, Finished), end
    tokens = tuple(held.session.tokens[len(held.prompt.ids) :])
    logits = np.concatenate(watch.logits)
    wrong = different(logits, held.reference.logits[held.forward :])
    wrong += different(held.session.logits, held.reference.last)
    wrong += sum(a != b for a, b in zip(tokens, held.reference.tokens, strict=False))
    wrong += abs(len(tokens) - len(held.reference.tokens))
    torn = checksums(local, held.session.id, held.extent).differ_from(held.sums)
    held.session.terminate()
    return Resumed(wrong, torn, len(logits))


def evict(session: Session, to: str = "host") -> m.SessionInfo:
    """Have a session's pages leave the device; returns when they have."""
    return session.client.call(m.Evict(session_id=session.id, to=to), m.SessionReply).session  # type: ignore[arg-type]


def restore(session: Session) -> m.SessionInfo:
    """Have a session's pages come to the device; returns when they have."""
    return session.client.call(m.Restore(session_id=session.id), m.SessionReply).session


def zero_host_page(local: Local, session: Session) -> int:
    """Set to zero a page, off the device, that going on needs; returns how many bytes changed."""
    state = local.kernel.state
    inside = state.sessions[session.id]
    layer = min(session.layers_executed, local.num_layers - 1)
    page = inside.tables[layer // local.cache.shape.group_layers][0]
    place = state.residency.place(page)
    pool = local.kernel.tiers._host
    assert pool is not None and place.device is None and place.host is not None, place
    content = pool.slot(place.host)
    changed = int((content != 0).sum())
    content.zero_()
    return changed


def beside_bytes(local: Local, sessions: int, prompt: Prompt, *, in_prefill: bool) -> int:
    """Bytes at most, as the kernel counts them, of the tensors that stopped sessions hold beside
    their pages while one of them runs and keeps the stop that it left."""
    shape = local.kernel.state.shape
    points, tokens = shape.num_layers + 1, len(prompt.ids)
    one = tensor_bytes.forward_bytes(shape, tokens if in_prefill else 1)
    one += tensor_bytes.figures(points, tokens)
    running = tensor_bytes.forward_bytes(shape, tokens)
    running += prompt.new_tokens * tensor_bytes.figures(points, 1)
    return sessions * one + 2 * running


def pressure(sessions: Sequence[Held], local: Local) -> float:
    """Bytes that stopped sessions hold ÷ bytes of pages the device has."""
    return sum(held.num_pages for held in sessions) / local.cache.num_pages


def is_a_test(demand: float) -> str:
    """What a run shows: nothing about pressure, unless more was held than the device has."""
    return "a test" if demand > 1 else "not a test"


def odd_numbers(shape: Sequence[int], device: Any) -> Tensor:
    """An odd 64-bit number for each word, for a checksum."""
    count = int(np.prod(shape))
    # any odd multiplier spreads the numbers over all 64 bits
    numbers = torch.arange(count, dtype=torch.int64, device=device) * -7046029254386353131
    return (numbers | 1).view(tuple(shape))
