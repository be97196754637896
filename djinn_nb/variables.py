"""A tensor at a stop that stays on the server: summary first, elements when asked for, by slice.

`Variable` decides which rows and channels to ask for; the bytes are fetched by the client.
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
from kernel_server.protocol.errors import BadSelector, DjinnError

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

    @property
    def client(self) -> Client:
        return self.session.client

    @property
    def session_id(self) -> str:
        """Asked for at each use: raises UnknownSession once another server answers there."""
        return self.session.id


class Variable:
    """A tensor at a stop, `[tokens, hidden]`, or a part of one; its elements stay on the server.

    Indexing works as in numpy and fetches nothing: row `r` is the `r`-th token of this forward.
    A text selects the rows of that token. `numpy()` fetches, as float32, exactly.

    Raises StaleStop when the session has moved on since the stop.

        stop.hidden_states                      # a summary
        stop.hidden_states[-1].numpy()          # [hidden]
        stop.hidden_states[3:7, :64].numpy()    # [4, 64]
    """

    def __init__(
        self,
        source: Source,
        rows: _Indexes | None = None,
        channels: _Indexes | None = None,
        keep: tuple[bool, bool] = (True, True),
        size: tuple[int, int] | None = None,
        dtype: str | None = None,
    ) -> None:
        self._source = source
        self._rows = rows
        self._channels = channels
        self._keep = keep
        self._size = size
        self._dtype = dtype
        self._summary: Summary | None = None
        self._values: npt.NDArray[np.float32] | None = None
        self._version = source.client.mirror.values_version(source.session_id)

    # -- what it is -----------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, as numpy's would be."""
        rows, channels = self._selected()
        return tuple(n for n, kept in zip((rows, channels), self._keep, strict=True) if kept)

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
        """A part, by numpy's rules for rows and channels; a text selects the rows of that token."""
        keys = key if isinstance(key, tuple) else (key,)
        axes = [axis for axis in (0, 1) if self._keep[axis]]
        if Ellipsis in [k for k in keys if not isinstance(k, np.ndarray)]:
            at = next(i for i, k in enumerate(keys) if k is Ellipsis)
            keys = (*keys[:at], *[slice(None)] * (len(axes) - len(keys) + 1), *keys[at + 1 :])
        if len(keys) > len(axes):
            raise BadSelector(
                f"{len(keys)} indexes for a tensor of {len(axes)} dimensions {list(self.shape)}"
            )
        chosen = [self._rows, self._channels]
        keep = list(self._keep)
        total = self._full_size()
        for axis, one in zip(axes, keys, strict=False):
            indexes = chosen[axis]
            if indexes is None:
                indexes = np.arange(total[axis])
            if axis == 0 and isinstance(one, str):
                one = self._rows_of(one, indexes)
            chosen[axis], kept = _take(indexes, one, ("token", "channel")[axis])
            keep[axis] = kept
        return Variable(
            self._source, chosen[0], chosen[1], (keep[0], keep[1]), self._size, self._dtype
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
            rows, channels = self._selected()
            if rows and channels:
                label = f"{self._source.location} {list(self.shape)}"
                found = self._source.client.read_tensor(self._request("tensor"), label)
                values = found.astype(np.float32, copy=False)
                values = _in_order(values, self._rows, self._channels)
            else:
                values = np.zeros((rows, channels), np.float32)
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

    def _request(self, what: str) -> m.ReadValue:
        return m.ReadValue(
            session_id=self._source.session_id,
            seen=self._source.seen,
            what="summary" if what == "summary" else "tensor",
            tokens=_as_selector(self._rows, self._source.first_token),
            channels=_as_selector(self._channels, 0),
        )

    def _learn(self) -> None:
        """Size and dtype of the whole tensor, from its summary."""
        if self._rows is None and self._channels is None:
            summary = self.summary()
        else:
            whole = Variable(self._source)
            summary = whole.summary()
        self._size = (summary.shape[0], summary.shape[1])
        self._dtype = summary.dtype

    def _full_size(self) -> tuple[int, int]:
        if self._size is None:
            self._learn()
        assert self._size is not None
        return self._size

    def _selected(self) -> tuple[int, int]:
        rows, channels = self._rows, self._channels
        full = (0, 0) if rows is not None and channels is not None else self._full_size()
        return (
            full[0] if rows is None else len(rows),
            full[1] if channels is None else len(channels),
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
    """Indexes of rows or channels as the contract's selector, each once and in rising order."""
    if indexes is None:
        return m.ALL
    wanted = np.unique(indexes)
    start, count = int(wanted[0]) if len(wanted) else 0, len(wanted)
    if count > 1 and int(wanted[-1]) - start == count - 1:
        return m.Selector(kind="slice", start=first + start, stop=first + start + count)
    return m.Selector(kind="indices", indices=tuple(first + int(i) for i in wanted))


def _in_order(
    values: npt.NDArray[np.float32], rows: _Indexes | None, channels: _Indexes | None
) -> npt.NDArray[np.float32]:
    """`values`, which came in rising order, as the indexes asked for them, repeats included."""
    for axis, indexes in enumerate((rows, channels)):
        if indexes is not None:
            wanted, places = np.unique(indexes, return_inverse=True)
            if len(wanted) != len(indexes) or not np.array_equal(wanted, indexes):
                values = values.take(places, axis=axis)
    return values
