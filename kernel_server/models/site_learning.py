"""Finds the sites of each layer by running it: what is added to the residual stream, and by whom.

Every layer is run on a few tokens under a function mode that notes the additions and linear maps it
makes; then again with other values in attention, which tells attention's part from the MLP's. What
cannot be found is switched off with its reason. Whether what was found is right, is not decided
here but by the load check.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kernel_server.models.recording import Call
from kernel_server.models.routers import finding_routers
from kernel_server.models.sites import (
    ATTENTION_SITES,
    RESIDUAL_SITES,
    Additions,
    LayerSites,
    Projection,
    Visit,
    addends,
    linear_operands,
    same_memory,
)
from kernel_server.protocol.errors import DjinnError
from kernel_server.protocol.messages import SiteLayout

if TYPE_CHECKING:
    from kernel_server.models.resumable import LayerObserver, ResumableModel

_TOKENS = 5
_STATES = ("attention.q", "attention.k", "attention.v", "attention.heads")
_NOT_OFFERED = "the family computes it inside its attention module, out of Djinn's reach"


class _Unlike(Exception):
    """The layer does not add to its residual stream in a way that is known."""


@dataclass(slots=True)
class _Addition:
    """One addition of two vectors per token; `stream` says which operand is the residual stream."""

    operands: tuple[Tensor, Tensor]
    stream: int | None
    result: Tensor
    #: for each operand, the number of the addition that made it
    made_by: list[int | None]

    @property
    def addend(self) -> Tensor:
        assert self.stream is not None
        return self.operands[1 - self.stream]


@dataclass(slots=True)
class _Linear:
    fed: Tensor
    weight: Tensor
    bias: Tensor | None
    transposed: bool
    result: Tensor
    additions_before: int


@dataclass(slots=True)
class _Trace:
    additions: list[_Addition] = field(default_factory=list)
    linears: list[_Linear] = field(default_factory=list)

    @property
    def on_residual(self) -> list[_Addition]:
        return [a for a in self.additions if a.stream is not None]


class _Tracing(TorchFunctionMode):
    """Notes additions and linear maps; keeps what they touched, so that no memory is used twice."""

    def __init__(self, hidden: Tensor, layer: nn.Module) -> None:
        super().__init__()
        # Weights are told by their place: some families hand a transposed view to a plain product.
        self._weights = {p.data_ptr(): p.numel() for p in layer.parameters()}
        self.trace = _Trace()
        self.residual = hidden
        self._kept: list[Any] = [hidden]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        trace = self.trace
        if addends(func, args, kwargs, self.residual):
            copies = (args[0].clone(), args[1].clone())
            made_by = [self._maker(operand) for operand in args]
            stream = [i for i, value in enumerate(args) if same_memory(value, self.residual)]
            result = func(*args)
            entry = _Addition(copies, stream[0] if stream else None, result, made_by)
            trace.additions.append(entry)
            if stream:
                self.residual = result
            self._kept += [*args, result]
            return result
        parts = linear_operands(func, args, kwargs)
        if parts is None:
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        self._kept += [parts[0], result]
        if self._weights.get(parts[1].data_ptr()) == parts[1].numel():
            fed, weight, bias, transposed = parts
            trace.linears.append(
                _Linear(fed.clone(), weight, bias, transposed, result, len(trace.additions))
            )
        return result

    def _maker(self, operand: Tensor) -> int | None:
        for number in reversed(range(len(self.trace.additions))):
            if same_memory(self.trace.additions[number].result, operand):
                return number
        return None


def learn_sites(model: ResumableModel, observer: LayerObserver) -> list[LayerSites]:
    """The sites of every layer; `observer` serves its attention and lets a visit in."""
    ids, positions = model.inputs(model.sample_ids(_TOKENS), 0)
    recording = model.record(ids, positions)
    hidden = recording.embedding
    assert hidden is not None
    learnt = []
    for index, call in enumerate(recording.calls):
        learning = _Learning(model, observer, index, hidden, call)
        learnt.append(learning.sites())
        hidden = learning.output
    return learnt


class _Learning:
    """The questions put to one layer."""

    def __init__(
        self,
        model: ResumableModel,
        observer: LayerObserver,
        index: int,
        hidden: Tensor,
        call: Call,
    ) -> None:
        self._model, self._observer = model, observer
        self._index, self._hidden, self._call = index, hidden, call
        self.output = hidden

    def sites(self) -> LayerSites:
        found = LayerSites()
        visit = Visit(takes=_STATES)
        layer = self._model.layers[self._index]
        with finding_routers(layer, self._hidden.shape[1]) as routers:
            trace, self.output, stream = self._traced(visit)
        found.router = routers[0] if len(routers) == 1 else None
        for site in ATTENTION_SITES:
            if site not in visit.asked:
                found.switch_off(site, _NOT_OFFERED)
                continue
            heads = visit.asked[site]
            assert heads is not None
            width = 0 if site == "attention.pattern" else visit.taken[site].shape[2] // heads
            found.layouts[site] = SiteLayout(site=site, heads=heads, width=width)
        found.output_projection = _reader(trace, visit.taken.get("attention.heads"))
        try:
            self._find_additions(found, trace, stream, visit.taken)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Whatever a family does here that nobody thought of costs it these sites alone.
            known = isinstance(error, (_Unlike, DjinnError))
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            found.additions = found.down_projection = found.attention_weight = None
            for site in RESIDUAL_SITES:
                found.switch_off(site, reason.splitlines()[0])
        found.layouts = {layout.site: layout for layout in found.supported}
        return found

    # -- runs ----------------------------------------------------------------------------------

    def _traced(self, visit: Visit) -> tuple[_Trace, Tensor, Tensor]:
        """Run the layer; also returns its output and the end of its residual stream."""
        mode = _Tracing(self._hidden, self._model.layers[self._index])
        self._observer.enter(self._index)
        self._observer.visit = visit
        try:
            with mode:
                output = self._model.call_layer(self._index, self._hidden, self._call)
        finally:
            self._observer.visit = None
        return mode.trace, output, mode.residual

    def _visited(self, found: LayerSites, visit: Visit) -> Visit:
        self._observer.enter(self._index)
        self._observer.visit = visit
        try:
            self._model.visit_layer(self._index, self._hidden, self._call, visit, found)
        finally:
            self._observer.visit = None
        return visit

    # -- findings ------------------------------------------------------------------------------

    def _find_additions(
        self, found: LayerSites, trace: _Trace, end: Tensor, taken: dict[str, Tensor]
    ) -> None:
        on_residual = trace.on_residual
        if not on_residual:
            raise _Unlike("nothing is added to the residual stream itself in this layer")
        if not same_memory(self.output, end):
            raise _Unlike("the residual stream is normed or changed again after the last addition")
        if len(on_residual) > 2:
            raise _Unlike(f"{len(on_residual)} parts are added to the residual stream, not two")
        if "attention.v" not in taken:
            raise _Unlike("attention's part cannot be told from the MLP's: its values are not seen")
        other, _, _ = self._traced(Visit({"attention.v": _changed(taken["attention.v"])}))
        if len(other.on_residual) != len(on_residual):
            raise _Unlike("the number of additions depends on the values")
        if len(on_residual) == 1:
            additions = _joined(trace, other)
            attention = additions.attention_operand
            part = trace.additions[_joining(trace)].operands[attention]
        else:
            if not _differ(on_residual[0].addend, other.on_residual[0].addend):
                raise _Unlike("what is added first does not come from attention")
            additions, part = Additions("sequential"), on_residual[0].addend
        found.additions = additions
        self._lay_out(found, RESIDUAL_SITES)
        if additions.form == "sequential":
            changed = {"attention.output": _changed(part)}
            after = self._visited(found, Visit(changed, takes=("mlp.output",)))
            if not _differ(after.taken["mlp.output"], on_residual[1].addend):
                additions = Additions("parallel")
        if additions.form != "sequential":
            found.switch_off("middle", "its MLP does not read the residual stream after attention")
            found.attention_weight = _maker_of(trace, part)
        found.additions = additions
        self._find_neurons(found, trace)

    def _lay_out(self, found: LayerSites, sites: tuple[str, ...]) -> None:
        hidden = int(self._hidden.shape[-1])
        for site in sites:
            if site != "mlp.neurons":
                found.layouts[site] = SiteLayout(site=site, heads=None, width=hidden)

    def _find_neurons(self, found: LayerSites, trace: _Trace) -> None:
        """The last linear map into the residual stream, if without it the MLP adds nothing."""
        hidden, tokens = self._hidden.shape[-1], self._hidden.shape[1]
        taken = [found.output_projection.weight] if found.output_projection else []
        taken += [found.attention_weight] if found.attention_weight is not None else []
        maps = [
            entry
            for entry in trace.linears
            if not any(same_memory(entry.weight, weight) for weight in taken)
            and entry.result.shape[-1] == hidden
            and entry.result.numel() == tokens * hidden
        ]
        if not maps:
            found.switch_off("mlp.neurons", "its MLP ends in no single linear map")
            return
        last = maps[-1]
        if _uses(trace, last.weight) > 1:
            found.switch_off("mlp.neurons", "its MLP uses one linear map several times")
            return
        found.down_projection = last.weight
        width = int(last.fed.shape[-1])
        found.layouts["mlp.neurons"] = SiteLayout(site="mlp.neurons", heads=None, width=width)
        fed = last.fed.reshape(1, tokens, width)
        silent = self._visited(
            found,
            Visit({"mlp.neurons": torch.zeros_like(fed)}, takes=("attention.output", "mlp.output")),
        ).taken
        plain = self._visited(found, Visit(takes=("attention.output", "mlp.output"))).taken
        alike = silent["mlp.output"][:, :1].expand_as(silent["mlp.output"])
        if (
            not _differ(silent["mlp.output"], plain["mlp.output"])
            or not torch.allclose(silent["mlp.output"].float(), alike.float(), atol=1e-6)
            or _differ(silent["attention.output"], plain["attention.output"])
        ):
            found.down_projection = None
            found.switch_off(
                "mlp.neurons",
                "its MLP is not one pair of linear maps (a mixture of experts, for instance)",
            )


def _joining(trace: _Trace) -> int:
    """The number of the addition that joined attention's part and the MLP's."""
    only = trace.on_residual[0]
    assert only.stream is not None
    number = only.made_by[1 - only.stream]
    if number is None:
        raise _Unlike("only one part is added to the residual stream")
    return number


def _joined(trace: _Trace, other: _Trace) -> Additions:
    number = _joining(trace)
    if _joining(other) != number:
        raise _Unlike("the number of additions depends on the values")
    first, second = trace.additions[number], other.additions[number]
    moved = [_differ(a, b) for a, b in zip(first.operands, second.operands, strict=True)]
    if sum(moved) != 1:
        raise _Unlike("attention's part cannot be told from the MLP's")
    return Additions("joined", joined_at=number, attention_operand=moved.index(True))


def _reader(trace: _Trace, heads: Tensor | None) -> Projection | None:
    """The linear map that is fed exactly the heads side by side."""
    if heads is None:
        return None
    for entry in trace.linears:
        if entry.fed.numel() == heads.numel() and torch.equal(
            entry.fed.reshape(heads.shape), heads
        ):
            return Projection(entry.weight, entry.bias, entry.transposed)
    return None


def _maker_of(trace: _Trace, part: Tensor) -> Tensor | None:
    """The weight of the linear map, used once, that gave exactly `part`."""
    makers = [
        entry.weight
        for entry in trace.linears
        if entry.result.numel() == part.numel() and not _differ(entry.result, part)
    ]
    if len(makers) != 1 or _uses(trace, makers[0]) != 1:
        return None
    return makers[0]


def _uses(trace: _Trace, weight: Tensor) -> int:
    return sum(same_memory(entry.weight, weight) for entry in trace.linears)


def _changed(value: Tensor) -> Tensor:
    return value * 1.25 + 0.5


def _differ(left: Tensor, right: Tensor) -> bool:
    return not torch.equal(left.reshape(-1), right.reshape(-1))
