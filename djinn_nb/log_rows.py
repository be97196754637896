"""Records of a logpoint as rows of a table, and as arrays by location. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernel_server.protocol.messages import LogRecord

COLUMNS = (
    "forward", "location", "position", "token", "token_id", "norm", "largest", "num_nan",
)  # fmt: skip

#: the texts of token ids
Texts = Callable[[Sequence[int]], list[str]]
#: location, forward, positions and values `[tokens, channels]` of one record
Noted = tuple[str, int, Sequence[int], npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class LoggedTensor:
    """Rows noted at one location: values `[rows, channels]`, each with position and forward.

    An attention pattern has one key more in each forward; keys that were not there yet are 0.
    """

    values: npt.NDArray[Any]
    positions: npt.NDArray[np.int64]
    forwards: npt.NDArray[np.int64]

    def __repr__(self) -> str:
        rows, channels = self.values.shape
        return f"LoggedTensor [{rows} rows, {channels}], .values .positions .forwards"


def rows_of(records: Iterable[LogRecord], texts: Texts) -> Iterator[dict[str, Any]]:
    """One row per record and token, with the columns of `COLUMNS`."""
    for record in records:
        figures, num_nan = record.per_token.numpy(), record.num_nan.numpy()
        shown = texts(record.token_ids)
        for i, (position, token_id) in enumerate(
            zip(record.positions, record.token_ids, strict=True)
        ):
            yield {
                "forward": record.forward,
                "location": record.location,
                "position": position,
                "token": shown[i],
                "token_id": token_id,
                "norm": float(figures[i, 0]),
                "largest": float(figures[i, 1]),
                "num_nan": int(num_nan[i]),
            }


def noted(records: Iterable[LogRecord]) -> Iterator[Noted]:
    """The tensors of records that have one."""
    for record in records:
        if record.value is not None:
            yield record.location, record.forward, record.positions, record.value.numpy()


def tensors_of(found: Iterable[Noted]) -> dict[str, LoggedTensor]:
    """The rows noted at each location, in the order they came."""
    by_place: dict[str, list[Noted]] = {}
    for one in found:
        by_place.setdefault(one[0], []).append(one)
    return {place: _joined(parts) for place, parts in by_place.items()}


def _joined(parts: list[Noted]) -> LoggedTensor:
    width = max(values.shape[1] for *_, values in parts)
    positions = [np.asarray(where, np.int64) for _, _, where, _ in parts]
    forwards = [np.full(len(where), forward, np.int64) for _, forward, where, _ in parts]
    values = [np.pad(v, ((0, 0), (0, width - v.shape[1]))) for *_, v in parts]
    return LoggedTensor(np.concatenate(values), np.concatenate(positions), np.concatenate(forwards))
