"""The load check of the sites inside layers: is each what its name says, and on the model's path?

Every layer is run in a prefill of several chunks and in a decode: once as always, once with every
site looked at, once with every value put back as it was, and once for each with another value.
The parts must sum to the layer's output, the weights must give the heads, keys and values must be
those of stock transformers. A site that fails is switched off with the reason; the model goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernel_server.models.findings import Check
from kernel_server.models.resumable import ResumableModel
from kernel_server.models.sites import RESIDUAL_SITES, LayerSites, Visit
from kernel_server.protocol.errors import DjinnError
from kernel_server.protocol.location import INNER_SITES

_PARTS = ("attention.output", "mlp.output")
_PATTERN, _HEADS = "attention.pattern", "attention.heads"
#: Roundings allowed to the sum of three vectors, in units of the dtype's precision.
_SUM_ROUNDINGS = 4.0
#: A softmax makes a larger relative difference of what differs in the scores: weights may differ
#: this much more from stock's than vectors (bf16, 40 layers: 2.5 times what keys differed by).
_SOFTMAX = 3.0


@dataclass(frozen=True, slots=True)
class LayerRun:
    """One layer in one forward, which stands before it: what went in, what comes out.

    inputs, outputs: [1, tokens, hidden] by chunk. start: tokens of the session before the forward.
    visit: runs the layer for a visit of each chunk; None stands for a chunk that is left out.
    """

    layer: int
    forward: int
    start: int
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    visit: Callable[[Sequence[Visit | None]], list[Tensor | None]]


@dataclass(slots=True)
class StockValues:
    """What stock transformers computed for the same forwards.

    keys, values: [1, heads, tokens, width] by layer, of the last `tokens` positions below `end`.
    patterns: by forward and layer [1, heads, tokens, keys]; empty where the family gives none.
    """

    keys: list[Tensor | None]
    values: list[Tensor | None]
    end: int
    patterns: list[list[Tensor]]


@dataclass(slots=True)
class SiteSupport:
    """Where one site works. off: reason -> the layers that lack it for this reason."""

    layers: list[int] = field(default_factory=list)
    off: dict[str, list[int]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "off": [{"reason": r, "layers": list(layers)} for r, layers in self.off.items()],
        }

    def __str__(self) -> str:
        if not self.off:
            return "all layers"
        lacking = "; ".join(self.off)
        return f"layers {ranges(self.layers)}; else: {lacking}" if self.layers else lacking


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short.

    >>> ranges([0, 1, 2, 5])
    '0-2, 5'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


def site_support(sites: Sequence[LayerSites]) -> dict[str, SiteSupport]:
    """By site: the layers that have it, and why the others do not."""
    table = {site: SiteSupport() for site in INNER_SITES}
    for layer, found in enumerate(sites):
        for site, support in table.items():
            if site in found.layouts:
                support.layers.append(layer)
            else:
                support.off.setdefault(found.off.get(site, "not found"), []).append(layer)
    return table


def check_sites(
    model: ResumableModel, runs: Iterable[LayerRun], stock: StockValues, tolerance: float
) -> list[Check]:
    """Judge the sites of every layer run, switch off what fails, and return what was found.

    tolerance: relative difference of a token's vector allowed against stock and between kernels.
    """
    judge = _Judge(model, stock, tolerance)
    for run in runs:
        judge.layer(run)
    return list(judge.findings.values())


class _Judge:
    def __init__(self, model: ResumableModel, stock: StockValues, tolerance: float) -> None:
        self._model, self._stock, self._tolerance = model, stock, tolerance
        self._sum_tolerance = _SUM_ROUNDINGS * torch.finfo(model.dtype).eps
        self._sinks = frozenset(getattr(model.observer, "sinks", ()))
        #: values of the forward before, by layer: a decode's weights reach back to them
        self._values: dict[int, Tensor] = {}
        self.findings: dict[str, Check] = {}

    def layer(self, run: LayerRun) -> None:
        """Put every question to the sites of one layer in one forward."""
        sites = self._model.sites[run.layer]
        try:
            self._questions(run, sites)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # What nobody thought of costs the sites of this layer, not the model.
            line = (str(error).splitlines() or ["no message"])[0]
            for site in list(sites.layouts):
                sites.switch_off(site, f"its check ended in {type(error).__name__}: {line}")

    def _questions(self, run: LayerRun, sites: LayerSites) -> None:
        taken = self._look(run, sites)
        if not taken:
            return
        self._sum_rule(run, sites, taken)
        self._put_back(run, sites, taken)
        self._on_the_path(run, sites, taken)
        self._kept(run, sites, taken)
        self._pattern(run, sites, taken)

    # -- questions -----------------------------------------------------------------------------

    def _look(self, run: LayerRun, sites: LayerSites) -> list[dict[str, Tensor]]:
        """Every value of every chunk; looking must not change the output."""
        names = list(sites.layouts)
        visits = [Visit(takes=names) for _ in run.inputs]
        try:
            outputs = run.visit(visits)
        except DjinnError as error:
            for site in names:
                if site in RESIDUAL_SITES:
                    sites.switch_off(site, str(error))
            names = list(sites.layouts)
            visits = [Visit(takes=names) for _ in run.inputs]
            outputs = run.visit(visits) if names else list(run.outputs)
        for site in names:
            if any(site not in visit.taken for visit in visits):
                sites.switch_off(site, "the layer never comes to it")
        changed = _differing(outputs, run.outputs)
        if changed:
            for site in list(sites.layouts):
                sites.switch_off(site, "looking at it changes the layer's output")
        self._note("looking changes nothing", changed, 0.0, run)
        return [visit.taken for visit in visits] if sites.layouts else []

    def _sum_rule(
        self, run: LayerRun, sites: LayerSites, taken: Sequence[dict[str, Tensor]]
    ) -> None:
        """Input, attention's part and the MLP's, in the family's order, are the output."""
        if sites.additions is None or any(part not in sites.layouts for part in _PARTS):
            return
        worst = middle = 0.0
        for chunk, (before, after) in enumerate(zip(run.inputs, run.outputs, strict=True)):
            attention, mlp = (taken[chunk][part] for part in _PARTS)
            total = sites.additions.total(before, attention, mlp)
            worst = max(worst, _distance(total, after))
            if "middle" in sites.layouts:
                middle = max(middle, _distance(before + attention, taken[chunk]["middle"]))
        if not self._note("sum rule", max(worst, middle), self._sum_tolerance, run):
            what = f"it fails the sum rule by {max(worst, middle):.2g} of the vector's length"
            for site in RESIDUAL_SITES:
                sites.switch_off(site, what)

    def _put_back(
        self, run: LayerRun, sites: LayerSites, taken: Sequence[dict[str, Tensor]]
    ) -> None:
        """Every value in its place again, unchanged: not a bit of the output may change."""
        names = [site for site in sites.layouts if site != _PATTERN]
        differing = self._identity(run, taken, names)
        self._note("identity edits", differing, 0.0, run)
        if differing:
            for site in names:
                if self._identity(run, taken, [site]):
                    sites.switch_off(site, "put back unchanged, it changes the layer's output")
        if _PATTERN in sites.layouts and _HEADS in taken[0]:
            # Judged at the heads: further on, experts may be chosen otherwise for a rounding.
            put = [Visit({_PATTERN: c[_PATTERN]}, takes=(_HEADS,)) for c in taken]
            run.visit(put)
            distance = max(
                _distance(visit.taken[_HEADS], chunk[_HEADS])
                for visit, chunk in zip(put, taken, strict=True)
            )
            if not self._note("identity edit of the pattern", distance, self._tolerance, run):
                sites.switch_off(_PATTERN, f"put back, it moves the heads by {distance:.2g}")

    def _identity(
        self, run: LayerRun, taken: Sequence[dict[str, Tensor]], names: Sequence[str]
    ) -> float:
        visits = [Visit({site: values[site] for site in names}) for values in taken]
        return _differing(run.visit(visits), run.outputs)

    def _on_the_path(
        self, run: LayerRun, sites: LayerSites, taken: Sequence[dict[str, Tensor]]
    ) -> None:
        """Another value at the site gives another output; asked of the last chunk."""
        missing = 0.0
        for site in list(sites.layouts):
            if site not in sites.layouts:
                continue
            value = taken[-1][site]
            # Uneven, for a norm after the site would undo a scale; a masked weight stays none.
            ramp = torch.linspace(0.5, 1.5, value.shape[-1], dtype=value.dtype, device=value.device)
            other = value * ramp + (0.0 if site == _PATTERN else 0.25)
            parts = _PARTS if site == "attention.v" and set(_PARTS) <= set(sites.layouts) else ()
            visit = Visit({site: other}, takes=parts)
            outputs = run.visit([*(None for _ in taken[:-1]), visit])
            if parts:
                self._whose(run, sites, taken[-1], visit.taken)
            if not _differing(outputs[-1:], run.outputs[-1:]):
                missing += 1
                sites.switch_off(site, "an edit there changes nothing: it is not on the path")
        self._note("edits arrive", missing, 0.0, run)

    def _whose(
        self, run: LayerRun, sites: LayerSites, plain: dict[str, Tensor], other: dict[str, Tensor]
    ) -> None:
        """Other values in attention move attention's part; the MLP's only if it reads the sum."""
        assert sites.additions is not None
        moved = [not torch.equal(plain[part], other[part]) for part in _PARTS]
        wrong = not moved[0] or (moved[1] and sites.additions.form != "sequential")
        if not self._note("parts are whose they are", float(wrong), 0.0, run):
            for site in RESIDUAL_SITES:
                sites.switch_off(site, "attention's part and the MLP's are taken for each other")

    def _kept(self, run: LayerRun, sites: LayerSites, taken: Sequence[dict[str, Tensor]]) -> None:
        """Keys and values are those that stock transformers keeps."""
        kinds = (("attention.k", self._stock.keys), ("attention.v", self._stock.values))
        for site, kept in kinds:
            layout, theirs = sites.layouts.get(site), kept[run.layer]
            if layout is None or theirs is None or layout.heads is None:
                continue
            if theirs.shape[0] != 1 or theirs.shape[1::2] != (layout.heads, layout.width):
                continue  # kept in another form, so there is nothing to compare
            ours = torch.cat([values[site] for values in taken], 1)[0]
            begin = max(run.start, self._stock.end - theirs.shape[2])
            end = run.start + ours.shape[0]
            if begin >= end:
                continue
            offset = self._stock.end - theirs.shape[2]
            stock = theirs[0, :, begin - offset : end - offset].transpose(0, 1).flatten(1)
            distance = _distance(ours[begin - run.start :], stock)
            if not self._note(f"{site} against stock", distance, self._tolerance, run):
                sites.switch_off(site, f"it differs from stock's cache by {distance:.2g}")

    def _pattern(
        self, run: LayerRun, sites: LayerSites, taken: Sequence[dict[str, Tensor]]
    ) -> None:
        """Weights sum to one, give the heads from the values, and are those of stock."""
        needed = (_PATTERN, "attention.v", _HEADS)
        if any(site not in taken[0] for site in needed):
            return
        layer = run.layer
        heads, kept = sites.layouts.get(_PATTERN), sites.layouts.get("attention.v")
        values = torch.cat([chunk["attention.v"] for chunk in taken], 1)[0]
        if run.forward > 0 and layer in self._values:
            values = torch.cat([self._values[layer], values])
        self._values[layer] = values
        if heads is None or kept is None or heads.heads is None or kept.heads is None:
            return
        weights = torch.cat([chunk[_PATTERN] for chunk in taken], 1)[0]
        weights = weights.unflatten(1, (heads.heads, -1)).transpose(0, 1).float()
        sums = weights.sum(-1)
        over = float((sums - 1).max() if layer in self._sinks else (sums - 1).abs().max())
        room = _SUM_ROUNDINGS * 2 * torch.finfo(self._model.dtype).eps
        fine = self._note("weights sum to one", max(over, 0.0), room, run)
        each = values.unflatten(1, (kept.heads, -1)).transpose(0, 1).float()
        each = each.repeat_interleave(heads.heads // kept.heads, 0)
        ours = torch.cat([chunk[_HEADS] for chunk in taken], 1)[0]
        made = (weights @ each).transpose(0, 1).flatten(1)
        fine &= self._note("weights give the heads", _distance(made, ours), self._tolerance, run)
        if self._stock.patterns:
            theirs = self._stock.patterns[run.forward][layer][0].float()
            keys = min(theirs.shape[-1], weights.shape[-1])
            off = _distance(weights[..., -keys:], theirs[..., -keys:])
            room = _SOFTMAX * self._tolerance
            fine &= self._note("weights against stock", off, room, run)
        if not fine:
            worst = [f for f in self.findings.values() if f.name.startswith("weights")]
            failed = next(f for f in worst if not f.passed)
            sites.switch_off(_PATTERN, f"{failed.name}: off by {failed.value:.2g}")

    # -- findings ------------------------------------------------------------------------------

    def _note(self, name: str, value: float, tolerance: float, run: LayerRun) -> bool:
        """Keep the worst answer to this question; True if this one passes."""
        value = math.inf if math.isnan(value) else value
        known = self.findings.get(name)
        if known is None or value > known.value:
            where = f"layer {run.layer} of forward {run.forward}"
            self.findings[name] = Check(name, value, tolerance, where)
        return value <= tolerance


def _differing(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> float:
    """How many of the tensors differ in any bit."""
    return float(
        sum(
            a is None or b is None or not torch.equal(a, b)
            for a, b in zip(left, right, strict=True)
        )
    )


def _distance(ours: Tensor, stock: Tensor) -> float:
    """The largest difference of a vector, relative to the other's length."""
    left, right = ours.float(), stock.float()
    difference = (left - right).norm(dim=-1) / right.norm(dim=-1).clamp_min(1e-12)
    return float(difference.max())
