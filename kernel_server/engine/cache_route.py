"""The Cache route: for families whose attention does not go through transformers' interface.

The family's own eager attention runs; what it takes for a `Cache` writes the chunk's keys and
values to the session's pages and answers those of all tokens up to the chunk's end. The mask is
made by the model's own preamble for all tokens at once and cut to the chunk along its queries and
its keys: what a family sees is a prefill in chunks over a cache of its own, and every shape follows
from the positions alone. The mask is what bounds a prompt here. Which route a model takes is
decided in `loading`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NoReturn, Protocol

from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from kernel_server.engine.attention import PagedWork, offer_kept, working
from kernel_server.engine.kv_cache import KVCache, LayerKV
from kernel_server.models.sites import Visit
from kernel_server.protocol.errors import ServerFault, UnsupportedModel

#: What masks of a whole prompt may take on the device.
MASK_BYTES = 1 << 30


def longest_prompt(pair_bytes: float) -> int | None:
    """Tokens of the longest prompt whose masks fit into `MASK_BYTES`; None: no such bound.

    pair_bytes: of all masks together, for one query and one key.

    >>> longest_prompt(4.0)
    16384
    """
    return math.isqrt(int(MASK_BYTES / pair_bytes)) if pair_bytes else None


class CacheUser(Protocol):
    """What the cache's calls serve: the work of a forward, or the learning of a model."""

    #: what a layer that runs is told of the cache's length, None between layers
    keys_seen: int | None

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take a chunk's keys and values, `[1, heads, tokens, dim]`; give those to attend to."""


_USER: ContextVar[CacheUser | None] = ContextVar("djinn_cache_user", default=None)


class _Slot(CacheLayerMixin):
    """One layer of `PagedCache`, for code that asks a layer instead of the cache."""

    is_sliding = False

    def __init__(self, cache: PagedCache, index: int) -> None:
        super().__init__()
        self._cache, self._index = cache, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: pages are there already."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self._cache.update(key_states, value_states, self._index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.get_mask_sizes(query_length, self._index)

    def get_seq_length(self) -> int:
        return self._cache.get_seq_length(self._index)

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class PagedCache(Cache):
    """The `past_key_values` of every forward: it holds nothing, pages do.

    Its length is that before the forward in a preamble, and in a layer that before the chunk until
    its keys are taken, then that of the keys it was given.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[_Slot(self, index) for index in range(num_layers)])
        self._start = 0

    @contextlib.contextmanager
    def standing(self, start: int) -> Iterator[None]:
        """The preamble that runs is of a forward after `start` computed tokens."""
        before, self._start = self._start, start
        try:
            yield
        finally:
            self._start = before

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        user = _USER.get()
        if user is None:
            raise ServerFault(
                "a model whose cache is Djinn's pages was called outside the engine: use"
                " ResumableModel.stock() for plain forwards"
            )
        return user.update(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        user = _USER.get()
        if user is not None and user.keys_seen is not None:
            return user.keys_seen
        return self._start

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._start

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._start + query_length, 0


class CacheRoute:
    """Attention as the family computes it, over a `Cache` of Djinn's pages.

    implementation: `eager`, which never goes without a mask; `sdpa` where stock's eager attention
    is not what stock runs by default (Falcon with ALiBi adds its bias twice there).
    """

    title = "Cache"

    def __init__(self, implementation: str = "eager") -> None:
        self.implementation = implementation
        self.name = f"djinn_cache_{implementation}"

    def cache(self, num_layers: int) -> PagedCache:
        """What every forward is given as `past_key_values`."""
        return PagedCache(num_layers)

    def work(
        self,
        cache: KVCache,
        tables: Sequence[Sequence[int]],
        *,
        total: int,
        eager: bool,
        window: int | None,
    ) -> CacheWork:
        """The keys and values of one forward in the pages of `tables`.

        Sliding windows are in the mask: `window` is honoured by the configuration it is made from.
        """
        return CacheWork(cache, tables)

    @contextlib.contextmanager
    def calibration(self, model_name: str, eager: bool) -> Iterator[CacheCalibration]:
        """Whole prompts without pages, noting the keys and values of every layer."""
        user = CacheCalibration(model_name)
        with using(user):
            yield user


@contextlib.contextmanager
def using(user: CacheUser) -> Iterator[None]:
    """Let the cache calls of this thread serve `user`."""
    token = _USER.set(user)
    try:
        yield
    finally:
        _USER.reset(token)


class CacheWork(PagedWork):
    """Keys and values of one session's forward, layer by layer and chunk by chunk."""

    def __init__(self, cache: KVCache, tables: Sequence[Sequence[int]]) -> None:
        super().__init__(cache, tables, eager=True)
        self.keys_seen: int | None = None

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Let the attention and cache calls of this thread serve this work."""
        with working(self), using(self):
            yield

    def enter(self, layer: int, begin: int, end: int) -> None:
        super().enter(layer, begin, end)
        self.keys_seen = begin

    def leave(self, *, ended: bool = False) -> None:
        self.keys_seen = None
        super().leave(ended=ended)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self._calls += 1
        begin, end = self._begin, self._end
        if layer != self._layer or self._calls > 1 or key.shape[2] != end - begin:
            raise ServerFault(
                f"layer {self._layer} used its cache in a way the load check did not see (call"
                f" {self._calls}, of layer {layer}, {key.shape[2]} of {end - begin} tokens)"
            )
        self.keys_seen = end
        if self.visit is not None:
            key, value = offer_kept(self.visit, key, value)
        self._write(key, value)
        if begin > 0:
            key, value = self._read(0, end, again=False)
        return key, value

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Any
    ) -> Tensor:
        raise ServerFault(f"layer {self._layer} called the attention function on the Cache route")


class CacheCalibration:
    """The cache of whole prompts while a model is learnt; notes shapes, refuses what is unknown.

    layers: the keys and values of one token by layer, once each layer was called.
    windows: empty of numbers; on this route the masks know the windows.
    """

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.needs_eager = False
        self.visit: Visit | None = None
        self.keys_seen: int | None = None
        self.layers: dict[int, LayerKV] = {}
        self.windows: dict[int, int | None] = {}
        self._updated: list[int] = []

    def enter(self, layer: int) -> None:
        """The calls that follow belong to this layer."""
        self._updated = []

    def check(self, layer: int) -> None:
        """Raise UnsupportedModel unless the layer updated its own cache exactly once."""
        if self._updated != [layer]:
            self._refuse(
                f"layer {layer} updates the keys and values of layers {self._updated} instead of"
                f" {layer} alone (recurrent or linear layers, or ones that share them)",
                "cache updates",
            )

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self._updated.append(layer)
        if not (
            key.dim() == value.dim() == 4
            and key.shape[0] == value.shape[0] == 1
            and key.shape[2] == value.shape[2]
        ):
            self._refuse(
                f"layer {layer} hands its cache keys {list(key.shape)} and values"
                f" {list(value.shape)}, not [1, heads, tokens, channels]",
                "keys and values",
            )
        self.layers[layer] = LayerKV(key.shape[1], key.shape[3], value.shape[1], value.shape[3])
        self.windows[layer] = None
        return (key, value) if self.visit is None else offer_kept(self.visit, key, value)

    def _refuse(self, reason: str, feature: str) -> NoReturn:
        raise UnsupportedModel(
            f"{self.model_name}: {reason}; use another model, or run it with stock transformers",
            family=self.model_name,
            feature=feature,
        )
