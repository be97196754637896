"""Sites inside a layer: which a layer has, and what may happen at one while the layer runs.

A `Visit` is what one run of one layer is for: values to put in place, values to take, where to end.
The stock layer runs unchanged; the attention work offers queries, keys, values, weights and heads
to the visit, and `AdditionsMode` what is added to the residual stream. Which addition is whose is
learnt by `site_learning`; whether it is right is judged by `site_check`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from kernel_server.protocol.errors import ServerFault
from kernel_server.protocol.location import INNER_SITES
from kernel_server.protocol.messages import SiteLayout

#: Sites that the attention work offers; the others are met by following the residual stream.
ATTENTION_SITES = (
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.pattern",
    "attention.heads",
)
RESIDUAL_SITES = tuple(site for site in INNER_SITES if site not in ATTENTION_SITES)

#: What `a + b`, `a += b`, `a.add(b)` and `torch.add(a, b)` are to a function mode.
ADDITIONS = frozenset({torch.add, torch.Tensor.add, torch.Tensor.add_})
_PRODUCTS = frozenset({torch.matmul, torch.Tensor.matmul})


@dataclass(frozen=True, slots=True)
class Projection:
    """The linear map from a layer's heads to the residual stream, as the model holds it.

    transposed: the weight is [inputs, outputs] (GPT-2's Conv1D), else [outputs, inputs].
    """

    weight: Tensor
    bias: Tensor | None
    transposed: bool

    @property
    def matrix(self) -> Tensor:
        """`[hidden, heads * width]`, a view of the weight."""
        return self.weight.T if self.transposed else self.weight


@dataclass(frozen=True, slots=True)
class Additions:
    """How a layer adds to its residual stream x; a is attention's part, m the MLP's.

    form: "sequential" middle = x + a, then middle + m; "parallel" (x + a) + m with an m that does
        not read x + a; "joined" x + (a + m).
    joined_at: of the joined form, which addition of two vectors of this size joins a and m, counted
        among those that come before the residual stream's; attention_operand: 0 or 1, a's there.
    """

    form: Literal["sequential", "parallel", "joined"]
    joined_at: int = 0
    attention_operand: int = 0

    @property
    def on_residual(self) -> int:
        """Additions one of whose operands is the residual stream."""
        return 1 if self.form == "joined" else 2

    def total(self, before: Tensor, attention: Tensor, mlp: Tensor) -> Tensor:
        """What the layer gives from its parts, added in the family's own order."""
        if self.form == "joined":
            return before + (attention + mlp)
        return (before + attention) + mlp


@dataclass(slots=True)
class LayerSites:
    """The sites of one layer: those that work, and why the others do not.

    layouts: by site, in the order of `INNER_SITES`. off: reason by site.
    down_projection: weight whose input the neurons are. output_projection: of attention, None where
    heads do not reach the residual stream through one linear map. attention_weight: of the map that
    gives attention's part as it is added; it is met there where the MLP would else run before.
    router: of a mixture of experts, None where there is none or none that is understood.
    """

    layouts: dict[str, SiteLayout] = field(default_factory=dict)
    off: dict[str, str] = field(default_factory=dict)
    additions: Additions | None = None
    down_projection: Tensor | None = None
    output_projection: Projection | None = None
    attention_weight: Tensor | None = None
    router: nn.Module | None = None

    @property
    def supported(self) -> tuple[SiteLayout, ...]:
        """Layouts of the sites that work, in order."""
        return tuple(self.layouts[s] for s in INNER_SITES if s in self.layouts)

    def switch_off(self, site: str, reason: str) -> None:
        """Take a site away; the first reason given is kept."""
        self.layouts.pop(site, None)
        self.off.setdefault(site, reason)


class SiteReached(Exception):
    """Unwinds a layer at the site where its visit ends; never leaves `ResumableModel`."""


class Visit:
    """What one run of a layer is for.

    injected: by site, [1, tokens, channels] to stand in the place of what the layer computed.
    until: the site at which the run ends; its value, injected or not, is then in `taken`.
    takes: sites whose values are copied into `taken` in passing.
    """

    __slots__ = ("asked", "injected", "taken", "takes", "until")

    def __init__(
        self,
        injected: Mapping[str, Tensor] | None = None,
        until: str | None = None,
        takes: Collection[str] = (),
    ) -> None:
        self.injected = injected or {}
        self.until = until
        self.takes = takes
        self.taken: dict[str, Tensor] = {}
        #: heads by site that somebody asked about; what is never asked about is not on the path
        self.asked: dict[str, int | None] = {}

    def wants(self, site: str, heads: int | None = None) -> bool:
        """Whether the value at `site` has to be offered to `at`."""
        self.asked[site] = heads
        return site in self.injected or site == self.until or site in self.takes

    @property
    def follows_residual(self) -> bool:
        """Whether a site is wanted that only following the residual stream finds."""
        named = [*self.injected, *self.takes, self.until]
        return any(site in RESIDUAL_SITES for site in named)

    def at(self, site: str, value: Tensor) -> Tensor | None:
        """The value [1, tokens, channels] to put in the place of `value`, None to leave it.

        Raises SiteReached where the run ends.
        """
        put = self.injected.get(site)
        if site == self.until or site in self.takes:
            # Layers may go on to write into what they computed.
            copied = value.clone(memory_format=torch.contiguous_format)
            self.taken[site] = copied if put is None else put
            if site == self.until:
                raise SiteReached
        return put

    def vectors(self, site: str, tensor: Tensor) -> Tensor:
        """Offer a tensor of one vector per token; returns what stands in its place."""
        if not self.wants(site):
            return tensor
        put = self.at(site, tensor.reshape(1, -1, tensor.shape[-1]))
        return tensor if put is None else _overwrite(tensor, put.view(tensor.shape))

    def heads(self, site: str, states: Tensor) -> Tensor:
        """Offer `[1, heads, tokens, width]`; returns what stands in its place."""
        _, heads, tokens, width = states.shape
        if not self.wants(site, heads):
            return states
        put = self.at(site, states.transpose(1, 2).reshape(1, tokens, heads * width))
        if put is None:
            return states
        return _overwrite(states, put.view(1, tokens, heads, width).transpose(1, 2))


def _overwrite(tensor: Tensor, put: Tensor) -> Tensor:
    """Write `put` where `tensor` lies, so that the kernels after it meet the same layout."""
    shared = any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
    return put.contiguous() if shared else tensor.copy_(put)


def same_memory(left: Tensor, right: Tensor) -> bool:
    """Whether two live tensors are the same values in the same place, whatever their shape."""
    return left is right or (
        left.data_ptr() == right.data_ptr()
        and left.numel() == right.numel()
        and left.dtype == right.dtype
    )


def addends(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Tensor) -> bool:
    """Whether this call adds two tensors with as many vectors of the same size as `like`."""
    if func not in ADDITIONS or kwargs or len(args) != 2:
        return False
    return all(
        isinstance(value, Tensor)
        and value.numel() == like.numel()
        and value.shape[-1:] == like.shape[-1:]
        for value in args
    )


def linear_operands(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None, bool] | None:
    """Input, weight, bias and whether the weight is transposed, if the call is a linear map."""
    if func is linear and len(args) >= 2:
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return args[0], args[1], bias, False
    if kwargs:
        return None
    if func is torch.addmm and len(args) == 3:
        return args[1], args[2], args[0], True
    if func in _PRODUCTS and isinstance(args[1], Tensor) and args[1].dim() == 2:
        return args[0], args[1], None, True
    return None


class AdditionsMode(TorchFunctionMode):
    """Follows the residual stream through one run of a layer and offers its sites to the visit.

    hidden: the layer's input. Check `finished` with the layer's output: an addition that was not
    learnt raises ServerFault, so that a value is never taken for another.
    """

    def __init__(self, sites: LayerSites, visit: Visit, hidden: Tensor) -> None:
        super().__init__()
        assert sites.additions is not None
        self._learnt = sites.additions
        self._visit = visit
        self._down = sites.down_projection
        self._out = sites.attention_weight
        self._residual = hidden
        self._met = self._others = 0
        self._joined: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if addends(func, args, kwargs, self._residual):
            return self._add(func, list(args))
        if (parts := linear_operands(func, args, kwargs)) is not None:
            if self._down is not None and same_memory(parts[1], self._down):
                fed = self._visit.vectors("mlp.neurons", parts[0])
                if fed is not parts[0]:
                    args = tuple(fed if value is parts[0] else value for value in args)
            elif self._out is not None and same_memory(parts[1], self._out):
                return self._visit.vectors("attention.output", func(*args, **kwargs))
        return func(*args, **kwargs)

    def _add(self, func: Callable[..., Tensor], operands: list[Tensor]) -> Tensor:
        learnt, visit = self._learnt, self._visit
        joined = learnt.form == "joined"
        stream = [i for i, value in enumerate(operands) if same_memory(value, self._residual)]
        if not stream:
            number = self._others
            self._others += 1
            if not joined or self._met or number != learnt.joined_at:
                return func(*operands)
            mine = learnt.attention_operand
            if self._out is None:
                operands[mine] = visit.vectors("attention.output", operands[mine])
            operands[1 - mine] = visit.vectors("mlp.output", operands[1 - mine])
            self._joined = func(*operands)
            return self._joined
        other = 1 - stream[0]
        self._met += 1
        if joined:
            if self._joined is None or not same_memory(operands[other], self._joined):
                self._met = -1
        elif self._met == 1:
            if self._out is None:
                operands[other] = visit.vectors("attention.output", operands[other])
        elif self._met == 2:
            operands[other] = visit.vectors("mlp.output", operands[other])
        self._residual = func(*operands)
        if self._met == 1 and learnt.form == "sequential":
            self._residual = visit.vectors("middle", self._residual)
        return self._residual

    def finished(self, output: Tensor, layer: int) -> None:
        """Raise ServerFault unless the layer added as it did when it was learnt."""
        if self._met != self._learnt.on_residual or not same_memory(output, self._residual):
            raise ServerFault(
                f"layer {layer} added to its residual stream in another way than when it was"
                f" learnt ({self._learnt.form}; {self._met} additions)"
            )
