"""Faults planted on purpose, each in one running kernel and for one `with` only.

They replace methods of *instances* (this kernel's segments, this kernel's model), so the code that
is shipped has no switch for them and another kernel of the process is untouched. Whether a fault
changes a bit on this device is measured by the notebook, not assumed here.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernel_server.engine import attention
from kernel_server.engine.segments import ForwardState
from notebooks.harness.inprocess import Local

#: (kernel, layer of the stop) → a context in which the fault is in place
Fault = Callable[[Local, int], contextlib.AbstractContextManager[None]]


@contextlib.contextmanager
def instead(target: Any, name: str, function: Any) -> Iterator[None]:
    """Let an instance answer to `name` with `function` for the time of a `with`; one may lie
    within another."""
    before = vars(target).get(name)
    setattr(target, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(target, name)
        else:
            setattr(target, name, before)


@contextlib.contextmanager
def eager_attention(local: Local, layer: int) -> Iterator[None]:
    """A second execution path: layers after `layer` attend by the eager function, not by SDPA."""
    call_layer = local.model.call_layer

    def call(index: int, hidden: Tensor, given: Any) -> Tensor:
        work: Any = attention._WORK.get()
        if index <= layer or work is None:
            return call_layer(index, hidden, given)
        before, work.eager = work.eager, not work.eager
        try:
            return call_layer(index, hidden, given)
        finally:
            work.eager = before

    with instead(local.model, "call_layer", call):
        yield


@contextlib.contextmanager
def other_chunks(local: Local, layer: int) -> Iterator[None]:
    """A second execution path: layers after `layer` run a long prompt in chunks half the size."""
    segments = local.segments
    run_layer = segments._layer
    half = segments.prefill_chunk // 2

    def run(state: ForwardState, index: int, work: Any) -> list[Tensor]:
        if index <= layer or len(state.bounds) == 1:
            return run_layer(state, index, work)
        pieces: list[Tensor] = []
        bounds: list[tuple[int, int]] = []
        for (begin, end), hidden in zip(state.bounds, state.residual, strict=True):
            cuts = itertools.pairwise([*range(begin, end, half), end])
            for low, high in cuts:
                bounds.append((low, high))
                pieces.append(hidden[:, low - begin : high - begin].contiguous())
        recording = copy.copy(segments._recorded(state))
        recording.cuts = {}  # kept slices are of whole chunks
        cut = replace(state, bounds=tuple(bounds), residual=pieces, recording=recording)
        outputs = run_layer(cut, index, work)
        joined = []
        for begin, end in state.bounds:
            parts = [o for o, (a, _) in zip(outputs, bounds, strict=True) if begin <= a < end]
            joined.append(torch.cat(parts, 1))
        return joined

    with instead(segments, "_layer", run):
        yield


@contextlib.contextmanager
def no_final_norm(local: Local, layer: int) -> Iterator[None]:
    """A resumed forward goes from the last layer to the head without the final norm."""

    def norm(hidden: Tensor, *rest: Any) -> Tensor:
        return hidden

    with instead(local.model, "norm", norm):
        yield


@contextlib.contextmanager
def one_layer_late(local: Local, layer: int) -> Iterator[None]:
    """A resumed forward goes on one layer too late: layer + 1 is left out."""
    segments = local.segments
    run_layer = segments._layer

    def run(state: ForwardState, index: int, work: Any) -> list[Tensor]:
        if index == layer + 1:
            return list(state.residual)
        return run_layer(state, index, work)

    with instead(segments, "_layer", run):
        yield


@contextlib.contextmanager
def zeroed_page(local: Local, layer: int) -> Iterator[None]:
    """While a session is stopped, the first page of the group of layer + 1 is set to zero.

    Of the session launched last; what was there is put back at the end.
    """
    pool, state = local.cache.pool, local.kernel.state
    session = list(state.sessions.values())[-1]
    group = min(layer + 1, local.num_layers - 1) // local.cache.shape.group_layers
    slot = state.residency.device_slot(session.tables[group][0])
    before = pool[slot].clone()
    pool[slot].zero_()
    try:
        yield
    finally:
        pool[slot].copy_(before)


@contextlib.contextmanager
def shared_pages_written(local: Local, layer: int) -> Iterator[None]:
    """Whoever writes a page that others share writes it in place, without a copy of its own."""
    pool = local.kernel.state.pool
    owners = pool.owners

    def one_at_most(page: int) -> int:
        return min(owners(page), 1)

    with instead(pool, "owners", one_at_most):
        yield
