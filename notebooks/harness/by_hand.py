"""Edits made by hand: forward hooks on stock transformers, the way one edits without a debugger.

The baseline that edits are compared with. A hook sees one layer's tensor and has to know by itself
which positions it holds; the arithmetic is float32, rounded once, as an edit's is.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from notebooks.harness import stock
from notebooks.harness.exactness import Trace
from notebooks.harness.inprocess import Local

Floats = np.ndarray[Any, np.dtype[np.float32]]
#: (tensor [tokens, channels] in float32, position of its first token) → the tensor instead.
Change = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class ByHand:
    """A change of what a layer hands on, or of the heads before the output projection mixes them.

    by_hand = ByHand(16, added(direction, 2.0))
    """

    layer: int
    change: Change
    site: Literal["output", "attention.heads"] = "output"


# -- changes --------------------------------------------------------------------------------------


def added(vector: Floats, alpha: float) -> Change:
    """Add a vector [channels] to every token."""
    given = torch.as_tensor(vector)
    return lambda x, first: x + alpha * given.to(x.device)


def scaled(factor: float) -> Change:
    """Multiply every token."""
    return lambda x, first: x * factor


def without(direction: Floats) -> Change:
    """Take the part along a direction [channels] from every token."""
    given = torch.as_tensor(direction, dtype=torch.float64)
    unit = (given / given.norm()).float()

    def change(x: Tensor, first: int) -> Tensor:
        along = unit.to(x.device)
        return x - (x @ along)[:, None] * along

    return change


def put(rows: Mapping[int, Tensor | float]) -> Change:
    """Put other vectors [channels], or a number, at some positions."""

    def change(x: Tensor, first: int) -> Tensor:
        x = x.clone()
        for position, value in rows.items():
            if first <= position < first + len(x):
                x[position - first] = value.to(x) if isinstance(value, Tensor) else value
        return x

    return change


def without_head(head: int, head_dim: int) -> Change:
    """Zero the channels of one head, of every token."""

    def change(x: Tensor, first: int) -> Tensor:
        x = x.clone()
        x[:, head * head_dim : (head + 1) * head_dim] = 0.0
        return x

    return change


# -- runs -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def hooked(local: Local, model: PreTrainedModel, *edits: ByHand) -> Iterator[None]:
    """Stock transformers with these changes, from a prompt's first token on.

    Raises AttributeError where a layer has no `self_attn.o_proj` and a head is to be changed.
    """
    layers = list(model.get_submodule(local.model.anatomy.layers_path).children())
    handles = []
    for edit in edits:
        layer, changed = layers[edit.layer], _counting(edit.change)
        if edit.site == "output":
            handles.append(layer.register_forward_hook(_after(changed)))
        else:
            projection = layer.get_submodule("self_attn.o_proj")
            handles.append(projection.register_forward_pre_hook(_before(changed)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits_of(
    local: Local,
    model: PreTrainedModel,
    ids: Sequence[int],
    tokens: Sequence[int],
    *edits: ByHand,
) -> Floats:
    """Stock logits [forwards, vocabulary] under the hooks, fed what a session generated."""
    with hooked(local, model, *edits):
        return stock.forced_logits(model, ids, tokens)


@torch.inference_mode()
def residual(local: Local, model: PreTrainedModel, layer: int, ids: Sequence[int]) -> Tensor:
    """What a layer of stock transformers hands on for a prompt: [tokens, hidden]."""
    taken: list[Tensor] = []

    def take(x: Tensor, first: int) -> Tensor:
        taken.append(x.clone())
        return x

    with hooked(local, model, ByHand(layer, take)):
        model(torch.tensor([list(ids)], device=model.device), use_cache=False, logits_to_keep=1)
    return taken[0]


@torch.inference_mode()
def decode_ms(model: PreTrainedModel, ids: Sequence[int], new_tokens: int) -> float:
    """Milliseconds per greedy decode of stock transformers after a prompt, hooks as they are."""
    cache = DynamicCache(config=model.config)
    feed, began = torch.tensor([list(ids)], device=model.device), 0.0
    for forward in range(new_tokens):
        output = model(feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        # Reading the token waits for the device, as drawing it has to.
        feed = torch.tensor([[int(output.logits[0, -1].argmax())]], device=model.device)
        if forward == 0:
            began = time.perf_counter()
    return 1e3 * (time.perf_counter() - began) / (new_tokens - 1)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A session beside the same edits by hand.

    distance: by forward, as in `stock`. differ: tokens other than those of the largest logits by
    hand; as each forward is fed the session's own tokens, 0 means that a run by hand draws the
    same ones. decided, decided_differ: only where the two best logits lie apart.
    """

    distance: tuple[float, ...]
    differ: int
    decided: int
    decided_differ: int


def compare(trace: Trace, by_hand: Floats, dtype: str) -> Comparison:
    """Hold a session's logits and tokens against those by hand."""
    wrong = np.array(trace.tokens) != by_hand.argmax(-1)
    open_ = stock.undecided(by_hand, stock.TOLERANCE[dtype])
    return Comparison(
        distance=tuple(float(far) for far in stock.distance(trace.logits, by_hand)),
        differ=int(wrong.sum()),
        decided=int((~open_).sum()),
        decided_differ=int((wrong & ~open_).sum()),
    )


def _counting(change: Change) -> Callable[[Tensor], Tensor]:
    """The change of [1, tokens, channels]; counts the tokens it has seen."""
    seen = 0

    def changed(x: Tensor) -> Tensor:
        nonlocal seen
        first, seen = seen, seen + x.shape[1]
        return change(x[0].float(), first).to(x.dtype)[None]

    return changed


def _after(changed: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (changed(output[0]), *output[1:])
        return changed(output)

    return hook


def _before(changed: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        return (changed(inputs[0]), *inputs[1:])

    return hook
