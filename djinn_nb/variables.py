"""A tensor at a stop that stays on the server: summary first, elements when asked for, by slice.

`Variable` decides which rows, heads and channels to ask for; the bytes are fetched by the client.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from djinn_nb.selectors import plain_array
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import BadSelector, DjinnError, NotSupported

if TYPE_CHECKING:
    from djinn_nb.client import Client
    from djinn_nb.session import Session

_Indexes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of a tensor, and per token the L2 norm and the largest magnitude."""

    location: str
    dtype: str
    shape: tuple[int, ...]
    minimum: float
    maximum: float
    mean: float
    norm: float
    num_nan: int
    num_inf: int
    #: float32 [tokens]
    norm_per_token: npt.NDArray[np.float32]
    #: float32 [tokens]
    largest_per_token: npt.NDArray[np.float32]

    @classmethod
    def of(cls, reply: m.Summary) -> Summary:
        per_token = reply.per_token.numpy()
        return cls(
            location=reply.location,
            dtype=reply.dtype,
            shape=reply.shape,
            minimum=reply.minimum,
            maximum=reply.maximum,
            mean=reply.mean,
            norm=reply.norm,
            num_nan=reply.num_nan,
            num_inf=reply.num_inf,
            norm_per_token=per_token[:, 0].copy(),
            largest_per_token=per_token[:, 1].copy(),
        )

    def __repr__(self) -> str:
        broken = f" · {self.num_nan} NaN, {self.num_inf} infinite" * bool(
            self.num_nan or self.num_inf
        )
        return (
            f"{self.location} {list(self.shape)} {self.dtype} · min {self.minimum:.4g}"
            f" · max {self.maximum:.4g} · mean {self.mean:.4g} · norm {self.norm:.4g}{broken}"
        )


#: What the axes of a tensor are called, in messages: without heads, with heads, attention weights.
PLAIN, HEADED, WEIGHTS = (
    ("token", "channel"),
    ("token", "head", "channel"),
    ("token", "head", "key"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a variable's elements come from: one tensor at one stop."""

    session: Session
    #: number of the stop; the server refuses a stale one
    seen: int
    location: str
    #: absolute position of row 0
    first_token: int
    texts: Callable[[], Sequence[str]]
    axes: tuple[str, ...] = PLAIN

    @property
    def client(self) -> Client:
        return self.session.client

    @property
    def session_id(self) -> str:
        """Asked for at each use: raises UnknownSession once another server answers there."""
        return self.session.id


class Variable:
    """A tensor at a stop, or a part of one; its elements stay on the server.

    Its shape is `[tokens, hidden]`; at a site with heads `[tokens, heads, head_dim]`, of attention
    weights `[tokens, heads, keys]`. Indexing works as in numpy and fetches nothing: row `r` is the
    `r`-th token of this forward. A text selects the rows of that token. `numpy()` fetches, as
    float32, exactly.

    Raises StaleStop when the session has moved on since the stop.

        stop.value                              # a summary
        stop.value[-1].numpy()                  # [hidden]
        stop.value[3:7, 2].numpy()              # [4, head_dim] of head 2, at attention.heads
    """

    def __init__(
        self,
        source: Source,
        chosen: tuple[_Indexes | None, ...] | None = None,
        keep: tuple[bool, ...] | None = None,
        size: tuple[int, ...] | None = None,
        dtype: str | None = None,
    ) -> None:
        self._source = source
        #: per axis of the whole tensor: the indexes chosen (None: all), and whether it is kept
        self._chosen = chosen or (None,) * len(source.axes)
        self._keep = keep or (True,) * len(source.axes)
        self._size = size
        self._dtype = dtype
        self._summary: Summary | None = None
        self._values: npt.NDArray[np.float32] | None = None
        self._version = source.client.mirror.values_version(source.session_id)

    # -- what it is -----------------------------------------------------------------------

    @property
    def location(self) -> str:
        """Where it is, such as `layers.20.output`."""
        return self._source.location

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, as numpy's would be."""
        return tuple(n for n, kept in zip(self._selected(), self._keep, strict=True) if kept)

    @property
    def dtype(self) -> str:
        """The dtype it has in the model; `numpy()` gives float32, which holds it exactly."""
        if self._dtype is None:
            self._learn()
        assert self._dtype is not None
        return self._dtype

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a single number has no length")
        return self.shape[0]

    def __iter__(self) -> Iterator[Variable]:
        """Its parts along the first dimension; fetches nothing."""
        return (self[index] for index in range(len(self)))

    def summary(self) -> Summary:
        """Its figures, computed on the server; asked for once, and again after an edit."""
        self._forget_if_edited()
        if self._summary is None:
            reply = self._source.client.call(self._request("summary"), m.Summary)
            kept = zip(reply.shape, self._keep, strict=True)
            self._summary = replace(Summary.of(reply), shape=tuple(n for n, keep in kept if keep))
        return self._summary

    # -- parts ----------------------------------------------------------------------------

    def __getitem__(self, key: object) -> Variable:
        """A part, by numpy's rules along each axis; a text selects the rows of that token."""
        keys = key if isinstance(key, tuple) else (key,)
        axes = [axis for axis, kept in enumerate(self._keep) if kept]
        if Ellipsis in [k for k in keys if not isinstance(k, np.ndarray)]:
            at = next(i for i, k in enumerate(keys) if k is Ellipsis)
            keys = (*keys[:at], *[slice(None)] * (len(axes) - len(keys) + 1), *keys[at + 1 :])
        if len(keys) > len(axes):
            raise BadSelector(
                f"{len(keys)} indexes for a tensor of {len(axes)} dimensions {list(self.shape)}"
            )
        chosen, keep = list(self._chosen), list(self._keep)
        total = self._full_size()
        for axis, one in zip(axes, keys, strict=False):
            indexes = chosen[axis]
            if indexes is None:
                indexes = np.arange(total[axis])
            if axis == 0 and isinstance(one, str):
                one = self._rows_of(one, indexes)
            chosen[axis], keep[axis] = _take(indexes, one, self._source.axes[axis])
        return Variable(self._source, tuple(chosen), tuple(keep), self._size, self._dtype)

    def __setitem__(self, key: object, value: object) -> None:
        """Refused: the tensor is on the server, and changed by `stop.edit()`."""
        raise NotSupported(
            f"the tensor at {self.location} is on the server and is not assigned to:"
            " stop.edit(set=…, tokens=…, channels=…) changes it"
        )

    def _rows_of(self, text: str, rows: _Indexes) -> list[int]:
        texts = self._source.texts()
        found = [i for i, row in enumerate(rows) if texts[row] == text]
        if not found:
            raise BadSelector(f"no token of this forward has the text {text!r}")
        return found

    # -- its elements ---------------------------------------------------------------------

    def numpy(self) -> npt.NDArray[np.float32]:
        """Its elements as float32, fetched in chunks with progress; an interrupt cancels.

        The array is your own copy.
        """
        self._forget_if_edited()
        if self._values is None:
            selected = self._selected()
            if all(selected):
                label = f"{self._source.location} {list(self.shape)}"
                found = self._source.client.read_tensor(self._request("tensor"), label)
                values = _in_order(found.astype(np.float32, copy=False), self._chosen)
            else:
                values = np.zeros(selected, np.float32)
            self._values = values.reshape(self.shape)
        return self._values.copy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        values = self.numpy()
        return values if dtype is None else values.astype(dtype)

    def __float__(self) -> float:
        if math.prod(self.shape) != 1:
            raise TypeError(f"only a single number becomes a float, not {list(self.shape)}")
        return float(self.numpy().reshape(-1)[0])

    def __repr__(self) -> str:
        """The summary, fetched once; a tensor whose stop has passed says so."""
        try:
            return f"Variable {self.summary()!r}"
        except DjinnError as error:
            return f"Variable {self._source.location}: {error}"

    # -- asking ---------------------------------------------------------------------------

    @property
    def selectors(self) -> tuple[m.Selector, m.Selector, m.Selector]:
        """Its tokens, heads and channels as requests name them: each once, in rising order."""
        tokens, *heads, channels = self._chosen
        return (
            _as_selector(tokens, self._source.first_token),
            _as_selector(heads[0], 0) if heads else m.ALL,
            _as_selector(channels, 0),
        )

    def as_patch(self) -> m.PatchSource:
        """Where the server finds it, to take it as the value of an edit without it coming here.

        Raises BadSelector for parts in another order than the tensor's, or listed twice.
        """
        for axis, indexes in zip(self._source.axes, self._chosen, strict=True):
            if indexes is not None and (np.diff(indexes) <= 0).any():
                raise BadSelector(
                    f"a patch takes {axis}s in rising order and each once; for another order give"
                    " the values themselves: variable.numpy()"
                )
        tokens, heads, channels = self.selectors
        return m.PatchSource(
            session_id=self._source.session_id, seen=self._source.seen,
            tokens=tokens, heads=heads, channels=channels,
        )  # fmt: skip

    def _request(self, what: str) -> m.ReadValue:
        tokens, heads, channels = self.selectors
        return m.ReadValue(
            session_id=self._source.session_id,
            seen=self._source.seen,
            what="summary" if what == "summary" else "tensor",
            tokens=tokens,
            heads=heads,
            channels=channels,
        )

    def _learn(self) -> None:
        """Size and dtype of the whole tensor, from its summary."""
        entire = all(indexes is None for indexes in self._chosen)
        summary = self.summary() if entire else Variable(self._source).summary()
        self._size, self._dtype = summary.shape, summary.dtype

    def _full_size(self) -> tuple[int, ...]:
        if self._size is None:
            self._learn()
        assert self._size is not None
        return self._size

    def _selected(self) -> tuple[int, ...]:
        """How many of each axis of the whole tensor it has."""
        if all(indexes is not None for indexes in self._chosen):
            return tuple(len(indexes) for indexes in self._chosen if indexes is not None)
        return tuple(
            count if indexes is None else len(indexes)
            for count, indexes in zip(self._full_size(), self._chosen, strict=True)
        )

    def _forget_if_edited(self) -> None:
        version = self._source.client.mirror.values_version(self._source.session_id)
        if version != self._version:
            self._version = version
            self._summary = None
            self._values = None


def _take(indexes: _Indexes, key: object, axis: str) -> tuple[_Indexes, bool]:
    """The indexes that `key` selects, and whether the dimension stays."""
    key = plain_array(key)
    try:
        taken: Any = indexes[cast(Any, key)]
    except (IndexError, TypeError, ValueError) as error:
        if isinstance(error, IndexError) and isinstance(key, (int, np.integer)):
            raise BadSelector(
                f"{axis} {key} lies outside the {len(indexes)} {axis}s of this tensor"
            ) from None
        raise BadSelector(f"{str(key)[:60]!r} selects no {axis}s: {error}") from None
    if isinstance(taken, np.ndarray) and taken.ndim > 1:
        raise BadSelector(f"an index of shape {list(taken.shape)} adds dimensions; use a list")
    return np.atleast_1d(taken), isinstance(taken, np.ndarray) and taken.ndim == 1


def _as_selector(indexes: _Indexes | None, first: int) -> m.Selector:
    """Indexes along an axis as the contract's selector, each once and in rising order."""
    if indexes is None:
        return m.ALL
    wanted = np.unique(indexes)
    start, count = int(wanted[0]) if len(wanted) else 0, len(wanted)
    if count > 1 and int(wanted[-1]) - start == count - 1:
        return m.Selector(kind="slice", start=first + start, stop=first + start + count)
    return m.Selector(kind="indices", indices=tuple(first + int(i) for i in wanted))


def _in_order(
    values: npt.NDArray[np.float32], chosen: tuple[_Indexes | None, ...]
) -> npt.NDArray[np.float32]:
    """`values`, which came in rising order, as the indexes asked for them, repeats included."""
    for axis, indexes in enumerate(chosen):
        if indexes is not None:
            wanted, places = np.unique(indexes, return_inverse=True)
            if len(wanted) != len(indexes) or not np.array_equal(wanted, indexes):
                values = values.take(places, axis=axis)
    return values
