"""The KV pages of all sessions: one allocation, written and read row by row. Tensors only.

A *page* holds the keys and values of T tokens for the G consecutive layers of one page group, in
one contiguous piece. Which page belongs to whom is decided elsewhere; here physical page ids are
taken as they come.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kernel_server.mapped import to_device

#: A model whose keys and values of one token have at most this many elements counts as small.
_SMALL_TOKEN_ELEMENTS = 12 * 1024
_SMALL_TOKENS, _SMALL_LAYERS = 16, 4
#: A plain copy of this many bytes runs at the full rate of the bus.
_TARGET_PAGE_BYTES = 4 << 20
_MAX_TOKENS = 128
_MAX_LAYERS = 10


@dataclass(frozen=True, slots=True)
class LayerKV:
    """What one layer keeps of one token: keys [key_heads, key_dim], values alike."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int

    @property
    def row(self) -> int:
        """Elements of the wider of the two."""
        return max(self.key_heads * self.key_dim, self.value_heads * self.value_dim)

    @property
    def alike(self) -> bool:
        """Whether keys and values have the same shape."""
        return (self.key_heads, self.key_dim) == (self.value_heads, self.value_dim)


@dataclass(frozen=True)
class PageShape:
    """The geometry of every page of a pool.

    page_tokens: T. group_layers: G; the last group may hold fewer. layers: as seen at load.
    row: elements kept per token, layer and kind (keys or values); narrower ones leave a margin.
    """

    page_tokens: int
    group_layers: int
    layers: tuple[LayerKV, ...]
    dtype: torch.dtype

    @cached_property
    def row(self) -> int:
        return max(layer.row for layer in self.layers)

    @property
    def num_groups(self) -> int:
        return -(-len(self.layers) // self.group_layers)

    @property
    def page_bytes(self) -> int:
        return 2 * self.group_layers * self.page_tokens * self.row * self.dtype.itemsize

    def pages_for(self, tokens: int) -> int:
        """Pages that one group needs for `tokens` tokens."""
        return -(-tokens // self.page_tokens)

    def groups_below(self, point: int) -> int:
        """Groups that the layers 0 … point - 1 write to."""
        return -(-min(max(point, 0), len(self.layers)) // self.group_layers)


def choose_page_shape(
    layers: Sequence[LayerKV],
    dtype: torch.dtype,
    *,
    page_tokens: int | None = None,
    group_layers: int | None = None,
) -> PageShape:
    """Pages of 4 MiB and a little more, at least four groups; T = 16 and G = 4 for small models.

    >>> choose_page_shape([LayerKV(40, 128, 40, 128)] * 40, torch.bfloat16).page_bytes / 2**20
    6.25
    """
    count, row = len(layers), max(layer.row for layer in layers)
    if 2 * row * count <= _SMALL_TOKEN_ELEMENTS:
        tokens, depth = _SMALL_TOKENS, min(_SMALL_LAYERS, count)
    else:
        most = max(1, min(_MAX_LAYERS, count // 4))
        depth = max(d for d in range(1, most + 1) if count % d == 0)
        tokens = _SMALL_TOKENS
        while tokens < _MAX_TOKENS and 2 * depth * row * dtype.itemsize * tokens < (
            _TARGET_PAGE_BYTES
        ):
            tokens *= 2
    return PageShape(page_tokens or tokens, group_layers or depth, tuple(layers), dtype)


class KVCache:
    """A pool of pages in one allocation, `[pages, group_layers, 2, page_tokens, row]`.

    Raises torch.OutOfMemoryError if the device has no room for it.
    """

    def __init__(self, shape: PageShape, num_pages: int, device: torch.device | str) -> None:
        self.shape = shape
        self.num_pages = num_pages
        self.device = torch.device(device)
        # Not zeroed: no slot is read before it is written, and a CPU commits only what is used.
        self.pool = torch.empty(
            (num_pages, shape.group_layers, 2, shape.page_tokens, shape.row),
            dtype=shape.dtype,
            device=self.device,
        )
        #: one row per token slot: written
        self._slots = self.pool.view(-1, shape.row)
        #: one row per (page, layer of the group, keys or values): gathered
        self._pieces = self.pool.view(num_pages * shape.group_layers * 2, -1)
        kinds = torch.arange(2 * shape.group_layers, device=self.device)
        self._kinds = kinds[:, None]
        self._page_stride = 2 * shape.group_layers
        #: whether no layer leaves a margin in its rows
        self._filled = all(layer.alike and layer.row == shape.row for layer in shape.layers)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.shape.page_bytes

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page onto another, all its layers."""
        self.pool[target].copy_(self.pool[source])

    def poison(self, pages: Iterable[int]) -> None:
        """Fill pages with NaN, so that reading one by mistake shows."""
        for page in pages:
            self.pool[page].fill_(float("nan"))

    # -- what attention uses -------------------------------------------------------------------

    def layer_rows(self, table: Sequence[int]) -> list[Tensor]:
        """Rows to gather for the pages of `table`, per layer of the group: `[2 * pages]`, those of
        the keys and then those of the values."""
        pages = to_device(table, self.device)
        rows = pages[None] * self._page_stride + self._kinds
        return list(rows.view(self.shape.group_layers, -1).unbind())

    def slot_rows(self, table: Sequence[int], begin: int, end: int) -> list[Tensor]:
        """Rows to write for the positions [begin, end): two index tensors per layer."""
        size = self.shape.page_tokens
        first = begin // size
        pages = to_device(table[first : self.shape.pages_for(end)], self.device)
        positions = torch.arange(begin, end, device=self.device)
        base = pages[positions // size - first] * (self._page_stride * size) + positions % size
        return list((base[None] + self._kinds * size).unbind())

    def token_slots(self, table: Sequence[int], position: int) -> list[Tensor]:
        """Where one position is written, `[row]`: two slots per layer of the group."""
        size = self.shape.page_tokens
        page = self.pool[table[position // size], :, :, position % size]
        return list(page.flatten(0, 1).unbind())

    def write_token(self, slots: list[Tensor], key: Tensor, value: Tensor) -> None:
        """Write one token's keys and values, each `[1, heads, 1, dim]`, to their two slots.

        In one call: a decode waits for the host at every layer.
        """
        states = [key.reshape(-1), value.reshape(-1)]
        if not self._filled:
            slots = [slot[: flat.shape[0]] for slot, flat in zip(slots, states, strict=True)]
        torch._foreach_copy_(slots, states)

    def write(self, rows: Tensor, states: Tensor) -> None:
        """Write the keys or values of several tokens, `[1, heads, tokens, dim]`."""
        flat = states[0].transpose(0, 1).flatten(1)  # [tokens, heads * dim]
        slots = self._slots
        if flat.shape[1] != self.shape.row:
            slots = slots[:, : flat.shape[1]]
        slots.index_copy_(0, rows, flat)

    def room(self, num_pages: int, begin: int, end: int, layer: LayerKV) -> Room:
        """Memory to gather the keys and values of so many pages in, of one layer after the other.

        begin, end: positions that are seen, counted from the first page's start.
        """
        pieces = self._pieces.new_empty(2 * num_pages, self._pieces.shape[1])
        return Room(pieces, *self._seen(pieces, begin, end, layer))

    def gather(self, room: Room, rows: Tensor) -> None:
        """Put the keys and values of these rows, one layer's, where `room` shows them."""
        torch.index_select(self._pieces, 0, rows, out=room.pieces)

    def read(self, rows: Tensor, begin: int, end: int, layer: LayerKV) -> tuple[Tensor, Tensor]:
        """Gather keys and values, each `[1, heads, end - begin, dim]`, counted from the first
        gathered page's start, in memory of their own."""
        return self._seen(self._pieces.index_select(0, rows), begin, end, layer)

    def _seen(self, pieces: Tensor, begin: int, end: int, layer: LayerKV) -> tuple[Tensor, Tensor]:
        if layer.alike and layer.row == self.shape.row:
            both = pieces.view(2, -1, layer.key_heads, layer.key_dim)
            key, value = both.narrow(1, begin, end - begin).transpose(1, 2).split(1)
            return key, value
        keys, values = pieces.view(2, -1, self.shape.row).narrow(1, begin, end - begin)
        return (
            _heads_of(keys, layer.key_heads, layer.key_dim),
            _heads_of(values, layer.value_heads, layer.value_dim),
        )


@dataclass(frozen=True, slots=True)
class Room:
    """Gathered rows `[2 * pages, …]`, and what they show: keys and values `[1, heads, keys, dim]`.

    Whoever gathers the next layer here writes over those of the last.
    """

    pieces: Tensor
    key: Tensor
    value: Tensor


def _heads_of(states: Tensor, heads: int, dim: int) -> Tensor:
    """`[1, heads, tokens, dim]` of rows `[tokens, row]`, which may leave a margin."""
    return states[:, : heads * dim].unflatten(1, (heads, dim)).transpose(0, 1)[None]
