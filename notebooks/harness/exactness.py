"""Runs a prompt with and without stops and compares every logit, bit for bit.

The layers that ran are counted by hooks on the stock layers, and the logits of every forward are
noted where the model's own head returns them: both see what the model computed, whatever the engine
says about it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from djinn_nb import Session, Stopped
from notebooks.harness.inprocess import Local

Floats = np.ndarray[Any, np.dtype[np.float32]]


def different(left: Any, right: Any) -> int:
    """How many elements of two float32 arrays differ in their bits; all, if the shapes differ."""
    left, right = np.asarray(left, np.float32), np.asarray(right, np.float32)
    if left.shape != right.shape:
        return max(left.size, right.size, 1)
    return int((left.view(np.uint32) != right.view(np.uint32)).sum())


@dataclass(slots=True)
class Watch:
    """What the model did: layers in the order they ran, and the head's logits by forward."""

    layers: list[int] = field(default_factory=list)
    logits: list[Floats] = field(default_factory=list)
    #: puts the hooks on again
    attach: Callable[[], None] = field(default=lambda: None, repr=False)
    detach: Callable[[], None] = field(default=lambda: None, repr=False)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Without any hook for a while: they are in the way of what is timed, and a hooked layer
        does not run as a graph."""
        self.detach()
        try:
            yield
        finally:
            self.attach()


@contextlib.contextmanager
def watching(local: Local, layers: bool = True) -> Iterator[Watch]:
    """Hook the stock layers of the model that the kernel runs, and listen to its head.

    layers: False to listen to the head alone; on a GPU, layers without hooks run as graphs.
    """
    watch = Watch()
    model = local.model
    head = model.head

    def note_layer(index: int) -> Callable[..., None]:
        return lambda module, inputs, output: watch.layers.append(index)

    def note_head(*given: Any) -> Tensor:
        logits = head(*given)
        watch.logits.append(logits.detach().float().cpu().numpy())
        return logits

    hooks: list[Any] = []

    def attach() -> None:
        hooks[:] = [
            layer.register_forward_hook(note_layer(i))
            for i, layer in enumerate(model.layers if layers else ())
        ]
        model.head = note_head  # type: ignore[method-assign, assignment]

    def detach() -> None:
        del model.head
        for hook in hooks:
            hook.remove()

    watch.attach, watch.detach = attach, detach
    attach()
    try:
        yield watch
    finally:
        detach()


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a session is launched with."""

    ids: tuple[int, ...]
    new_tokens: int
    temperature: float = 0.0
    seed: int = 0

    def launch(self, local: Local) -> Session:
        return local.server.launch(
            list(self.ids),
            max_new_tokens=self.new_tokens,
            temperature=self.temperature,
            seed=self.seed if self.temperature else None,
        )


@dataclass(frozen=True, slots=True)
class Trace:
    """What a finished run computed.

    tokens: the generated ones. logits: the head's output by forward, [forwards, vocabulary].
    last: the logits the session reports at its end, [vocabulary]. layers: its layer calls in order.
    stops: by stop (forward, location, distinct layers that ran in this forward by the hooks, the
    number the session states). value: residual at the first stop, [tokens, hidden], if asked for.
    """

    tokens: tuple[int, ...]
    logits: Floats
    last: Floats
    layers: tuple[int, ...]
    stops: tuple[tuple[int, str, int, int], ...]
    value: Any = None

    def differs_from(self, other: Trace) -> int:
        """Logits whose bits differ and tokens that differ, over all forwards."""
        tokens = sum(a != b for a, b in zip(self.tokens, other.tokens, strict=False))
        tokens += abs(len(self.tokens) - len(other.tokens))
        return different(self.logits, other.logits) + different(self.last, other.last) + tokens


def reference_run(local: Local, watch: Watch, prompt: Prompt) -> Trace:
    """The session alone and uninterrupted."""
    return stopped_run(local, watch, prompt)


def stopped_run(
    local: Local, watch: Watch, prompt: Prompt, *locations: int | str, look: bool = False
) -> Trace:
    """The session with a breakpoint at each location, continued from every stop of every forward.

    look: fetch the residual stream at the first stop.
    """
    session = prompt.launch(local)
    for location in locations:
        session.break_at(location)
    watch.layers.clear()
    watch.logits.clear()
    began: dict[int, int] = {}
    stops: list[tuple[int, str, int, int]] = []
    value = None
    calls = layer_calls(local, len(prompt.ids))
    while isinstance(stop := session.continue_(), Stopped):
        # Where this forward began in the log of the hooks: after all calls of those before it.
        first = began.setdefault(stop.forward, sum(len(calls(f)) for f in range(stop.forward)))
        ran = len(set(watch.layers[first:]))
        stops.append((stop.forward, stop.location, ran, session.layers_executed))
        if look and value is None:
            value = stop.value.numpy()
    return finish(watch, session, len(prompt.ids), tuple(stops), value)


def finish(
    watch: Watch,
    session: Session,
    num_prompt_tokens: int,
    stops: tuple[tuple[int, str, int, int], ...] = (),
    value: Any = None,
) -> Trace:
    """The trace of a finished session, which is then ended."""
    last = session.logits
    assert last is not None
    trace = Trace(
        tokens=tuple(session.tokens[num_prompt_tokens:]),
        logits=np.concatenate(watch.logits),
        last=last,
        layers=tuple(watch.layers),
        stops=stops,
        value=value,
    )
    session.terminate()
    return trace


def layer_calls(local: Local, num_prompt_tokens: int) -> Callable[[int], list[int]]:
    """forward → the layer calls it must make: every chunk passes a layer before any enters the
    next, and no layer runs twice."""
    chunks = -(-num_prompt_tokens // local.segments.prefill_chunk)

    def of(forward: int) -> list[int]:
        times = chunks if forward == 0 else 1
        return [index for index in range(local.num_layers) for _ in range(times)]

    return of


def misplaced_calls(local: Local, trace: Trace, num_prompt_tokens: int) -> int:
    """Layer calls of a run that are missing, repeated or out of order."""
    calls = layer_calls(local, num_prompt_tokens)
    expected = [index for f in range(len(trace.tokens)) for index in calls(f)]
    wrong = sum(a != b for a, b in zip(expected, trace.layers, strict=False))
    return wrong + abs(len(expected) - len(trace.layers))


def finish_and_compare(session: Session, reference: Trace, num_prompt_tokens: int) -> int:
    """Continue a session from stop to stop to its end; what differs from its reference run.

    Compares the logits it reports at every stop and at the end, and its tokens. Ends the session.
    """
    wrong = 0
    while isinstance(stop := session.continue_(), Stopped):
        if stop.forward > 0:
            wrong += different(session.logits, reference.logits[stop.forward - 1])
    wrong += different(session.logits, reference.logits[-1])
    wrong += tuple(session.tokens[num_prompt_tokens:]) != reference.tokens
    session.terminate()
    return wrong


def random_ids(count: int, vocabulary: int, seed: int) -> tuple[int, ...]:
    """Token ids spread over the vocabulary, without the special ones at its beginning."""
    generator = torch.Generator().manual_seed(seed)
    low = min(10, vocabulary - 1)
    return tuple(torch.randint(low, vocabulary, (count,), generator=generator).tolist())
