"""Runs one forward of one session from point to point, and can stop and go on at each.

Points, in order: 0 embedding, i + 1 the output of layer i, L + 1 final norm, L + 2 logits. A
forward of one chunk runs in a single pass of the model until it stops; then, and in chunks of a
long prompt, the recorded layer calls are replayed. Both make the same calls, so both give the same
bits. A point inside layer i lies between i and i + 1: the layer is run up to there, all chunks, and
runs again from its input to go on; only edits inside it change the way it runs. Whether to stop,
and which pages belong to the session, is decided by the caller.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernel_server.engine.attention import PagedWork
from kernel_server.engine.forward_state import ForwardState
from kernel_server.engine.graphs import LayerGraphs
from kernel_server.engine.kv_cache import KVCache
from kernel_server.models.recording import Call, Recording, cut_call
from kernel_server.models.resumable import ResumableModel
from kernel_server.models.routers import RouterReading, reading_router
from kernel_server.models.sites import Visit
from kernel_server.protocol.errors import (
    BadArgument,
    NotSupported,
    OutOfDeviceMemory,
    ServerFault,
)
from kernel_server.protocol.location import (
    NOT_STARTED,
    Point,
    is_inner,
    layer_of,
    location_at,
    site_of,
)
from kernel_server.protocol.messages import SiteLayout

__all__ = ["NOT_STARTED", "ForwardState", "OnPoint", "Segments"]

#: An attention pattern grows with the square of the prompt: this much of it is kept at a stop.
MAX_PATTERN_BYTES = 4 << 30
#: Masks of a prompt (Cache route) that stay with a session that is not running; larger ones are
#: made again when it goes on.
KEPT_MASK_BYTES = 16 << 20

#: Called when a point has been reached; may replace the value there; True stops the forward.
OnPoint = Callable[[Point, ForwardState], bool]


class Segments:
    """Runs forwards of a `ResumableModel` over the pages of `cache`.

    prefill_chunk: tokens per chunk; chunks are cut at its multiples, counted from the session's
    first token. graphs: of the layers, for forwards of one token; None: there are none.
    """

    def __init__(
        self,
        model: ResumableModel,
        cache: KVCache,
        *,
        prefill_chunk: int = 512,
        graphs: LayerGraphs | None = None,
    ) -> None:
        if prefill_chunk < 1:
            raise BadArgument(f"prefill_chunk is {prefill_chunk}: choose at least 1 token")
        self.model = model
        self.cache = cache
        self.prefill_chunk = prefill_chunk
        self.num_layers = model.num_layers
        self.graphs = graphs
        #: replaces the model's sliding windows; the load check alone sets it
        self.window: int | None = None

    def begin(self, token_ids: Sequence[int], start: int) -> ForwardState:
        """A forward of `token_ids` for a session that has computed `start` tokens before."""
        size, count = self.prefill_chunk, len(token_ids)
        if count == 0:
            raise ServerFault("a forward needs at least one token")
        cuts = [0, *range(size - start % size, count, size), count]
        bounds = tuple(itertools.pairwise(cuts))
        return ForwardState(tuple(token_ids), start, bounds)

    def advance(
        self,
        state: ForwardState,
        until: Point,
        tables: Sequence[Sequence[int]],
        on_point: OnPoint,
        visits: Sequence[Point] = (),
    ) -> Point:
        """Run `state` up to point `until`, or to an earlier one where `on_point` says stop.

        tables: page ids by group, covering this forward's tokens in every group reached and begun.
        visits: points inside layers, ascending, at which `on_point` is called too; `until` may be
        one more. Returns the point reached. If a layer raises, `state` stands at the last point
        reached. Raises NotSupported for a site the model lacks, and then changes nothing.
        """
        if state.point >= until:
            return state.point
        inner = _Inner(state.point, until, visits)
        for point in inner.waiting:
            self.layout(point, state)
        work = self._work(state, tables)
        with torch.inference_mode(), work.serving():
            if state.point == NOT_STARTED and len(state.bounds) == 1:
                running = self._one_pass(state, until, work, on_point, inner)
            elif state.point == NOT_STARTED:
                running = self._embed(state, on_point)
            else:
                running = True
            while running and state.point < until:
                running = self._one_point(state, work, on_point, inner)
        if self.model.pair_bytes * len(state.token_ids) ** 2 > KEPT_MASK_BYTES:
            state.drop_cache()
        return state.point

    def visit(
        self,
        state: ForwardState,
        tables: Sequence[Sequence[int]],
        visits: Sequence[Visit | None],
    ) -> list[Tensor | None]:
        """Run the layer that `state` stands before, or in, for a visit of each chunk.

        `state` stays where it is; pages of the layer are written as the visits leave keys and
        values. None stands for a chunk that is left out, or one whose visit ended inside.
        """
        work = self._work(state, tables)
        index = layer_of(state.point)
        with torch.inference_mode(), work.serving():
            return [
                None
                if visit is None
                else self._visit(state, index, chunk, self._call(state, index, chunk), work, visit)
                for chunk, visit in enumerate(visits)
            ]

    def router(
        self, state: ForwardState, layer: int, tables: Sequence[Sequence[int]]
    ) -> RouterReading:
        """What the router of `layer` decides in a forward that stands before that layer or in it.

        Edits made inside the layer so far are part of it. Raises NotSupported where the layer has
        no mixture of experts, or one whose router is not understood.
        """
        router = self.model.sites[layer].router
        if router is None:
            raise NotSupported(
                f"layer {layer} of this {self.model.family} model has no router that returns its"
                " logits, experts and weights: look at its mlp.output instead",
                layer=layer,
            )
        if layer_of(state.point) != layer:
            raise ServerFault(
                f"the forward stands at point {state.point}, not before or in layer {layer}"
            )
        readings = []
        for chunk, (begin, end) in enumerate(state.bounds):
            put = {site: chunks[chunk] for site, chunks in state.injected.items()}
            visits: list[Visit | None] = [None] * len(state.bounds)
            visits[chunk] = Visit(put)
            with reading_router(router, end - begin) as taken:
                self.visit(state, tables, visits)
            if len(taken) != 1:
                raise ServerFault(f"the router of layer {layer} ran {len(taken)} times")
            readings += taken
        state.layer_runs += 1
        return RouterReading(
            torch.cat([reading.logits for reading in readings]),
            torch.cat([reading.experts for reading in readings]),
            torch.cat([reading.weights for reading in readings]),
        )

    def _work(self, state: ForwardState, tables: Sequence[Sequence[int]]) -> PagedWork:
        work: PagedWork = self.model.route.work(
            self.cache,
            tables,
            total=state.start + len(state.token_ids),
            eager=self.model.eager,
            window=self.window,
        )
        return work

    def layout(self, point: Point, state: ForwardState | None = None) -> SiteLayout:
        """The channels at a point inside a layer.

        Raises NotSupported, with the reason, where the model does not have the site, and
        OutOfDeviceMemory where its value in the forward `state` would be too large to keep.
        """
        layer, site = layer_of(point), site_of(point)
        sites = self.model.sites[layer]
        layout = sites.layouts.get(site)
        name = location_at(point, self.num_layers)
        if layout is None:
            raise NotSupported(
                f"{name}: this {self.model.family} model does not have it"
                f" ({sites.off.get(site, 'not found')}); `kernel_server selftest` lists the sites"
                " it has",
                site=site,
                layer=layer,
            )
        if state is not None and site == "attention.pattern":
            tokens, heads = len(state.token_ids), layout.heads or 1
            size = tokens * heads * (state.start + tokens) * self.model.dtype.itemsize
            if size > MAX_PATTERN_BYTES:
                raise OutOfDeviceMemory(
                    f"{name} of {tokens:,} tokens takes {size:,} bytes, at most"
                    f" {MAX_PATTERN_BYTES:,} are kept: look at it in a later forward, or at"
                    " attention.heads"
                )
        return layout

    # -- values at a point ---------------------------------------------------------------------

    def value(self, state: ForwardState) -> list[Tensor]:
        """The tensor at the forward's point, chunk by chunk, each [1, tokens, width].

        At the logits: one [1, 1, vocabulary], of the last token. At an attention pattern each token
        has heads * keys channels, the keys being all positions up to the forward's end. Final norms
        of earlier chunks of a long prompt are computed now.
        """
        if state.point < 0:
            raise ServerFault("the forward has not started, so it has no value yet")
        if state.site_value is not None:
            return list(state.site_value)
        if state.point <= self.num_layers:
            return list(state.residual)
        if state.point == self.num_layers + 1:
            with torch.inference_mode():
                for chunk, final in enumerate(state.final_norm):
                    if final is None:
                        state.final_norm[chunk] = self._norm(state, chunk)
            return [final for final in state.final_norm if final is not None]
        assert state.logits is not None
        return [state.logits[None, None]]

    def set_value(self, state: ForwardState, chunks: Sequence[Tensor]) -> None:
        """Put other tensors in the place of `value(state)`; shapes and dtype must be the same.

        Inside a layer the very tensors that the layer computed take the edit back. Weights put
        where an attention pattern is masked have no effect.
        """
        before = self.value(state)
        if [(c.shape, c.dtype) for c in before] != [(c.shape, c.dtype) for c in chunks]:
            raise ServerFault(
                f"the value at point {state.point} has chunks {[list(c.shape) for c in before]},"
                f" not {[list(c.shape) for c in chunks]}"
            )
        if state.site_value is not None:
            state.put([chunk.contiguous() for chunk in chunks])
        elif state.point <= self.num_layers:
            state.residual = [chunk.contiguous() for chunk in chunks]
        elif state.point == self.num_layers + 1:
            state.final_norm = [chunk.contiguous() for chunk in chunks]
        else:
            state.logits = chunks[0][0, 0].contiguous()

    def logits(self, state: ForwardState) -> Tensor:
        """Logits [vocabulary] of the forward's last token; the forward stands at its logits."""
        if state.logits is None:
            raise ServerFault(f"the forward stands at point {state.point}, before its logits")
        return state.logits

    def lens(self, rows: Tensor, *, normed: bool = False) -> Tensor:
        """Logits [tokens, vocabulary] read off residual rows [tokens, hidden].

        normed: the rows have passed the final norm already.
        """
        with torch.inference_mode():
            ids, positions = self.model.inputs([0] * rows.shape[0], 0)
            states = rows[None].contiguous()
            if not normed:
                states = self.model.norm(states, ids, positions)
            return self.model.head(states, ids, positions)

    # -- running -------------------------------------------------------------------------------

    def _one_pass(
        self,
        state: ForwardState,
        until: Point,
        work: PagedWork,
        on_point: OnPoint,
        inner: _Inner,
    ) -> bool:
        """Run a forward of one chunk inside one call of the model; False if it was stopped."""
        model, begin = self.model, state.start
        end = begin + len(state.token_ids)
        stopped = False
        #: nothing is to be seen inside a layer: every decode that nobody watches there
        passing = not inner.waiting

        def step(index: int, hidden: Tensor, call: Call) -> Tensor | None:
            nonlocal stopped
            if index == 0:
                state.residual = [hidden]
                state.point = 0
                stopped = on_point(0, state)
                if stopped or until == 0:
                    return None
            if passing:
                state.residual = [
                    self._call_layer(index, state.residual[0], call, work, begin, end)
                ]
            else:
                while (point := inner.next(index)) is not None:
                    state.arrive(point, [self._probe(state, point, 0, call, work)])
                    state.layer_runs += 1
                    stopped = on_point(point, state)
                    if stopped or until == point:
                        return None
                state.residual = [self._replay_or_run(state, index, call, work)]
                state.leave_layer()
            state.layer_runs += 1
            state.point = index + 1
            stopped = on_point(index + 1, state)
            return None if stopped or until == index + 1 else state.residual[0]

        recording, final = model.forward(*model.inputs(state.token_ids, begin), step)
        state.recording = recording
        if end - begin > 1:
            recording.forget_embedding()
        if final is None:
            return not stopped
        state.final_norm = [final]
        state.point = self.num_layers + 1
        return not on_point(state.point, state)

    def _embed(self, state: ForwardState, on_point: OnPoint) -> bool:
        """Run the preamble of a long prompt, whole."""
        recording = self._recorded(state)
        embedding = recording.embedding
        assert embedding is not None
        # Copies: a chunk restored from elsewhere stands alone, so these do too.
        state.residual = [embedding[:, a:b].clone() for a, b in state.bounds]
        recording.forget_embedding()
        state.point = 0
        return not on_point(0, state)

    def _one_point(
        self, state: ForwardState, work: PagedWork, on_point: OnPoint, inner: _Inner
    ) -> bool:
        """Go on by one point; False if the forward was stopped there."""
        point = math.floor(state.point)
        inside = inner.next(point)
        if inside is not None:
            state.arrive(inside, self._site(state, inside, work))
            state.layer_runs += 1
            return not on_point(inside, state)
        if point < self.num_layers:
            state.residual = self._layer(state, point, work)
            state.leave_layer()
            state.layer_runs += 1
        elif point == self.num_layers:
            last = len(state.bounds) - 1
            state.final_norm = [None] * last + [self._norm(state, last)]
        else:
            state.logits = self._head(state)
        state.point = point + 1
        return not on_point(state.point, state)

    def _layer(self, state: ForwardState, index: int, work: PagedWork) -> list[Tensor]:
        """Call layer `index` for every chunk in turn, with the edits inside it if there are any."""
        outputs = []
        for chunk, (begin, end) in enumerate(state.bounds):
            call = self._call(state, index, chunk)
            if state.injected:
                outputs.append(self._replay(state, index, chunk, call, work))
                continue
            hidden, start = state.residual[chunk], state.start
            outputs.append(self._call_layer(index, hidden, call, work, start + begin, start + end))
        return outputs

    def _call_layer(
        self, index: int, hidden: Tensor, call: Call, work: PagedWork, begin: int, end: int
    ) -> Tensor:
        """Call layer `index` for the positions [begin, end), which nobody looks into."""
        work.enter(index, begin, end)
        if self.graphs is not None and end - begin == 1:
            output = self.graphs.call_layer(index, hidden, call, work)
        else:
            output = self.model.call_layer(index, hidden, call)
        work.leave()
        return output

    def _call(self, state: ForwardState, index: int, chunk: int) -> Call:
        """The arguments of layer `index` for one chunk."""
        recording = self._recorded(state)
        if len(state.bounds) == 1:
            return recording.calls[index]
        begin, end = state.bounds[chunk]
        return cut_call(
            recording, index, self.model.axes[index], begin, end, keys=state.start + end
        )

    def _replay_or_run(
        self, state: ForwardState, index: int, call: Call, work: PagedWork
    ) -> Tensor:
        """Call layer `index` for a forward of one chunk, with the edits inside it if any."""
        if state.injected:
            return self._replay(state, index, 0, call, work)
        begin, end = state.start, state.start + len(state.token_ids)
        return self._call_layer(index, state.residual[0], call, work, begin, end)

    # -- inside a layer ------------------------------------------------------------------------

    def _site(self, state: ForwardState, point: Point, work: PagedWork) -> list[Tensor]:
        """Run every chunk up to a point inside its layer; the values there."""
        index = layer_of(point)
        return [
            self._probe(state, point, chunk, self._call(state, index, chunk), work)
            for chunk in range(len(state.bounds))
        ]

    def _probe(
        self, state: ForwardState, point: Point, chunk: int, call: Call, work: PagedWork
    ) -> Tensor:
        """The value [1, tokens, channels] of one chunk at a point inside its layer."""
        site = site_of(point)
        # An edit of this very site is not a part of what the layer computes there.
        put = {name: chunks[chunk] for name, chunks in state.injected.items() if name != site}
        visit = Visit(put, until=site)
        if self._visit(state, layer_of(point), chunk, call, work, visit) is not None:
            raise ServerFault(f"layer {layer_of(point)} never came to its {site}")
        return visit.taken[site]

    def _replay(
        self, state: ForwardState, index: int, chunk: int, call: Call, work: PagedWork
    ) -> Tensor:
        """Run one chunk through the layer with the edits inside it; the residual stream after."""
        visit = Visit({name: chunks[chunk] for name, chunks in state.injected.items()})
        output = self._visit(state, index, chunk, call, work, visit)
        missed = [name for name in visit.injected if name not in visit.asked]
        if output is None or missed:
            raise ServerFault(f"layer {index} never came to its edited {missed}")
        return output

    def _visit(
        self,
        state: ForwardState,
        index: int,
        chunk: int,
        call: Call,
        work: PagedWork,
        visit: Visit,
    ) -> Tensor | None:
        begin, end = state.bounds[chunk]
        work.enter(index, state.start + begin, state.start + end)
        work.visit = visit
        output = None
        try:
            output = self.model.visit_layer(index, state.residual[chunk], call, visit)
        finally:
            work.visit = None
            work.leave(ended=output is None)
        return output

    def _norm(self, state: ForwardState, chunk: int) -> Tensor:
        """The final norm of one chunk, [1, tokens, hidden]."""
        model, residual = self.model, state.residual[chunk]
        if len(state.bounds) == 1:
            recording = self._recorded(state)
            return model.norm(residual, recording.token_ids, recording.positions, recording)
        begin, end = state.bounds[chunk]
        return model.norm(residual, *model.inputs(state.token_ids[begin:end], state.start + begin))

    def _head(self, state: ForwardState) -> Tensor:
        """Logits [vocabulary] of the last token, always computed from one row."""
        final = state.final_norm[-1]
        assert final is not None
        row = final if final.shape[1] == 1 else final[:, -1:].clone()
        recording = state.recording
        if recording is not None and len(state.token_ids) == 1:
            return self.model.head(row, recording.token_ids, recording.positions)[0]
        last = state.start + len(state.token_ids) - 1
        return self.model.head(row, *self.model.inputs(state.token_ids[-1:], last))[0]

    def _recorded(self, state: ForwardState) -> Recording:
        """The layer calls of this forward, recorded again if they were dropped."""
        if state.recording is None:
            state.recording = self.model.record(*self.model.inputs(state.token_ids, state.start))
            if state.point >= 0 and len(state.token_ids) > 1:
                state.recording.forget_embedding()
        return state.recording


class _Inner:
    """The points inside layers that are still to be visited on the way to `until`."""

    def __init__(self, begin: Point, until: Point, visits: Sequence[Point]) -> None:
        points = {point for point in (*visits, until) if is_inner(point) and begin < point <= until}
        self.waiting = sorted(points)
        self._next = 0

    def next(self, layer: int) -> Point | None:
        """The next of them if it lies inside `layer`, which is then taken for visited."""
        if self._next == len(self.waiting) or layer_of(self.waiting[self._next]) != layer:
            return None
        self._next += 1
        return self.waiting[self._next - 1]
