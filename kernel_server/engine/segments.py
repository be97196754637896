"""Runs one forward of one session from point to point, and can stop and go on at each.

Points, in order: 0 embedding, i + 1 the output of layer i, L + 1 final norm, L + 2 logits. A
forward of one chunk runs in a single pass of the model until it stops; then, and in chunks of a
long prompt, the recorded layer calls are replayed. Both make the same calls, so both give the same
bits. Whether to stop, and which pages belong to the session, is decided by the caller.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kernel_server.engine.attention import PagedWork
from kernel_server.engine.kv_cache import KVCache
from kernel_server.models.recording import Call, Recording, cut_call
from kernel_server.models.resumable import ResumableModel
from kernel_server.protocol.errors import BadArgument, ServerFault

#: The point of a forward of which nothing has been computed.
NOT_STARTED = -1


@dataclass(slots=True)
class ForwardState:
    """One forward of one session: all that is needed to go on, besides its pages.

    token_ids: the tokens fed. start: tokens of the session computed before them.
    bounds: chunks as half-open ranges of this forward's tokens.
    residual: the residual stream at `point`, one [1, tokens, hidden] per chunk; at the final norm
        and the logits still that of the last layer. final_norm: likewise, None where not computed.
    logits: [vocabulary], of the last token. recording: a cache; `drop_cache` forgets it.

    Tensors are never written to; whoever changes a value puts new ones in their place.
    """

    token_ids: tuple[int, ...]
    start: int
    bounds: tuple[tuple[int, int], ...]
    point: int = NOT_STARTED
    residual: list[Tensor] = field(default_factory=list)
    final_norm: list[Tensor | None] = field(default_factory=list)
    logits: Tensor | None = None
    recording: Recording | None = None

    def fork(self) -> ForwardState:
        """The same forward for another session; the tensors are shared."""
        return replace(self, residual=list(self.residual), final_norm=list(self.final_norm))

    def drop_cache(self) -> None:
        """Forget what can be computed again from ids and positions."""
        self.recording = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that cannot be computed again."""
        kept = [*self.residual, *self.final_norm, self.logits]
        return sum(tensor.nbytes for tensor in kept if tensor is not None)


#: Called when a point has been reached; may replace the value there; True stops the forward.
OnPoint = Callable[[int, ForwardState], bool]


class Segments:
    """Runs forwards of a `ResumableModel` over the pages of `cache`.

    prefill_chunk: tokens per chunk; chunks are cut at its multiples, counted from the session's
    first token.
    """

    def __init__(self, model: ResumableModel, cache: KVCache, *, prefill_chunk: int = 512) -> None:
        if prefill_chunk < 1:
            raise BadArgument(f"prefill_chunk is {prefill_chunk}: choose at least 1 token")
        self.model = model
        self.cache = cache
        self.prefill_chunk = prefill_chunk
        self.num_layers = model.num_layers
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
        until: int,
        tables: Sequence[Sequence[int]],
        on_point: OnPoint,
    ) -> int:
        """Run `state` up to point `until`, or to an earlier one where `on_point` says stop.

        tables: page ids by group, covering this forward's tokens in every group reached.
        Returns the point reached. If a layer raises, `state` stands at the last point reached.
        """
        if state.point >= until:
            return state.point
        work: PagedWork = self.model.route.work(
            self.cache,
            tables,
            total=state.start + len(state.token_ids),
            eager=self.model.eager,
            window=self.window,
        )
        with torch.inference_mode(), work.serving():
            if state.point == NOT_STARTED and len(state.bounds) == 1:
                running = self._one_pass(state, until, work, on_point)
            elif state.point == NOT_STARTED:
                running = self._embed(state, on_point)
            else:
                running = True
            while running and state.point < until:
                running = self._one_point(state, work, on_point)
        return state.point

    # -- values at a point ---------------------------------------------------------------------

    def value(self, state: ForwardState) -> list[Tensor]:
        """The tensor at the forward's point, chunk by chunk, each [1, tokens, width].

        At the logits: one [1, 1, vocabulary], of the last token. Final norms of earlier chunks of
        a long prompt are computed now.
        """
        if state.point < 0:
            raise ServerFault("the forward has not started, so it has no value yet")
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
        """Put other tensors in the place of `value(state)`; shapes and dtype must be the same."""
        before = self.value(state)
        if [(c.shape, c.dtype) for c in before] != [(c.shape, c.dtype) for c in chunks]:
            raise ServerFault(
                f"the value at point {state.point} has chunks {[list(c.shape) for c in before]},"
                f" not {[list(c.shape) for c in chunks]}"
            )
        if state.point <= self.num_layers:
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
        self, state: ForwardState, until: int, work: PagedWork, on_point: OnPoint
    ) -> bool:
        """Run a forward of one chunk inside one call of the model; False if it was stopped."""
        model, begin = self.model, state.start
        end = begin + len(state.token_ids)
        stopped = False

        def step(index: int, hidden: Tensor, call: Call) -> Tensor | None:
            nonlocal stopped
            if index == 0:
                state.residual = [hidden]
                state.point = 0
                stopped = on_point(0, state)
                if stopped or until == 0:
                    return None
            work.enter(index, begin, end)
            output = model.call_layer(index, state.residual[0], call)
            work.leave()
            state.residual = [output]
            state.point = index + 1
            stopped = on_point(index + 1, state)
            return None if stopped or until == index + 1 else state.residual[0]

        recording, final = model.forward(*model.inputs(state.token_ids, begin), step)
        state.recording = recording
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

    def _one_point(self, state: ForwardState, work: PagedWork, on_point: OnPoint) -> bool:
        """Go on by one point; False if the forward was stopped there."""
        point = state.point
        if point < self.num_layers:
            state.residual = self._layer(state, point, work)
        elif point == self.num_layers:
            last = len(state.bounds) - 1
            state.final_norm = [None] * last + [self._norm(state, last)]
        else:
            state.logits = self._head(state)
        state.point = point + 1
        return not on_point(state.point, state)

    def _layer(self, state: ForwardState, index: int, work: PagedWork) -> list[Tensor]:
        """Call layer `index` for every chunk in turn."""
        model, recording = self.model, self._recorded(state)
        outputs = []
        for (begin, end), hidden in zip(state.bounds, state.residual, strict=True):
            if len(state.bounds) == 1:
                call = recording.calls[index]
            else:
                call = cut_call(recording, index, model.axes[index], begin, end)
            work.enter(index, state.start + begin, state.start + end)
            outputs.append(model.call_layer(index, hidden, call))
            work.leave()
        return outputs

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
        last = state.start + len(state.token_ids) - 1
        return self.model.head(row, *self.model.inputs(state.token_ids[-1:], last))[0]

    def _recorded(self, state: ForwardState) -> Recording:
        """The layer calls of this forward, recorded again if they were dropped."""
        if state.recording is None:
            state.recording = self.model.record(*self.model.inputs(state.token_ids, state.start))
            if state.point >= 0 and len(state.bounds) > 1:
                state.recording.forget_embedding()
        return state.recording
