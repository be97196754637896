"""From a stock model to one that serves sessions: made resumable, measured, checked, given pages.

Runs the load check on a small pool of pages, some of them poisoned; only a model that passes gets
its pool. Reading weights is `models.registry`'s work.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch
from transformers import PreTrainedModel

from kernel_server.engine.attention import Calibration, PagedAttentionRoute
from kernel_server.engine.cache_route import CacheCalibration, CacheRoute, longest_prompt
from kernel_server.engine.graphs import LayerGraphs, NotRecorded
from kernel_server.engine.kv_cache import KVCache, PageShape, choose_page_shape
from kernel_server.engine.segments import ForwardState, Segments
from kernel_server.engine.workspace import measure_workspace
from kernel_server.models.altered import refuse_quantised_model
from kernel_server.models.resumable import AttentionRoute, ResumableModel
from kernel_server.models.selftest import REPEATED, LoadReport, Trace, check_model, narrowed
from kernel_server.models.site_check import LayerRun
from kernel_server.protocol.errors import (
    BadArgument,
    DjinnError,
    OutOfDeviceMemory,
    UnsupportedModel,
)
from kernel_server.protocol.location import Point
from kernel_server.protocol.messages import SiteLayout

log = logging.getLogger(__name__)

#: Tokens, and decodes, on which graphs are compared: the first decodes come before they are there.
_GRAPH_PROMPT, _GRAPH_DECODES = 12, 6
#: Without --kv-memory: this part of what is free, and on the CPU no more than this.
_FREE_SHARE = 0.85
_CPU_BYTES = 1 << 30
#: Features whose refusal another route would not change.
_NOT_THE_ROUTE_S = ("recurrent state", "layer list", "residual stream", "dynamic RoPE", REPEATED)


@dataclass(frozen=True, slots=True)
class Served:
    """A checked model with its pages, ready for the engine."""

    model: ResumableModel
    segments: Segments
    cache: KVCache
    report: LoadReport
    #: what a cap over the device leaves for tensors beside pages; None: there is no cap
    tensor_bytes: int | None = None

    @property
    def sites(self) -> tuple[tuple[SiteLayout, ...], ...]:
        """Layer by layer, the sites inside it that work, with their heads and widths."""
        return tuple(layer.supported for layer in self.model.sites)

    @property
    def max_prompt(self) -> int | None:
        """Tokens of the longest prompt that masks leave room for; None where none are kept."""
        if self.model.cache is None:
            return None
        return longest_prompt(self.model.pair_bytes)


def serve(
    model: PreTrainedModel,
    *,
    kv_memory_bytes: int | None = None,
    device_memory_bytes: int | None = None,
    kept_memory_bytes: int = 0,
    prefill_chunk: int = 512,
    page_tokens: int | None = None,
    group_layers: int | None = None,
    cuda_graphs: bool = True,
) -> Served:
    """Make a stock model resumable, check it against transformers, and give it a page pool.

    kv_memory_bytes: of the pool; without it 85 % of what is free, at most 1 GiB on the CPU.
    device_memory_bytes: a cap over weights, pool, the workspace of a chunk, which is measured, and
        the tensors that sessions hold beside their pages.
    kept_memory_bytes: what is left for those under that cap, at least.
    page_tokens, group_layers: T and G of a page, chosen for the geometry when not given.
    cuda_graphs: run layers of a decode as graphs, on a GPU and where they give the same bits.

    Raises UnsupportedModel, BadArgument if the pool is too small, or OutOfDeviceMemory.

    >>> served = serve(stock_model, kv_memory_bytes=64 << 20)  # doctest: +SKIP
    """
    resumable, shape, report = resume(model, page_tokens=page_tokens, group_layers=group_layers)
    on_gpu = resumable.device.type == "cuda"
    graphs = layer_graphs(resumable, shape) if cuda_graphs and on_gpu else None
    if graphs is not None:
        report.notes.append(
            f"{graphs.num_recorded} of {resumable.num_layers} layers run as CUDA graphs in a decode"
        )
    wanted, room = kv_memory_bytes, None
    if device_memory_bytes is not None:
        cap, kept = device_memory_bytes, kept_memory_bytes
        room = _room_under(cap, kept, resumable, shape, prefill_chunk, graphs)
        if wanted is not None and wanted > room.pages:
            raise BadArgument(f"--kv-memory of {wanted:,} bytes does not fit: {room.why}")
        wanted = room.pages if wanted is None else wanted
        least = shape.num_groups * shape.page_bytes
        if wanted < least:
            raise BadArgument(f"a session needs {least:,} bytes of pages: {room.why}")
    if wanted is None:
        wanted = _default_bytes(resumable.device)
    num_pages = wanted // shape.page_bytes
    if num_pages < shape.num_groups:
        raise BadArgument(
            f"--kv-memory of {wanted:,} bytes holds {num_pages} pages of {shape.page_bytes:,}, and"
            f" one session needs at least {shape.num_groups}: give"
            f" {shape.num_groups * shape.page_bytes:,} or more"
        )
    try:
        cache = KVCache(shape, num_pages, resumable.device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        raise OutOfDeviceMemory(
            f"{wanted:,} bytes of pages do not fit on {resumable.device}: start the server with"
            " less --kv-memory"
        ) from error
    segments = Segments(resumable, cache, prefill_chunk=prefill_chunk, graphs=graphs)
    beside = None if room is None else kept_memory_bytes + room.pages - cache.pool.nbytes
    return Served(resumable, segments, cache, report, beside)


def layer_graphs(model: ResumableModel, shape: PageShape) -> LayerGraphs | None:
    """Graphs of the model's layers; None where there are none, or where one bit differs.

    A few decodes are run without them and with them, in one go and stopping at every point.
    """
    try:
        graphs = LayerGraphs(model)
    except NotRecorded as reason:
        log.info("decodes run without CUDA graphs: %s", reason)
        return None
    small = PageShape(min(shape.page_tokens, 16), shape.group_layers, shape.layers, shape.dtype)
    runner = CheckRunner(model, small)
    ids = model.sample_ids(_GRAPH_PROMPT + _GRAPH_DECODES)
    prompt, feeds = ids[:_GRAPH_PROMPT], ids[_GRAPH_PROMPT:]
    plain = runner.run(prompt, feeds, chunk=_GRAPH_PROMPT)
    runner.graphs = graphs
    for stops in (False, True):
        found = runner.run(prompt, feeds, chunk=_GRAPH_PROMPT, stops=stops)
        if not all(_same_bits(a, b) for a, b in zip(plain, found, strict=True)):
            log.warning("decodes run without CUDA graphs: with them other bits come out")
            return None
    if not graphs.num_recorded:
        log.info("decodes run without CUDA graphs: %s", next(iter(graphs.refused.values()), ""))
        return None
    return graphs


def _same_bits(left: Trace, right: Trace) -> bool:
    pairs = zip([*left.points, left.logits], [*right.points, right.logits], strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def resume(
    model: PreTrainedModel, *, page_tokens: int | None = None, group_layers: int | None = None
) -> tuple[ResumableModel, PageShape, LoadReport]:
    """Make a stock model resumable by the first route that passes the load check.

    The attention function is tried before the Cache route, which costs more and bounds the prompt;
    that one runs eager attention, or stock's own where eager is not what stock computes.
    Raises UnsupportedModel with the reasons of both if neither passes.
    """
    refuse_quantised_model(model)
    refusals: list[UnsupportedModel] = []
    routes: list[AttentionRoute] = [PagedAttentionRoute(), CacheRoute()]
    if model.config._attn_implementation == "sdpa":
        routes.append(CacheRoute("sdpa"))
    for route in routes:
        resumable = None
        try:
            resumable = ResumableModel(model, route)
            shape = page_shape(resumable, page_tokens=page_tokens, group_layers=group_layers)
            return resumable, shape, _checked(resumable, shape)
        except UnsupportedModel as refusal:
            if resumable is not None:
                resumable.release()
            refusals.append(refusal)
            feature = str(refusal.details.get("feature"))
            if feature in _NOT_THE_ROUTE_S or (
                isinstance(route, CacheRoute) and " against stock" not in feature
            ):
                break
    raise _joined(refusals[:2])


def _checked(model: ResumableModel, shape: PageShape) -> LoadReport:
    """The load check; what the model itself raises in it is a refusal too."""
    try:
        return load_check(model, shape)
    except (DjinnError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        line = (str(error).splitlines() or ["no message"])[0]
        model.refuse(f"the load check ended in {type(error).__name__}: {line}", "load check")


def _joined(refusals: Sequence[UnsupportedModel]) -> UnsupportedModel:
    """One refusal that gives each route's reason, and what the first advises."""
    first, last = refusals[0], refusals[-1]
    if first.details.get("feature") == last.details.get("feature"):
        return first
    reason, _, advice = str(first).rpartition("; ")
    other = str(last).rpartition("; ")[0].removeprefix(f"{last.details.get('family')}: ")
    details = {**first.details, "cache_route": dict(last.details)}
    return UnsupportedModel(f"{reason}; and by the Cache route: {other}; {advice}", **details)


def page_shape(
    model: ResumableModel, *, page_tokens: int | None = None, group_layers: int | None = None
) -> PageShape:
    """Pages for the keys and values this model was seen to make."""
    seen: Calibration | CacheCalibration = model.observer
    layers = [seen.layers[index] for index in range(model.num_layers)]
    return choose_page_shape(
        layers, model.dtype, page_tokens=page_tokens, group_layers=group_layers
    )


def load_check(model: ResumableModel, shape: PageShape) -> LoadReport:
    """Run the load check of a resumable model; raises UnsupportedModel if it fails."""
    seen: Calibration | CacheCalibration = model.observer
    windows = [seen.windows[index] for index in range(model.num_layers)]
    # Small pages: the check must cross their borders, whatever the model's own page length.
    small = PageShape(min(shape.page_tokens, 16), shape.group_layers, shape.layers, shape.dtype)
    return check_model(model, CheckRunner(model, small), windows)


class CheckRunner:
    """Runs the load check's prompts over a small pool; every run gets other, poisoned pages."""

    def __init__(self, model: ResumableModel, shape: PageShape, max_tokens: int = 32) -> None:
        self._model = model
        self._groups = shape.num_groups
        self._pages = shape.pages_for(max_tokens)
        self._cache = KVCache(shape, 2 * self._groups * self._pages, model.device)
        self._half = 0
        #: of the layers, for the runs to come
        self.graphs: LayerGraphs | None = None

    def fill(self) -> int:
        """Write every page once, so that its memory is taken; returns the bytes."""
        self._cache.poison(range(self._cache.num_pages))
        return self._cache.pool.nbytes

    def run(
        self,
        prompt: Sequence[int],
        feeds: Sequence[int],
        *,
        chunk: int,
        stops: bool = False,
        window: int | None = None,
    ) -> list[Trace]:
        """One trace per forward: the prompt, then each token of `feeds` alone."""
        if window is not None and self._model.cache is not None:
            # the windows are in the masks, which the model makes
            with narrowed(self._model.model):
                return self.run(prompt, feeds, chunk=chunk, stops=stops)
        segments, tables = self._fresh(chunk, window)
        traces, start = [], 0
        for tokens in [list(prompt), *([token] for token in feeds)]:
            traces.append(self._forward(segments, segments.begin(tokens, start), tables, stops))
            start += len(tokens)
        return traces

    def layers(
        self, prompt: Sequence[int], feed: int, *, chunk: int, window: int | None = None
    ) -> Iterator[LayerRun]:
        """Every layer of the prompt's forward and of one decode, to be visited."""
        with contextlib.ExitStack() as stack:
            if window is not None and self._model.cache is not None:
                stack.enter_context(narrowed(self._model.model))
                window = None
            segments, tables = self._fresh(chunk, window)
            start = 0
            for number, tokens in enumerate((list(prompt), [feed])):
                state = segments.begin(tokens, start)
                segments.advance(state, 0, tables, _go_on)
                for layer in range(segments.num_layers):
                    after = state.fork()
                    segments.advance(after, layer + 1, tables, _go_on)
                    yield LayerRun(
                        layer,
                        number,
                        start,
                        state.residual,
                        after.residual,
                        functools.partial(segments.visit, state, tables),
                    )
                    # Once more as always: visits have left other keys and values in the pages.
                    segments.advance(state, layer + 1, tables, _go_on)
                start += len(tokens)

    def _fresh(self, chunk: int, window: int | None) -> tuple[Segments, list[list[int]]]:
        cache = self._cache
        cache.poison(range(cache.num_pages))
        segments = Segments(self._model, cache, prefill_chunk=chunk, graphs=self.graphs)
        segments.window = window
        self._half = 1 - self._half
        # Ids in falling order, so that neighbours in a table are no neighbours in the pool.
        free = list(range(self._half, cache.num_pages, 2))
        return segments, [[free.pop() for _ in range(self._pages)] for _ in range(self._groups)]

    def _forward(
        self, segments: Segments, state: ForwardState, tables: list[list[int]], stops: bool
    ) -> Trace:
        last = segments.num_layers + 2
        points: list[torch.Tensor] = []

        def on_point(point: Point, state: ForwardState) -> bool:
            if point < last:
                points.append(torch.cat(segments.value(state), 1)[0])
            return stops

        while state.point < last:
            segments.advance(state, last, tables, on_point)
            if stops:
                state = state.fork()
                state.drop_cache()
        return Trace(points, segments.logits(state))


def _go_on(point: Point, state: ForwardState) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class _Room:
    """What a cap leaves for pages, bytes, and the sum that says so."""

    pages: int
    why: str


def _room_under(
    cap: int,
    kept: int,
    model: ResumableModel,
    shape: PageShape,
    chunk: int,
    graphs: LayerGraphs | None,
) -> _Room:
    stock = model.model
    weights = sum(t.nbytes for t in (*stock.parameters(), *stock.buffers()))
    runner = CheckRunner(model, shape, max_tokens=chunk + 1)
    runner.graphs = graphs
    held = weights + runner.fill()

    def prefill() -> None:
        runner.run([0] * chunk, [0], chunk=chunk)

    used = measure_workspace(model.device, prefill, held)
    pages = cap - weights - used - kept
    return _Room(
        max(pages, 0),
        f"--device-memory of {cap:,} leaves {pages:,} after {weights:,} of weights, {used:,} of"
        f" workspace for a chunk of {chunk} tokens and {kept:,} for tensors of stops; give more,"
        " or a smaller --prefill-chunk or --kept-memory",
    )


def _default_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * _FREE_SHARE)
    return min(_CPU_BYTES, int(psutil.virtual_memory().available * _FREE_SHARE / 2))
