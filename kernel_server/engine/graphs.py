"""Layers of a decode as CUDA graphs, cut at the attention: the same kernels without their launches.

A decode of one token is bound by the host, which begins some forty small kernels a layer; measured
on an H200, a layer of 13B takes 0.8 to 2 ms that way and 0.26 ms as a graph. So a layer is recorded
twice over: up to its call of attention, and from there to its end. The attention between the two
runs as always, since the pages and the number of keys differ from token to token. What is recorded
are the very kernels of the stock layer, in its order, on the same shapes: the bits are the same,
and whoever switches this on compares them (`loading`).

A graph ends by putting what it gives where the next layer's begins to read, outside of the memory
that graphs share: a layer that goes on at once from the one before finds its input there. What a
session is given is a copy of its own, and from anything but the very last of these the input is
copied in, since others have run the layer meanwhile.

A layer that is looked into, or that somebody has hooked, runs as always; so does one that cannot be
recorded. Which layers run, and when, is decided in `segments`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernel_server.engine.attention import PagedAttentionRoute, PagedWork, working
from kernel_server.models.recording import Call, leaves, map_leaves
from kernel_server.models.resumable import ResumableModel

log = logging.getLogger(__name__)

#: A layer is recorded when it has run so often: by then its libraries have chosen their kernels.
_WARM_CALLS = 2


class NotRecorded(Exception):
    """This layer cannot be recorded."""


@dataclass(slots=True)
class _Given:
    """Memory that graphs read an argument from, and the tensor that lies in it now.

    Arguments such as rotary angles are the layers' in common: one copy serves them all.
    """

    memory: Tensor
    holds: Tensor

    def take(self, value: Tensor) -> None:
        if self.holds is not value:
            self.memory.copy_(value)
            self.holds = value


@dataclass(slots=True)
class _Attention:
    """The call of attention that parts a layer's two graphs."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]
    #: what it gave, where the second graph reads it
    output: Tensor


@dataclass(slots=True)
class _Recorded:
    """One layer: its graphs, what they read and what they give."""

    #: where it reads its input
    hidden: Tensor
    arguments: _Arguments
    before: torch.cuda.CUDAGraph
    attention: _Attention
    after: torch.cuda.CUDAGraph
    output: Tensor


@dataclass(slots=True)
class _Arguments:
    """What a layer is called with besides the residual stream, by path: tensors, and the rest."""

    given: dict[str, _Given]
    plain: dict[str, Any]
    #: whether the layer before reads the same from the same memory, and nothing that can change
    as_before: bool = False

    def compare(self, before: _Arguments | None, call: Call) -> None:
        """Note whether they are those of the layer before."""
        tops = (*call.rest, *call.keywords.values())
        self.as_before = (
            before is not None
            and not any(isinstance(value, (list, dict)) for value in tops)
            and self.given.keys() == before.given.keys()
            and all(one is before.given[path] for path, one in self.given.items())
            and self.plain.keys() == before.plain.keys()
            and all(value is before.plain[path] for path, value in self.plain.items())
        )

    def take(self, call: Call) -> bool:
        """Put a call's tensors where the graphs read them; False, and nothing is changed, if it is
        another kind of call than the one that was recorded."""
        found: list[tuple[_Given, Tensor]] = []
        plain = self.plain
        count = 0
        for path, value in leaves((call.rest, call.keywords)):
            count += 1
            if isinstance(value, Tensor):
                given = self.given.get(path)
                if given is None or value.shape != given.memory.shape:
                    return False
                found.append((given, value))
            elif path not in plain or not (plain[path] is value or plain[path] == value):
                return False
        if count != len(plain) + len(self.given):
            return False
        for given, value in found:
            given.take(value)
        return True


@dataclass(frozen=True, slots=True)
class _Last:
    """The layer that ran last, as a graph."""

    index: int
    call: Call
    output: Tensor


class LayerGraphs:
    """Runs layers of one model for forwards of one token.

    Raises NotRecorded for a model of which no layer can be recorded: not on a GPU, not by the
    attention function, or with experts, whose choice the host waits for.

        graphs = LayerGraphs(model)
        residual = graphs.call_layer(index, residual, call, work)
    """

    def __init__(self, model: ResumableModel) -> None:
        if model.device.type != "cuda":
            raise NotRecorded(f"the model is on {model.device}, not on a GPU")
        if not isinstance(model.route, PagedAttentionRoute):
            raise NotRecorded(f"its attention goes by the {model.route.title} route")
        if any(sites.router is not None for sites in model.sites):
            raise NotRecorded("it has experts, chosen token by token")
        self._model = model
        self._layers = list(model.layers)
        self._recorded: list[_Recorded | None] = [None] * model.num_layers
        #: where each layer reads its input; no graph has it for memory of its own
        self._inputs: list[Tensor] = []
        self._last: _Last | None = None
        self._calls = [0] * model.num_layers
        #: layers that cannot be recorded, and why
        self.refused: dict[int, str] = {}
        self._given: list[_Given] = []
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(model.device)

    @property
    def num_recorded(self) -> int:
        """Layers that run as graphs."""
        return sum(one is not None for one in self._recorded)

    def call_layer(self, index: int, hidden: Tensor, call: Call, work: PagedWork) -> Tensor:
        """The residual stream `[1, 1, hidden]` after the layer; `work` stands at it."""
        recorded, last = self._recorded[index], self._last
        self._last = None  # until this layer has run to its end
        if recorded is None:
            self._calls[index] += 1
            if self._calls[index] > _WARM_CALLS and self._may_record(index):
                return self._record(index, hidden, call, work)
        elif self._may_record(index) and self._take(recorded, index, hidden, call, last):
            recorded.before.replay()
            at = recorded.attention
            at.output.copy_(work.attend(at.module, at.query, at.key, at.value, None, at.options))
            recorded.after.replay()
            output = recorded.output.clone()
            self._last = _Last(index, call, output)
            return output
        return self._model.call_layer(index, hidden, call)

    def _take(
        self, recorded: _Recorded, index: int, hidden: Tensor, call: Call, last: _Last | None
    ) -> bool:
        """Have the layer's graphs find its input and arguments; False if it does not run as one."""
        if hidden.shape != recorded.hidden.shape:
            return False
        if last is not None and last.index != index - 1:
            last = None
        as_before = recorded.arguments.as_before and last and _same_objects(call, last.call)
        if not as_before and not recorded.arguments.take(call):
            return False
        if last is None or hidden is not last.output:
            # others have run the layer before meanwhile, or the value was edited
            recorded.hidden.copy_(hidden)
        return True

    def _may_record(self, index: int) -> bool:
        layer = self._layers[index]
        # a hook is to be called, and a replay calls nothing
        return not (layer._forward_hooks or layer._forward_pre_hooks or index in self.refused)

    # -- recording ----------------------------------------------------------------------------

    def _record(self, index: int, hidden: Tensor, call: Call, work: PagedWork) -> Tensor:
        """Record the layer while it runs this once."""
        stream, current = self._stream, torch.cuda.current_stream()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                recorded = self._record_on(index, hidden, call, work)
                output = recorded.output.clone()
        except Exception as error:  # whatever it was, the layer runs as always
            line = (str(error).splitlines() or [""])[0]
            self.refused[index] = f"{type(error).__name__}: {line}"
            log.info("layer %d runs without a graph: %s", index, self.refused[index])
            current.wait_stream(stream)
            work.begin_again()
            return self._model.call_layer(index, hidden, call)
        current.wait_stream(stream)
        output.record_stream(current)
        self._recorded[index] = recorded
        return output

    def _record_on(self, index: int, hidden: Tensor, call: Call, work: PagedWork) -> _Recorded:
        given: dict[str, _Given] = {}

        def place(path: str, value: Tensor) -> Tensor:
            given[path] = self._place(value)
            return given[path].memory

        rest, keywords = map_leaves(place, (call.rest, call.keywords))
        plain = {
            path: value
            for path, value in leaves((call.rest, call.keywords))
            if not isinstance(value, Tensor)
        }
        if not self._inputs:
            self._inputs = [torch.empty_like(hidden) for _ in self._layers]
        mine = self._inputs[index].copy_(hidden)
        following = self._inputs[index + 1] if index + 1 < len(self._inputs) else None
        cut = _Cut(work, self._pool)
        with cut.recording(), working(cut):
            output = self._model.call_layer(index, mine, Call(rest, keywords, call.by_name))
            if output.shape != hidden.shape or output.dtype != hidden.dtype:
                raise NotRecorded(f"it gives {list(output.shape)} for {list(hidden.shape)}")
            if following is not None:
                following.copy_(output)
        if cut.attention is None:
            raise NotRecorded("it did not come to its attention")
        cut.after.replay()
        arguments = _Arguments(given, plain)
        before = self._recorded[index - 1] if index else None
        arguments.compare(None if before is None else before.arguments, call)
        return _Recorded(mine, arguments, cut.before, cut.attention, cut.after, output)

    def _place(self, value: Tensor) -> _Given:
        """Memory that holds this argument; that of another layer, which was given the same."""
        for one in self._given:
            if one.holds is value:
                return one
        made = _Given(value.clone(), value)
        self._given.append(made)
        return made


class _Cut:
    """Serves the one attention call of a layer that is being recorded: there the first graph ends
    and runs, attention runs on what it gave, and the second graph begins."""

    def __init__(self, work: PagedWork, pool: Any) -> None:
        self._work = work
        self._pool = pool
        self._open: torch.cuda.CUDAGraph | None = None
        self.before, self.after = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.attention: _Attention | None = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        self._begin(self.before)
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):
                self._end()
            raise
        self._end()

    def _begin(self, graph: torch.cuda.CUDAGraph) -> None:
        # other threads go on copying pages, which is none of this graph's business
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._open = graph

    def _end(self) -> None:
        graph, self._open = self._open, None
        if graph is not None:
            graph.capture_end()

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Any
    ) -> Tensor:
        if self.attention is not None or mask is not None:
            raise NotRecorded("it calls attention more than once, or with a mask")
        self._end()
        self.before.replay()
        output = self._work.attend(module, query, key, value, None, options).clone()
        self.attention = _Attention(module, query, key, value, options, output)
        self._begin(self.after)
        return output


def _same_objects(call: Call, other: Call) -> bool:
    """Whether two calls are given the very same arguments."""
    ours, theirs = call.keywords, other.keywords
    return (
        len(call.rest) == len(other.rest)
        and len(ours) == len(theirs)
        and all(a is b for a, b in zip(call.rest, other.rest, strict=True))
        and all(theirs.get(name, theirs) is value for name, value in ours.items())
    )
