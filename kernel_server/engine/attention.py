"""Attention over the pages: the function registered with transformers, and what it computes.

The stock layers call it with rotated queries, keys and values; it writes keys and values to the
session's pages, gathers what the tokens may see and attends. Every shape follows from the positions
alone. Where stock transformers would use its eager arithmetic (soft caps, sinks), the family's own
eager function is called. Which pages belong to the session is told by whoever sets the work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from kernel_server.engine.kv_cache import KVCache, LayerKV, Room
from kernel_server.engine.pattern import (
    added_mask,
    attention_weights,
    eager_function,
    spread,
    weigh,
    window_of,
)
from kernel_server.models.sites import Visit
from kernel_server.protocol.errors import ServerFault, UnsupportedModel

#: Keyword arguments that change nothing about causal attention, or are honoured below.
_KNOWN = frozenset(
    {
        "scaling",
        "sliding_window",
        "softcap",
        "s_aux",
        "dropout",
        "is_causal",
        "position_ids",
        "position_embeddings",
        "cache_position",
        "past_key_values",
        "past_key_value",
        "layer_past",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "head_mask",
        "layer_head_mask",
        "num_items_in_batch",
        "deterministic",
        "target_dtype",
        "logits_to_keep",
    }
)
#: Head sizes up to which stock transformers lets SDPA share key heads between query heads.
_MAX_SHARED_HEAD_DIM = 256


class Work(Protocol):
    """What the attention calls of a stretch of layers are for."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Any
    ) -> Tensor:
        """Attention output, [1, tokens, heads, head_dim]."""


_WORK: ContextVar[Work | None] = ContextVar("djinn_attention_work", default=None)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    work = _WORK.get()
    if work is None:
        raise ServerFault(
            "a model whose attention reads Djinn's pages was called outside the engine: use"
            " ResumableModel.stock() for plain forwards"
        )
    return work.attend(module, query, key, value, attention_mask, options), None


class PagedAttentionRoute:
    """Registers the attention function; the route a `ResumableModel` is built on."""

    name = implementation = "djinn_pages"
    title = "function"

    def __init__(self) -> None:
        # No mask function is registered under this name, so transformers builds no mask.
        AttentionInterface.register(self.name, _attention)
        # Measured on an H200 (torch 2.11, cuDNN 9.19): decoding through cuDNN's SDPA gives other
        # bits from call to call. Flash and the memory-efficient kernels repeat theirs.
        torch.backends.cuda.enable_cudnn_sdp(False)

    def cache(self, num_layers: int) -> None:
        """Nothing: the function alone sees keys and values."""

    def work(
        self,
        cache: KVCache,
        tables: Sequence[Sequence[int]],
        *,
        total: int,
        eager: bool,
        window: int | None,
    ) -> PagedWork:
        """The attention of one forward over the pages of `tables`."""
        return PagedWork(cache, tables, eager, window, total)

    @contextlib.contextmanager
    def calibration(self, model_name: str, eager: bool) -> Iterator[Calibration]:
        """Plain causal attention of whole prompts, noting what every layer asks for."""
        work = Calibration(model_name, eager)
        with working(work):
            yield work


@contextlib.contextmanager
def working(work: Work) -> Iterator[None]:
    """Let the attention calls of this thread serve `work`."""
    token = _WORK.set(work)
    try:
        yield
    finally:
        _WORK.reset(token)


def offer_kept(visit: Visit, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [1, heads, tokens, dim] as the visit leaves them."""
    if visit.injected and key.data_ptr() == value.data_ptr():
        value = value.clone()  # one tensor for both: an edit of the keys is not one of the values
    return visit.heads("attention.k", key), visit.heads("attention.v", value)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    mask: Tensor | None,
    eager: bool,
    options: dict[str, Any],
) -> Tensor:
    """Attention of `query` [1, heads, tokens, dim] over `key` and `value` [1, kv_heads, keys, dim].

    causal: square causal attention, without a mask. mask: [tokens, keys], True where visible.
    Returns [1, tokens, heads, value_dim], contiguous.
    """
    if eager:
        return _eager(module, query, key, value, causal, mask, options)
    groups = query.shape[1] // key.shape[1]
    share = False
    if groups > 1:
        if mask is None and key.shape[-1] == value.shape[-1] <= _MAX_SHARED_HEAD_DIM:
            share = True
        else:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        scale=options.get("scaling"),
        enable_gqa=share,
    )
    return output.transpose(1, 2).contiguous()


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    function = eager_function(module)
    assert function is not None
    if causal:
        tokens = query.shape[2]
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    added = added_mask(mask, query.dtype)
    output: Tensor = function(module, query, key, value, added, **options)[0]
    return output.contiguous()


def visible_mask(
    begin: int, end: int, first: int, window: int | None, device: torch.device
) -> Tensor:
    """`[end - begin, end - first]`: which of the keys first … end - 1 each query may see."""
    queries = torch.arange(begin, end, device=device)[:, None]
    keys = torch.arange(first, end, device=device)[None]
    mask = keys <= queries
    if window is not None:
        mask &= queries - keys < window
    return mask


class PagedWork:
    """The attention of one session's forward, layer by layer and chunk by chunk.

    tables: page ids of the session by group. Set `layer` with `enter` before each layer call.
    window: replaces every sliding window the model asks for (used by the load check alone).
    width: positions up to the end of the forward, the keys of an attention pattern.
    visit: what the next layer call offers its values to, None for nothing.
    """

    def __init__(
        self,
        cache: KVCache,
        tables: Sequence[Sequence[int]],
        eager: bool,
        window: int | None = None,
        width: int = 0,
    ) -> None:
        self.cache = cache
        self.tables = tables
        self.eager = eager
        self.window = window
        self.visit: Visit | None = None
        self.width = width
        self._group_layers = cache.shape.group_layers
        self._layer = self._group = self._place = 0
        self._begin = self._end = 0
        self._calls = 0
        self._slots: dict[tuple[int, int], list[Tensor]] = {}
        self._rows: dict[tuple[int, int, int], list[Tensor]] = {}
        self._rooms: dict[tuple[int, int, LayerKV], Room] = {}
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def serving(self) -> contextlib.AbstractContextManager[None]:
        """Let the attention calls of this thread serve this work."""
        return working(self)

    def enter(self, layer: int, begin: int, end: int) -> None:
        """The next attention call is of this layer, for the positions [begin, end)."""
        self._layer = layer
        self._group, self._place = divmod(layer, self._group_layers)
        self._begin, self._end = begin, end
        self._calls = 0

    def begin_again(self) -> None:
        """The layer that was entered is called once more, from its beginning."""
        self._calls = 0

    def leave(self, *, ended: bool = False) -> None:
        """Raise ServerFault unless the layer called attention exactly once.

        ended: the layer did not run to its end, so it may not have come to its attention.
        """
        if self._calls != 1 and not ended:
            raise ServerFault(
                f"layer {self._layer} called attention {self._calls} times, the load check saw one"
            )

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Any
    ) -> Tensor:
        self._calls += 1
        begin, end = self._begin, self._end
        if mask is not None or self._calls > 1 or query.shape[2] != end - begin:
            raise ServerFault(
                f"layer {self._layer} called attention in a way the load check did not see"
                f" (call {self._calls}, {query.shape[2]} of {end - begin} tokens,"
                f" mask {mask is not None})"
            )
        visit = self.visit
        if visit is not None:
            query = visit.heads("attention.q", query)
            key, value = offer_kept(visit, key, value)
        self._write(key, value)
        window = options.get("sliding_window")
        if window is not None and self.window is not None:
            window = self.window
        first = 0 if window is None else max(0, begin - window + 1)
        causal, visible = False, None
        if end - begin > 1:
            causal = begin == 0 and (window is None or end <= window)
            if not causal:
                visible = self._mask(first, window)
        if begin > 0:
            # one token's are used up before the next layer's come; a visit's may be kept
            key, value = self._read(first, end, again=visit is None and end - begin == 1)
        if visit is None:
            return attend(module, query, key, value, causal, visible, self.eager, options)
        if causal:
            visible = self._mask(0, None)
        output = None
        if visit.wants("attention.pattern", query.shape[1]):
            weights = attention_weights(module, query, key, value, visible, options)
            put = visit.at("attention.pattern", spread(weights, first, self.width))
            if put is not None:
                output = weigh(window_of(put, weights, first, visible), value)
        if output is None:
            visible = None if causal else visible
            output = attend(module, query, key, value, causal, visible, self.eager, options)
        return visit.heads("attention.heads", output.transpose(1, 2)).transpose(1, 2)

    def _write(self, key: Tensor, value: Tensor) -> None:
        begin, end, cache, piece = self._begin, self._end, self.cache, 2 * self._place
        slots = self._slots.get((self._group, begin))
        if slots is None:
            table = self.tables[self._group]
            if end - begin == 1:
                slots = cache.token_slots(table, begin)
            else:
                slots = cache.slot_rows(table, begin, end)
            self._slots[self._group, begin] = slots
        if end - begin == 1:
            cache.write_token(slots[piece : piece + 2], key, value)
        else:
            cache.write(slots[piece], key)
            cache.write(slots[piece + 1], value)

    def _read(self, first: int, end: int, *, again: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of the positions [first, end); `again`: in memory that the next layer's
        are read to as well."""
        size = self.cache.shape.page_tokens
        low, high = first // size, -(-end // size)
        rows = self._rows.get((self._group, low, high))
        if rows is None:
            rows = self.cache.layer_rows(self.tables[self._group][low:high])
            self._rows[self._group, low, high] = rows
        layer, base = self.cache.shape.layers[self._layer], low * size
        if not again:
            return self.cache.read(rows[self._place], first - base, end - base, layer)
        room = self._rooms.get((first, end, layer))
        if room is None:
            room = self.cache.room(high - low, first - base, end - base, layer)
            self._rooms[first, end, layer] = room
        self.cache.gather(room, rows[self._place])
        return room.key, room.value

    def _mask(self, first: int, window: int | None) -> Tensor:
        key = (self._begin, first, window)
        if key not in self._masks:
            self._masks[key] = visible_mask(
                self._begin, self._end, first, window, self.cache.device
            )
        return self._masks[key]


class Calibration:
    """Plain causal attention while a model is learnt; notes shapes and refuses what is unknown.

    layers: the keys and values of one token by layer, once each layer was called.
    windows: sliding window by layer, None without.
    sinks: layers whose attention weights may sum to less than one.
    needs_eager: whether a layer caps its scores or has sinks, which SDPA would leave out.
    """

    def __init__(self, model_name: str, eager: bool) -> None:
        self.model_name = model_name
        self.eager = eager
        self.needs_eager = False
        self.layers: dict[int, LayerKV] = {}
        self.windows: dict[int, int | None] = {}
        self.sinks: set[int] = set()
        self.visit: Visit | None = None
        self._layer = 0
        self._calls = 0

    def enter(self, layer: int) -> None:
        """The calls that follow belong to this layer."""
        self._layer = layer
        self._calls = 0

    def check(self, layer: int) -> None:
        """Raise UnsupportedModel unless the layer called attention exactly once."""
        if self._calls != 1:
            self._refuse(
                f"layer {layer} calls attention {self._calls} times instead of once (recurrent or"
                " linear layers, differential attention, or no attention interface)",
                "attention calls",
            )

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: Any
    ) -> Tensor:
        self._calls += 1
        layer = self._layer
        if mask is not None:
            self._refuse(f"layer {layer} makes an attention mask of its own", "attention mask")
        if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
            self._refuse(f"layer {layer} attends to later tokens (not causal)", "causal attention")
        for name, given in options.items():
            if given is None or given is False or name in _KNOWN:
                continue
            self._refuse(
                f"layer {layer} hands attention the argument {name!r}, which Djinn does not know",
                "attention arguments",
            )
        if options.get("dropout"):
            self._refuse(f"layer {layer} drops attention weights at random", "dropout")
        if options.get("softcap") is not None or options.get("s_aux") is not None:
            self.needs_eager = True
        if options.get("s_aux") is not None:
            self.sinks.add(layer)
        if (self.eager or self.needs_eager) and eager_function(module) is None:
            self._refuse(
                f"layer {layer} caps its scores, has sinks or cannot use SDPA, and its family has"
                " no eager attention function",
                "eager attention",
            )
        if not (
            query.shape[0] == key.shape[0] == value.shape[0] == 1
            and query.shape[2] == key.shape[2] == value.shape[2]
            and query.shape[1] % key.shape[1] == 0
        ):
            self._refuse(
                f"layer {layer} hands attention queries {list(query.shape)} and keys"
                f" {list(key.shape)}, not one per token",
                "keys and values",
            )
        self.layers[layer] = LayerKV(key.shape[1], key.shape[3], value.shape[1], value.shape[3])
        window = options.get("sliding_window")
        self.windows[layer] = None if window is None else int(window)
        tokens = query.shape[2]
        causal = tokens > 1
        eager = self.eager or self.needs_eager
        visit = self.visit
        if visit is None:
            return attend(module, query, key, value, causal, None, eager, options)
        query = visit.heads("attention.q", query)
        key, value = offer_kept(visit, key, value)
        visit.wants("attention.pattern", query.shape[1])
        output = attend(module, query, key, value, causal, None, eager, options)
        return visit.heads("attention.heads", output.transpose(1, 2)).transpose(1, 2)

    def _refuse(self, reason: str, feature: str) -> None:
        raise UnsupportedModel(
            f"{self.model_name}: {reason}; use another model, or run it with stock transformers",
            family=self.model_name,
            feature=feature,
        )
