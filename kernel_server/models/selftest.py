"""The load check: is this model, run layer by layer over pages, the model that transformers runs?

Compares the engine's path with stock transformers (the same weights, configurations of their own)
at the embedding, every layer, the final norm and the logits, in a prefill of several chunks and
several decodes; and the engine with itself, stopped at every point. A model that fails is refused
by name. How forwards are run is the runner's business.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from kernel_server.models.anatomy import configs_of
from kernel_server.models.findings import Check
from kernel_server.models.resumable import ResumableModel
from kernel_server.models.site_check import (
    LayerRun,
    SiteSupport,
    StockValues,
    check_sites,
    site_support,
)
from kernel_server.protocol.errors import UnsupportedModel

#: Prompt and chunk of the check: two whole chunks and a half.
PROMPT, CHUNK, DECODES = 20, 8, 3
#: A prompt of one chunk, which runs in one pass.
SHORT_PROMPT = 6
#: A GPU runs the check's forwards this often more: in two sessions on an H200 about one decoded
#: layer in two hundred came out with other roundings, in all later ones none did.
REPEATS = 6
REPEATED = "the same forwards again"
#: Sliding windows are shrunk to this in both paths, so that a short prompt exceeds them.
WINDOW = 6
#: Largest difference of one token's vector, relative to its length, by dtype.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
#: Lower precision is also allowed this many times what stock's own two attentions differ by.
_OWN_SPREAD = 3.0
#: Configuration fields that bound what a token may see.
_WINDOW_FIELDS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window")
_EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(slots=True)
class Trace:
    """The values of one forward: `points[p]` is [tokens, width] at point p; logits [vocabulary]."""

    points: list[Tensor]
    logits: Tensor


class Runner(Protocol):
    """Runs a prompt and decodes through the engine; `feeds` are the tokens fed one by one."""

    def run(
        self,
        prompt: Sequence[int],
        feeds: Sequence[int],
        *,
        chunk: int,
        stops: bool = False,
        window: int | None = None,
    ) -> list[Trace]:
        """One trace per forward. stops: stop at every point, and forget what can be recomputed."""

    def layers(
        self, prompt: Sequence[int], feed: int, *, chunk: int, window: int | None = None
    ) -> Iterable[LayerRun]:
        """Every layer of the prompt's forward and of one decode, to be visited."""


@dataclass(slots=True)
class LoadReport:
    """What the load check found; `notes` says what it could not reach.

    sites: by site inside the layers, where it works and why not elsewhere. site_checks: what was
    found on the way; one that fails costs the model the site, not more.
    """

    family: str
    dtype: str
    attention: str
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sites: dict[str, SiteSupport] = field(default_factory=dict)
    site_checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the protocol."""
        return {
            "passed": self.passed,
            "family": self.family,
            "dtype": self.dtype,
            "attention": self.attention,
            "checks": [check.as_dict() for check in self.checks],
            "notes": list(self.notes),
            "sites": {site: support.as_dict() for site, support in self.sites.items()},
            "site_checks": [check.as_dict() for check in self.site_checks],
        }


def check_model(model: ResumableModel, runner: Runner, windows: Sequence[int | None]) -> LoadReport:
    """Run the load check; raise UnsupportedModel naming the first thing that failed.

    windows: the sliding window each layer asked for, None without.
    """
    report = LoadReport(
        model.family,
        str(model.dtype).removeprefix("torch."),
        f"{model.route.title}, stock {model.stock_attention}",
    )
    reach = int(getattr(model.config, "max_position_embeddings", None) or 1 << 30)
    if reach < PROMPT + DECODES:
        model.refuse(f"its context of {reach} tokens is too short to be checked", "context")
    ids = model.sample_ids(PROMPT + DECODES)
    prompt, feeds = ids[:PROMPT], ids[PROMPT:]
    engine = runner.run(prompt, feeds, chunk=CHUNK)
    compared = _compare_with_stock(model, report, "", engine, prompt, feeds, None)
    window = None
    bounded = [name for name in _WINDOW_FIELDS if getattr(model.config, name, None)]
    if bounded or any(windows):
        window = WINDOW
        narrow = runner.run(prompt, feeds, chunk=CHUNK, window=window)
        compared = _compare_with_stock(
            model, report, f" (window {WINDOW})", narrow, prompt, feeds, _narrow
        )
        widest = max([w for w in windows if w], default=0)
        if widest > PROMPT:
            report.notes.append(
                f"sliding window {widest} was checked shrunk to {WINDOW}, not at full width"
            )
    stopped = runner.run(prompt, feeds, chunk=CHUNK, stops=True)
    report.checks.append(_bits("stopped at every point", engine, stopped))
    short, feed = prompt[:SHORT_PROMPT], feeds[:1]
    passed = runner.run(short, feed, chunk=CHUNK)
    report.checks.append(
        _bits("one pass and replay", passed, runner.run(short, feed, chunk=CHUNK, stops=True))
    )
    if _may_drift(model.device):
        again = []
        for _ in range(REPEATS):
            again += runner.run(prompt, feeds, chunk=CHUNK)
        report.checks.append(_bits(REPEATED, engine * REPEATS, again))
    for check in report.checks:
        if not check.passed:
            _refuse(model, check, report)
    runs = runner.layers(prompt, feeds[0], chunk=CHUNK, window=window)
    report.site_checks = check_sites(model, runs, compared.values, compared.tolerance)
    report.sites = site_support(model.sites)
    if report.sites["attention.pattern"].layers and not compared.values.patterns:
        report.notes.append(
            "stock's eager attention gives no weights here: those of attention.pattern were"
            " compared with the heads they make alone"
        )
    return report


def _may_drift(device: torch.device) -> bool:
    return device.type == "cuda"


def _refuse(model: ResumableModel, check: Check, report: LoadReport) -> None:
    advice = "use another model, or run it with stock transformers"
    if check.name == REPEATED:
        advice = "this device does not give the same bits twice; use another one"
    raise UnsupportedModel(
        f"{model.family}: failed the load check {check.name!r} at {check.where}:"
        f" {check.value:.3g}, allowed {check.tolerance:.3g} ({report.dtype}); {advice}",
        family=model.family,
        feature=check.name,
        report=report.as_dict(),
    )


# -- the engine against stock ----------------------------------------------------------------------


def _narrow(config: PretrainedConfig) -> None:
    for name in _WINDOW_FIELDS:
        if getattr(config, name, None):
            setattr(config, name, WINDOW)


@contextlib.contextmanager
def narrowed(model: PreTrainedModel) -> Iterator[None]:
    """The check's narrow windows in the model's own configurations, of which it makes masks."""
    configs = configs_of(model)
    before = [{name: getattr(config, name, None) for name in _WINDOW_FIELDS} for config in configs]
    try:
        for config in configs:
            _narrow(config)
        yield
    finally:
        for config, fields in zip(configs, before, strict=True):
            for name, width in fields.items():
                if width:
                    setattr(config, name, width)


def _compare_with_stock(
    model: ResumableModel,
    report: LoadReport,
    suffix: str,
    engine: list[Trace],
    prompt: Sequence[int],
    feeds: Sequence[int],
    change: Callable[[PretrainedConfig], None] | None,
) -> _Compared:
    base = TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])
    low = model.dtype != torch.float32
    forced = engine if low and _has_experts(model) else None
    ran = _run_stock(model, prompt, feeds, change, forced=forced)
    stock, router = ran.traces, ran.tied
    eager = _run_eager(model, prompt, feeds, change, forced)
    spread = 0.0
    if low and forced is None and not model.eager and eager is not None:
        spread = _own_spread(model, stock, eager.traces)
    tolerance = max(base, _OWN_SPREAD * spread)
    for part, indices in (("prefill", [0]), ("decode", range(1, len(stock)))):
        value, where = 0.0, ""
        for index in indices:
            excused = router[index] if forced is not None else []
            found, place = _worst(model, engine[index], stock[index], excused)
            if found > value or not where:
                value, where = found, place
        report.checks.append(Check(f"{part} against stock{suffix}", value, tolerance, where))
    if forced is not None:
        tied = sum(len(tokens) for forward in router for tokens in forward)
        report.notes.append(
            f"mixture of experts in {report.dtype}: every layer was compared on the engine's own"
            f" inputs{suffix}; {tied} choices of experts nearer than the tolerance left out"
        )
    end = len(prompt) + len(feeds)
    patterns = eager.patterns if eager is not None else []
    patterns = patterns if len(patterns) == 1 + len(feeds) else []
    return _Compared(StockValues(*_kept(ran.cache, model.num_layers), end, patterns), tolerance)


def _kept(cache: Any, num_layers: int) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Keys and values by layer as stock's cache holds them."""
    layers = list(getattr(cache, "layers", []))[:num_layers]
    layers += [None] * (num_layers - len(layers))
    kinds = ("keys", "values")
    keys, values = ([getattr(layer, kind, None) for layer in layers] for kind in kinds)
    return keys, values


def _run_eager(
    model: ResumableModel,
    prompt: Sequence[int],
    feeds: Sequence[int],
    change: Callable[[PretrainedConfig], None] | None,
    forced: list[Trace] | None,
) -> _StockRun | None:
    """The same by stock's eager attention, with its weights; None where a family's eager fails."""
    try:
        return _run_stock(model, prompt, feeds, change, eager=True, forced=forced)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None


def _own_spread(model: ResumableModel, stock: list[Trace], other: list[Trace]) -> float:
    """What stock's eager attention and its SDPA differ by."""
    spread = max(_worst(model, other[i], stock[i], [])[0] for i in range(len(stock)))
    return spread if math.isfinite(spread) else 0.0


def _has_experts(model: ResumableModel) -> bool:
    return any((getattr(model.config, name, 0) or 0) > 1 for name in _EXPERT_FIELDS)


def _place(point: int, layers: int) -> str:
    if point == 0:
        return "embedding"
    return f"layers.{point - 1}.output" if point <= layers else "final_norm"


def _worst(
    model: ResumableModel, ours: Trace, stock: Trace, excused: Sequence[set[int]]
) -> tuple[float, str]:
    """The largest relative difference of one token's vector, and where it is."""
    found: list[tuple[float, str]] = []
    for point, (left, right) in enumerate(zip(ours.points, stock.points, strict=True)):
        difference = _differences(left, right)
        if excused and 1 <= point <= model.num_layers:
            for token in excused[point - 1]:
                difference[token] = 0.0
        found.append((float(difference.max()), _place(point, model.num_layers)))
    found.append((float(_differences(ours.logits[None], stock.logits[None]).max()), "logits"))
    # NaN compares as nothing, so it is named first.
    for value, where in found:
        if math.isnan(value):
            return math.inf, where
    return max(found, key=lambda item: item[0])


def _differences(ours: Tensor, stock: Tensor) -> Tensor:
    """Per token, the length of the difference relative to the stock vector's."""
    left, right = ours.float(), stock.float()
    return (left - right).norm(dim=-1) / right.norm(dim=-1).clamp_min(1e-12)


@dataclass(slots=True)
class _StockRun:
    """Forwards by stock: their traces, its cache, and by forward and layer the tokens at which the
    choice of experts was nearly a tie, and the attention weights where it was asked for them."""

    traces: list[Trace]
    cache: Any
    tied: list[list[set[int]]]
    patterns: list[list[Tensor]]


@dataclass(frozen=True, slots=True)
class _Compared:
    """What the sites are compared with, and the tolerance that held for the points."""

    values: StockValues
    tolerance: float


@torch.no_grad()
def _run_stock(
    model: ResumableModel,
    prompt: Sequence[int],
    feeds: Sequence[int],
    change: Callable[[PretrainedConfig], None] | None,
    *,
    eager: bool = False,
    forced: list[Trace] | None = None,
) -> _StockRun:
    """The same forwards by stock transformers with its own cache.

    eager: by its eager attention, which also gives the weights. forced: each layer is given the
    engine's input instead of its own predecessor's output.
    """
    twin = model.stock(change)
    if eager:
        twin.set_attn_implementation("eager")
    layers = list(twin.get_submodule(model.anatomy.layers_path))
    gaps = _RouterGaps(model, layers) if forced is not None else None
    now: dict[str, Any] = {}

    def before(index: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if index == 0:
                now["points"].append(hidden[0])
            if forced is None:
                return None
            given = forced[now["forward"]].points[index][None]
            if args:
                return (given, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": given}

        return hook

    def after(index: int) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            now["points"].append((output[0] if isinstance(output, tuple) else output)[0])
            if forced is None or index < len(layers) - 1:
                return None
            given = forced[now["forward"]].points[index + 1][None]
            return (given, *output[1:]) if isinstance(output, tuple) else given

        return hook

    def ended(_: nn.Module, __: Any, output: Any) -> Any:
        now["points"].append(model.last_hidden_state(output)[0])
        now["weights"] = getattr(output, "attentions", None) or ()
        if forced is None:
            return None
        return model.with_last_hidden_state(forced[now["forward"]].points[-1][None])

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(before(index), with_kwargs=True)
        layer.register_forward_hook(after(index))
    twin.get_submodule(model.entry_path).register_forward_hook(ended)
    cache = DynamicCache(config=twin.config)
    run = _StockRun([], cache, [], [])
    asked = {"output_attentions": True} if eager else {}
    for number, tokens in enumerate([list(prompt), *([token] for token in feeds)]):
        now["points"], now["forward"] = [], number
        ids = torch.tensor([tokens], device=model.device)
        output = twin(input_ids=ids, past_key_values=cache, use_cache=True, **asked)
        run.traces.append(Trace(now["points"], output.logits[0, -1]))
        run.tied.append(gaps.take() if gaps is not None else [])
        weights = now["weights"]
        if len(weights) == len(layers) and all(isinstance(w, Tensor) for w in weights):
            run.patterns.append(list(weights))
    return run


class _RouterGaps:
    """Which tokens of stock's forwards had two experts nearly tied at the edge of the choice."""

    def __init__(self, model: ResumableModel, layers: Sequence[nn.Module]) -> None:
        config = model.config
        experts = next((getattr(config, n) for n in _EXPERT_FIELDS if getattr(config, n, 0)), 0)
        self._chosen = int(getattr(config, "num_experts_per_tok", None) or 1)
        self._near = TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16])
        self._tokens: list[set[int]] = [set() for _ in layers]
        for index, layer in enumerate(layers):
            for module in layer.modules():
                weight = module._parameters.get("weight")
                if weight is not None and weight.shape == (experts, config.hidden_size):
                    module.register_forward_pre_hook(self._watch(index, weight))

    def _watch(self, index: int, weight: Tensor) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            states = args[0].reshape(-1, weight.shape[1]).float()
            scores = states @ weight.float().T
            bias = module._parameters.get("bias")
            if bias is not None:
                scores = scores + bias.float()
            ordered = scores.sort(-1, descending=True).values
            gap = ordered[:, self._chosen - 1] - ordered[:, self._chosen]
            near = gap < self._near * scores.abs().amax(-1)
            self._tokens[index].update(near.nonzero()[:, 0].tolist())

        return hook

    def take(self) -> list[set[int]]:
        """Tokens nearly tied since the last call, by layer."""
        taken, self._tokens = self._tokens, [set() for _ in self._tokens]
        return taken


def _bits(name: str, first: list[Trace], second: list[Trace]) -> Check:
    """Counts the tensors that differ in any bit between two runs."""
    differing, where = 0, "every point"
    for number, (left, right) in enumerate(zip(first, second, strict=True)):
        layers = len(left.points) - 2
        pairs = [*zip(left.points, right.points, strict=True), (left.logits, right.logits)]
        for point, (a, b) in enumerate(pairs):
            if not torch.equal(a, b):
                differing += 1
                place = "logits" if point == len(pairs) - 1 else _place(point, layers)
                where = f"{place} of forward {number}" if differing == 1 else where
    return Check(name, float(differing), 0.0, where)
