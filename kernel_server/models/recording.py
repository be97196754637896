"""What a recorded forward holds, and how its tensors are cut along the tokens. No model code here.

The *preamble* of a forward (embedding, positions, masks) is recorded once for all its tokens; which
axis of each recorded tensor counts queries, and which keys, is learnt by comparing recordings of
two lengths at two offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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
    #: slices made so far, by (tensor, first token, axes): layers that share a tensor share them
    cuts: dict[tuple[int, int, int | None, int | None], Tensor] = field(
        default_factory=dict, repr=False
    )

    def tensors(self) -> list[Tensor]:
        """All it holds; slices are views of the others."""
        return [
            *tensors_in([(call.rest, call.keywords) for call in self.calls]),
            *tensors_in((self.token_ids, self.positions, self.embedding, dict(self.preamble))),
        ]

    def forget_embedding(self) -> None:
        """Let go of what the residual stream has gone on from, and of what made it.

        For a prompt it weighs as much as the residual stream. The norm makes it again, which costs
        next to nothing beside a prompt's layers; one token's weighs nothing, and is kept.
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


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor of nested tuples, lists and dicts."""
    return [leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor)]


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


@dataclass(frozen=True, slots=True)
class CallAxes:
    """Along which axes the arguments of a layer are cut, by leaf path.

    queries: counts the forward's own tokens. keys: counts them and all before (masks, biases).
    """

    queries: dict[str, int]
    keys: dict[str, int]


def call_axes(
    short: Call, long: Call, later: Call, lengths: tuple[int, int], offset: int
) -> CallAxes:
    """Which axis of each tensor counts the forward's own tokens, and which the keys.

    short, long: recorded at offset 0 with `lengths` tokens; later: the short length at `offset`.
    Tensors without such an axis are left out. Raises AxesNotFound.
    """
    axes = CallAxes({}, {})
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
        sizes = list(zip(value.shape, *(other.shape for other in others), strict=True))
        own = [axis for axis, size in enumerate(sizes) if size == (*lengths, lengths[0])]
        keys = [axis for axis, size in enumerate(sizes) if size == (*lengths, lengths[0] + offset)]
        grown = sum(size[0] != size[1] for size in sizes)
        if len(own) > 1 or len(keys) > 1 or len(own) + len(keys) < grown:
            raise AxesNotFound(f"the layer argument {path} has no single axis of tokens")
        if own:
            axes.queries[path] = own[0]
        if keys:
            axes.keys[path] = keys[0]
    return axes


def pair_bytes(calls: Sequence[Call], axes: Sequence[CallAxes]) -> float:
    """Bytes that calls hold for each pair of a query and a key: masks, and biases like them.

    A tensor that layers share counts once.
    """
    found: dict[int, float] = {}
    for call, own in zip(calls, axes, strict=True):
        tensors = call_leaves(call)
        for path in own.queries.keys() & own.keys.keys():
            tensor = tensors[path]
            pairs = tensor.shape[own.queries[path]] * tensor.shape[own.keys[path]]
            found[id(tensor)] = tensor.nbytes / pairs
    return sum(found.values())


def storages(tensors: Iterable[Tensor], besides: Collection[int] = ()) -> dict[int, int]:
    """Where the tensors are, and the bytes there: a view keeps all of what it is a view of."""
    found: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in besides:
            found[storage.data_ptr()] = storage.nbytes()
    return found


def token_bytes(recording: Recording, weights: Collection[int]) -> tuple[int, int]:
    """Bytes that a recording holds per token, rounded up: of positions and layer arguments; of the
    embedding and what made it.

    weights: where the model's own tensors are, which may be handed to layers.
    """
    count = recording.token_ids.numel()
    calls = tensors_in([(call.rest, call.keywords) for call in recording.calls])
    arguments = storages([recording.token_ids, recording.positions, *calls], weights)
    first = tensors_in((recording.embedding, recording.preamble))
    embedded = storages(first, {*weights, *arguments})
    return -(-sum(arguments.values()) // count), -(-sum(embedded.values()) // count)


def cut_call(
    recording: Recording, index: int, axes: CallAxes, begin: int, end: int, keys: int
) -> Call:
    """The call of layer `index` for the tokens [begin, end) of the forward, with `keys` keys.

    Layers that share a tensor share its slice.
    """
    call = recording.calls[index]

    def cut(path: str, tensor: Tensor) -> Tensor:
        own, seen = axes.queries.get(path), axes.keys.get(path)
        if own is None and seen is None:
            return tensor
        key = (id(tensor), begin, own, seen)
        if key not in recording.cuts:
            part = tensor if own is None else tensor.narrow(own, begin, end - begin)
            recording.cuts[key] = part if seen is None else part.narrow(seen, 0, keys)
        return recording.cuts[key]

    rest, keywords = map_leaves(cut, (call.rest, call.keywords))
    return Call(rest, keywords, call.by_name)
