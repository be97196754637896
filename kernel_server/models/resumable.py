"""A stock decoder made resumable: its layers can be called one at a time, with the stock arguments.

The model's own forward is run with its layers replaced by *stubs* in a shallow view. The stubs
record what each layer is called with and either run the real layer in place (one pass) or leave it
to be called later with the recorded arguments (replay). Nothing of a family's layer loop, norm or
head is written again here. Which attention runs inside a layer is the attention route's business;
where a forward stops, and in what chunks it runs, is decided by the caller.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from kernel_server.mapped import to_device
from kernel_server.models.anatomy import (
    Anatomy,
    StandIn,
    configs_of,
    family,
    find_layers,
    text_config,
    twin_with_configs,
    view,
)
from kernel_server.models.learning import learn
from kernel_server.models.recording import Call, CallAxes, Recording, storages
from kernel_server.models.sites import AdditionsMode, LayerSites, SiteReached, Visit
from kernel_server.protocol.errors import BadArgument, DjinnError, UnsupportedModel

_WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
_FIXED_WORKSPACES = (":4096:8", ":16:8")

#: Runs one layer in place: (layer index, residual, its other arguments) -> residual after it,
#: or None to run no further layer in this pass.
Step = Callable[[int, Tensor, Call], Tensor | None]


class LayerObserver(Protocol):
    """What the attention route sees of the layers while the model is learnt.

    needs_eager: a layer asks for something that only the family's eager arithmetic has.
    visit: what the attention of the next layer call offers its values to, None for nothing.
    """

    needs_eager: bool
    visit: Visit | None

    def enter(self, layer: int) -> None:
        """The calls that follow belong to this layer."""

    def check(self, layer: int) -> None:
        """Raise UnsupportedModel unless the layer called attention exactly once, unmasked."""


class RouteCache(Protocol):
    """What a route gives the model as `past_key_values`."""

    def standing(self, start: int) -> contextlib.AbstractContextManager[None]:
        """The preamble that runs is of a forward after `start` computed tokens."""


class AttentionRoute(Protocol):
    """How attention reaches the pages.

    name: of the route, part of the execution fingerprint. title: for people.
    implementation: what transformers' attention implementation is set to.
    """

    name: str
    title: str
    implementation: str

    def cache(self, num_layers: int) -> RouteCache | None:
        """What every forward is given as `past_key_values`; None: nothing."""

    def calibration(
        self, model_name: str, eager: bool
    ) -> contextlib.AbstractContextManager[LayerObserver]:
        """Plain causal attention without pages, observing what every layer asks for."""

    def work(
        self,
        cache: Any,
        tables: Sequence[Sequence[int]],
        *,
        total: int,
        eager: bool,
        window: int | None,
    ) -> Any:
        """The attention of one forward over pages; `total` tokens are computed at its end."""


class _LastLayerReached(Exception):
    """Unwinds the model's forward once the last stub has recorded its arguments."""


class _Stubs(nn.ModuleList):
    """The stubs in the place of the layer list; a slice is a plain list, made cheaply."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return list(self._modules.values())[index]
        return super().__getitem__(index)


class _LayerStub(StandIn):
    """Stands in a layer's slot and asks the pass under way what to do."""

    def __init__(self, real: nn.Module, index: int, model: ResumableModel) -> None:
        super().__init__(real)
        self.__dict__["_index"] = index
        self.__dict__["_model"] = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        slots = self.__dict__
        return slots["_model"]._on_layer(slots["_index"], args, kwargs)


class _PreambleStub(StandIn):
    """Stands for a module called before layer 0: records its outputs, or plays them back."""

    def __init__(self, real: nn.Module, path: str, model: ResumableModel) -> None:
        super().__init__(real)
        self.__dict__["_path"] = path
        self.__dict__["_model"] = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        slots = self.__dict__
        pass_ = slots["_model"]._pass
        if pass_.played is not None:
            return next(pass_.played[slots["_path"]])
        output = slots["_real"][0](*args, **kwargs)
        if pass_.recording is not None:
            pass_.recording.preamble.setdefault(slots["_path"], []).append(output)
        return output


class _Spy(StandIn):
    """Passes a call on and reports it; used only while the model is learnt."""

    def __init__(self, real: nn.Module, path: str, seen: list[_Seen]) -> None:
        super().__init__(real)
        self.__dict__["_path"] = path
        self.__dict__["_seen"] = seen

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        entry = _Seen(self.__dict__["_path"], args, kwargs)
        self.__dict__["_seen"].append(entry)
        entry.output = self.real(*args, **kwargs)
        return entry.output


@dataclass(slots=True)
class _Seen:
    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


class _HeadStub(StandIn):
    """Stands for the base model and returns a given last hidden state."""

    def __init__(self, real: nn.Module, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__(real)
        self.__dict__["_wrap"] = wrap
        self.__dict__["state"] = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_wrap"](self.__dict__["state"])


@dataclass(slots=True)
class _Pass:
    """What the stubs do while one call of the model is under way; calls may nest."""

    recording: Recording | None = None
    step: Step | None = None
    final: Tensor | None = None
    played: dict[str, Iterator[Any]] | None = None
    #: what stub i returned, to be met again by stub i + 1 (only while the model is learnt)
    returned: Tensor | None = None


#: Stands in the learnt arguments of the base model for this forward's ids and positions.
_IDS, _POSITIONS = object(), object()


class ResumableModel:
    """A stock causal language model whose forwards can stop after any layer and go on.

    model: loaded, in eval mode, on its device; its module tree is not changed, its attention
    implementation is set to the route's.
    route: the way in which attention writes and reads pages.

    Raises UnsupportedModel, naming the feature, if the family cannot be run this way exactly.
    """

    def __init__(self, model: PreTrainedModel, route: AttentionRoute) -> None:
        self.model = model.eval()
        self.family = family(model)
        self.device = next(model.parameters()).device
        _require_fixed_workspaces(self.device)
        self.route = route
        self.config = text_config(model)
        self.anatomy: Anatomy = find_layers(model)
        self.layers = self.anatomy.layers
        self.num_layers = len(self.layers)
        self.dtype = model.dtype
        #: what stock transformers would run: "sdpa", or "eager" where it has no other way
        self.stock_attention = str(model.config._attn_implementation)
        self.eager = self.stock_attention == "eager"
        self._chosen_attention = {id(c): c._attn_implementation for c in configs_of(model)}
        self._stock_configs = _copies(configs_of(model))
        self._pass = _Pass()
        self._output_arity: list[int | None] = [None] * self.num_layers
        #: axes of tokens and of keys of the layer arguments, by layer
        self.axes: list[CallAxes] = []
        #: sites inside each layer, as learnt; the load check switches off what fails
        self.sites: list[LayerSites] = []
        #: bytes of a prompt's recorded arguments for each pair of a query and a key (masks)
        self.pair_bytes = 0.0
        #: where the model's own tensors are
        self.weights = frozenset(storages((*model.parameters(), *model.buffers())))
        #: likewise for each token: of the arguments, and of the embedding and what made it
        self.token_bytes = (0, 0)
        #: what forwards are given as `past_key_values`
        self.cache = route.cache(self.num_layers)
        self.observer: Any = None
        if getattr(model, "_is_stateful", False):
            self.refuse(
                "it keeps a recurrent state besides keys and values (state-space, linear attention"
                " or hybrid layers), which cannot be paged",
                "recurrent state",
                "use a model whose layers are all attention",
            )
        self._set_attention()
        try:
            with torch.no_grad(), route.calibration(self.family, self.eager) as observer:
                self.observer = observer
                self._learn_calls()
                if observer.needs_eager and not self.eager:
                    self._compare_with_eager()
                learn(self, observer)
        except torch.OutOfMemoryError:
            raise
        except DjinnError:
            self.release()
            raise
        except Exception as error:
            self.release()
            self.refuse(
                f"its layers could not be learnt: {type(error).__name__}: {_first_line(error)}",
                "layer calls",
            )

    # -- what the engine calls -----------------------------------------------------------------

    def inputs(self, token_ids: Sequence[int], start: int) -> tuple[Tensor, Tensor]:
        """Ids and positions as the model takes them, both [1, tokens] int64 on its device."""
        positions = torch.arange(start, start + len(token_ids), device=self.device)
        return to_device(token_ids, self.device)[None], positions[None]

    def record(self, ids: Tensor, positions: Tensor) -> Recording:
        """Run the preamble alone: the arguments of every layer call and the embedding."""
        recording, _ = self.forward(ids, positions, None)
        return recording

    def forward(
        self, ids: Tensor, positions: Tensor, step: Step | None
    ) -> tuple[Recording, Tensor | None]:
        """One pass: `step` runs the layers in place until it returns None or they are all done.

        Returns the recording (complete in either case) and the final norm, [1, tokens, hidden],
        None if the pass did not come to it.
        """
        recording = Recording(ids, positions)
        outer, self._pass = self._pass, _Pass(recording, step)
        final = None
        try:
            final = self.last_hidden_state(self._call_entry(ids, positions))
        except _LastLayerReached:
            pass
        finally:
            self._pass = outer
        return recording, final

    def call_layer(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        """Call the stock layer: residual [1, tokens, hidden] in, residual out."""
        layer = self.layers[index]
        if call.by_name:
            output = layer(hidden_states=hidden, **call.keywords)
        else:
            output = layer(hidden, *call.rest, **call.keywords)
        if output.__class__ is tuple:
            self._output_arity[index] = len(output)
            result: Tensor = output[0]
            return result
        return output

    def visit_layer(
        self,
        index: int,
        hidden: Tensor,
        call: Call,
        visit: Visit,
        sites: LayerSites | None = None,
    ) -> Tensor | None:
        """Call the stock layer for a visit of its sites; None if the visit ended inside.

        The attention work of this thread must offer its values to the same visit. sites: in the
        place of those learnt.
        """
        if not visit.follows_residual:
            try:
                return self.call_layer(index, hidden, call)
            except SiteReached:
                return None
        mode = AdditionsMode(sites or self.sites[index], visit, hidden)
        try:
            with mode:
                output = self.call_layer(index, hidden, call)
        except SiteReached:
            return None
        mode.finished(output, index)
        return output

    def norm(
        self, hidden: Tensor, ids: Tensor, positions: Tensor, recording: Recording | None = None
    ) -> Tensor:
        """The base model's end (final norm and what belongs to it) on [1, tokens, hidden].

        recording: of exactly these tokens, so that the preamble is played back, not computed.
        """
        played = None
        if recording is not None and recording.preamble:
            played = {path: iter(outputs) for path, outputs in recording.preamble.items()}
        outer, self._pass = self._pass, _Pass(final=hidden, played=played)
        try:
            return self.last_hidden_state(self._call_entry(ids, positions))
        finally:
            self._pass = outer

    def head(self, rows: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [tokens, vocabulary] from the final norm `rows`, [1, tokens, hidden]."""
        stub = self._head_stub.__dict__
        stub["state"] = rows
        try:
            output = self._head_view(**self._arguments(ids, positions, None))
        finally:
            stub["state"] = None
        logits: Tensor = output.logits[0]
        return logits

    def stock(self, change: Callable[[PretrainedConfig], None] | None = None) -> PreTrainedModel:
        """Stock transformers with these weights: the same modules, configurations of their own.

        change: applied to the copies of the configurations, for planted differences.
        """
        originals = configs_of(self.model)
        copies = _copies([self._stock_configs[id(config)] for config in originals])
        mapping = {}
        for config in originals:
            own = mapping[id(config)] = copies[id(self._stock_configs[id(config)])]
            if change is not None:
                change(own)
        twin = twin_with_configs(self.model, mapping)
        assert isinstance(twin, PreTrainedModel)
        return twin

    # -- the stubs' side -----------------------------------------------------------------------

    def _on_layer(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pass_ = self._pass
        if args:
            hidden, call = args[0], Call(args[1:], kwargs, False)
        else:
            hidden = kwargs.pop("hidden_states")
            call = Call((), kwargs, True)
        if pass_.recording is None:  # the end of a replay
            return self._wrap(index, pass_.final if index == self.num_layers - 1 else hidden)
        if index == 0:
            pass_.recording.embedding = hidden
        pass_.recording.calls.append(call)
        if pass_.step is not None:
            if pass_.returned is not None and pass_.returned is not hidden:
                self.refuse("it changes the residual stream between its layers", "layer loop")
            result = pass_.step(index, hidden, call)
            if result is not None:
                pass_.returned = result
                return self._wrap(index, result)
            pass_.step = None
        if index == self.num_layers - 1:
            raise _LastLayerReached
        return self._wrap(index, hidden)

    def _wrap(self, index: int, hidden: Any) -> Any:
        arity = self._output_arity[index]
        return hidden if arity is None else (hidden, *(None,) * (arity - 1))

    # -- learning ------------------------------------------------------------------------------

    def refuse(self, reason: str, feature: str, advice: str = "") -> NoReturn:
        """Raise UnsupportedModel with one line: family, reason, what to do."""
        advice = advice or "use another model, or run it with stock transformers"
        raise UnsupportedModel(
            f"{self.family}: {reason}; {advice}", family=self.family, feature=feature
        )

    def _set_attention(self) -> None:
        chosen = self.route.implementation
        if self.cache is None:
            self.model.set_attn_implementation(chosen)
        else:  # what transformers does not set in older families, they read as they run
            for config in configs_of(self.model):
                config._attn_implementation_internal = chosen
        left = [c for c in configs_of(self.model) if c._attn_implementation != chosen]
        if left:
            self.release()
            self.refuse(
                "its attention cannot be routed to Djinn's pages (it does not use transformers'"
                " attention interface)",
                "attention interface",
            )

    def _compare_with_eager(self) -> None:
        """Stock's SDPA leaves soft caps out in some versions: its eager attention is the model."""
        self.eager = True
        self.stock_attention = "eager"
        for config in self._stock_configs.values():
            config._attn_implementation_internal = "eager"

    def release(self) -> None:
        """Give the stock model back as it came, for another route to try."""
        for config in configs_of(self.model):
            config._attn_implementation_internal = self._chosen_attention[id(config)]

    def _learn_calls(self) -> None:
        """Find how the causal LM calls its base model, and which modules the preamble uses."""
        seen: list[_Seen] = []
        chain = self.anatomy.chain
        # Innermost first, so that each spy stands before a view that already holds the next.
        below: dict[str, nn.Module] = {}
        for path in reversed(chain):
            module = self.model.get_submodule(path)
            inner = {p.removeprefix(path + "."): m for p, m in below.items()}
            below = {path: _Spy(view(module, inner) if inner else module, path, seen)}
        ids, positions = self.inputs(self.sample_ids(4), 0)
        signature = inspect.signature(type(self.model).forward).parameters
        # With a cache the model counts on from its length, as it does for stock.
        self._takes_positions = self.cache is None
        if self._takes_positions and not (
            "position_ids" in signature
            or any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.values())
        ):
            self.refuse("its forward takes no position_ids", "positions")
        spied = view(self.model, below)
        self.observer.enter(0)  # the real layers run unmarked here: any slot will do
        try:
            with self._standing(positions):
                spied(**self._arguments(ids, positions, self.cache))
        except UnsupportedModel:
            raise
        except Exception as error:
            self.refuse(
                f"a plain forward raised {type(error).__name__}: {_first_line(error)}", "forward"
            )
        if not seen:
            self.refuse("its forward does not call its base model", "base model")
        entry = seen[0]
        self.entry_path = entry.path
        self._entry_args = tuple(self._placeholder(v, ids, positions) for v in entry.args)
        self._entry_kwargs = {
            name: self._placeholder(value, ids, positions) for name, value in entry.kwargs.items()
        }
        given = [*self._entry_args, *self._entry_kwargs.values()]
        placed = self.cache is not None or any(v is _POSITIONS for v in given)
        if not placed or not any(v is _IDS for v in given):
            self.refuse("it hands its base model no token ids or no positions", "positions")
        self._learn_output(entry.output)
        self._entry_view = self._make_entry_view({})
        self._head_stub = _HeadStub(
            self.model.get_submodule(self.entry_path), self.with_last_hidden_state
        )
        self._head_view = view(self.model, {self.entry_path: self._head_stub})

    def _arguments(self, ids: Tensor, positions: Tensor, cache: Any) -> dict[str, Any]:
        """The arguments of one call of the causal LM."""
        given: dict[str, Any] = {"input_ids": ids, "use_cache": cache is not None}
        if self._takes_positions:
            given["position_ids"] = positions
        if cache is not None:
            given["past_key_values"] = cache
        return given

    def _standing(self, positions: Tensor) -> contextlib.AbstractContextManager[None]:
        """What a cache must know while the preamble of a forward at these positions runs."""
        if self.cache is None:
            return contextlib.nullcontext()
        return self.cache.standing(int(positions[0, 0]))

    def _placeholder(self, value: Any, ids: Tensor, positions: Tensor) -> Any:
        if value is ids:
            return _IDS
        if value is positions:
            return _POSITIONS
        if isinstance(value, Tensor):
            self.refuse(
                "its causal LM computes inputs for its base model before calling it", "base model"
            )
        return value

    def _learn_output(self, output: Any) -> None:
        last = getattr(output, "last_hidden_state", None)
        if isinstance(last, Tensor):
            kind = type(output)
            #: what the base model returns around a last hidden state, and back
            self.with_last_hidden_state: Callable[[Tensor], Any] = lambda h: kind(
                last_hidden_state=h
            )
            self.last_hidden_state: Callable[[Any], Tensor] = lambda out: out.last_hidden_state
        elif isinstance(output, tuple) and isinstance(output[0], Tensor):
            rest = (None,) * (len(output) - 1)
            self.with_last_hidden_state = lambda h: (h, *rest)
            self.last_hidden_state = lambda out: out[0]
        else:
            self.refuse("its base model returns no last hidden state", "base model")

    def _make_entry_view(self, preamble: dict[str, nn.Module]) -> nn.Module:
        """A view of the base model with stubs for the layers and for `preamble` (by full path)."""
        prefix = self.entry_path + "."
        stubs = _Stubs(_LayerStub(layer, i, self) for i, layer in enumerate(self.layers))
        replacements: dict[str, nn.Module] = {self.anatomy.layers_path.removeprefix(prefix): stubs}
        replacements |= {path.removeprefix(prefix): stub for path, stub in preamble.items()}
        return view(self.model.get_submodule(self.entry_path), replacements)

    def replay_preamble(self, paths: Sequence[str]) -> None:
        """Record the outputs of these modules with every pass and play them back to the norm."""
        stubs: dict[str, nn.Module] = {
            path: _PreambleStub(self.model.get_submodule(path), path, self) for path in paths
        }
        self._entry_view = self._make_entry_view(stubs)

    def _call_entry(self, ids: Tensor, positions: Tensor) -> Any:
        def fill(value: Any) -> Any:
            return ids if value is _IDS else positions if value is _POSITIONS else value

        args = [fill(value) for value in self._entry_args]
        kwargs = {name: fill(value) for name, value in self._entry_kwargs.items()}
        if self.cache is None:
            return self._entry_view(*args, **kwargs)
        with self._standing(positions):
            return self._entry_view(*args, **kwargs)

    def sample_ids(self, count: int, seed: int = 0) -> list[int]:
        """Token ids for checks, spread over the vocabulary, avoiding the special ones at 0-2."""
        vocabulary = int(self.config.vocab_size)
        low = min(3, vocabulary - 1)
        return [low + (7919 * (i + 1) + 104729 * seed) % (vocabulary - low) for i in range(count)]


def _require_fixed_workspaces(device: torch.device) -> None:
    """Matrix products on a GPU are the same bits twice only with workspaces of a fixed size."""
    chosen = os.environ.get(_WORKSPACE_VARIABLE)
    if device.type == "cuda" and chosen not in _FIXED_WORKSPACES:
        raise BadArgument(
            f"{_WORKSPACE_VARIABLE} is {chosen!r}: with other values than"
            f" {' or '.join(_FIXED_WORKSPACES)} a GPU does not give the same bits twice; unset it"
        )


def _copies(configs: Sequence[PretrainedConfig]) -> dict[int, PretrainedConfig]:
    """Deep copies by the id of the original; configurations that share parts still share them."""
    memo: dict[int, Any] = {}
    copied = {}
    for config in configs:
        own = copied[id(config)] = copy.deepcopy(config, memo)
        # transformers drops the chosen implementation from some copies.
        own._attn_implementation_internal = config._attn_implementation
    return copied


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else "no message"
