"""What a recorded forward holds, and how its tensors are cut along the tokens. No model code here.

The *preamble* of a forward (embedding, positions) is recorded once for all its tokens; which axis
of each recorded tensor counts queries is learnt by comparing recordings of two lengths at two
offsets. An axis that counts keys is left whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """The arguments of one layer call besides the residual stream.

    by_name: the residual is passed as the keyword `hidden_states`, else as the first argument.
    """

    rest: tuple[Any, ...]
    keywords: dict[str, Any]
    by_name: bool


@dataclass(slots=True)
class Recording:
    """One recorded forward; a cache, rebuilt bit for bit from token ids and positions.

    embedding: [1, tokens, hidden], the residual stream entering layer 0.
    preamble: outputs of the modules called before layer 0, in order, for replays of one chunk.
    """

    token_ids: Tensor
    positions: Tensor
    calls: list[Call] = field(default_factory=list)
    embedding: Tensor | None = None
    preamble: dict[str, list[Any]] = field(default_factory=dict)
    #: slices made so far, by (tensor, first token, axis): layers that share a tensor share them
    cuts: dict[tuple[int, int, int], Tensor] = field(default_factory=dict, repr=False)

    def forget_embedding(self) -> None:
        """Let go of what only the first layer and the norm of a single chunk need.

        For a long prompt it weighs as much as the residual stream.
        """
        self.embedding = None
        self.preamble = {}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested tuples, lists and dicts, with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def call_leaves(call: Call) -> dict[str, Any]:
    """The leaves of a call's arguments by path."""
    return dict(leaves((call.rest, call.keywords)))


def map_leaves(transform: Callable[[str, Tensor], Any], value: Any, path: str = "") -> Any:
    """The same nesting with every tensor replaced by `transform(path, tensor)`."""
    if isinstance(value, Tensor):
        return transform(path, value)
    if isinstance(value, dict):
        return {key: map_leaves(transform, item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [map_leaves(transform, item, f"{path}[{i}]") for i, item in enumerate(value)]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return type(value)(items)
    return value


def same_value(left: Any, right: Any) -> bool:
    """Bit-equal tensors, equal or identical anything else."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return False
    return left is right or bool(left == right)


def same_call(left: Call, right: Call) -> bool:
    """Whether two recorded calls pass the same values."""
    ours, theirs = call_leaves(left), call_leaves(right)
    return (
        left.by_name == right.by_name
        and ours.keys() == theirs.keys()
        and all(same_value(ours[path], theirs[path]) for path in ours)
    )


class AxesNotFound(Exception):
    """A recorded argument depends on the tokens in a way that cannot be cut into chunks."""


def query_axes(
    short: Call, long: Call, later: Call, lengths: tuple[int, int], offset: int
) -> dict[str, int]:
    """Which axis of each tensor counts the forward's own tokens.

    short, long: recorded at offset 0 with `lengths` tokens; later: the short length at `offset`.
    Returns the axis by leaf path, only for tensors that have one. Raises AxesNotFound.
    """
    axes: dict[str, int] = {}
    first, second, third = call_leaves(short), call_leaves(long), call_leaves(later)
    if not first.keys() == second.keys() == third.keys():
        raise AxesNotFound("its layers take other arguments for longer prompts")
    for path, value in first.items():
        others = second[path], third[path]
        if not isinstance(value, Tensor):
            if not all(same_value(value, other) for other in others):
                raise AxesNotFound(f"the layer argument {path} depends on the length of the prompt")
            continue
        if not all(isinstance(other, Tensor) and other.dim() == value.dim() for other in others):
            raise AxesNotFound(f"the layer argument {path} changes its rank with the prompt")
        grown = [a for a in range(value.dim()) if value.shape[a] != second[path].shape[a]]
        own = [
            axis
            for axis in grown
            if (value.shape[axis], second[path].shape[axis]) == lengths
            and third[path].shape[axis] == lengths[0]
        ]
        # An axis of keys grows with the tokens before the forward too; it is left whole.
        keys = [
            axis
            for axis in grown
            if (value.shape[axis], second[path].shape[axis]) == lengths
            and third[path].shape[axis] == lengths[0] + offset
        ]
        if len(own) > 1 or len(own) + len(keys) < len(grown):
            raise AxesNotFound(f"the layer argument {path} has no single axis of tokens")
        if own:
            axes[path] = own[0]
    return axes


def pair_bytes(
    short: Sequence[Call], later: Sequence[Call], axes: Sequence[dict[str, int]], offset: int
) -> float:
    """Bytes that calls hold for each pair of a query and a key: masks, and biases like them.

    short, later: as many tokens at offset 0 and at `offset`. axes: of the tokens, by layer.
    A tensor that layers share counts once.
    """
    found: dict[int, float] = {}
    for first, second, own in zip(short, later, axes, strict=True):
        before = call_leaves(first)
        for path, value in call_leaves(second).items():
            if path not in own:
                continue
            for axis, size in enumerate(value.shape):
                if size == before[path].shape[axis] + offset:
                    found[id(value)] = value.nbytes / (size * value.shape[own[path]])
    return sum(found.values())


def cut_call(recording: Recording, index: int, axes: dict[str, int], begin: int, end: int) -> Call:
    """The call of layer `index` for the tokens [begin, end) of the forward.

    Layers that share a tensor share its slice.
    """
    call = recording.calls[index]

    def cut(path: str, tensor: Tensor) -> Tensor:
        axis = axes.get(path)
        if axis is None:
            return tensor
        key = (id(tensor), begin, axis)
        if key not in recording.cuts:
            recording.cuts[key] = tensor.narrow(axis, begin, end - begin)
        return recording.cuts[key]

    rest, keywords = map_leaves(cut, (call.rest, call.keywords))
    return Call(rest, keywords, call.by_name)
