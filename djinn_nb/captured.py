"""What `stop.capture()` and `session.capture()` give: figures of every layer, or chosen values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from djinn_nb import cards
from djinn_nb.checks import listed, shown
from djinn_nb.client import COMPUTE_S, Opened
from djinn_nb.selectors import selector
from djinn_nb.variables import Summary
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import BadArgument, UnknownLocation
from kernel_server.protocol.location import parse_location

if TYPE_CHECKING:
    import pandas as pd

    from djinn_nb.session import Session


@dataclass(frozen=True, slots=True)
class Capture:
    """What is kept of every layer in this forward, without asking for it.

    `norm` and `largest`: the L2 norm and the largest magnitude of each token's vector, one row per
    location (embedding and layers reached), one column per position. `num_nan`: NaNs per location.
    """

    norm: pd.DataFrame
    largest: pd.DataFrame
    num_nan: pd.Series

    @classmethod
    def of(cls, reply: m.CaptureReply) -> Capture:
        import pandas as pd

        positions = range(reply.first_token, reply.first_token + reply.norm.shape[1])
        index = pd.Index(reply.locations, name="location")
        columns = pd.Index(positions, name="position")
        return cls(
            norm=pd.DataFrame(reply.norm.numpy(), index=index, columns=columns),
            largest=pd.DataFrame(reply.largest.numpy(), index=index, columns=columns),
            num_nan=pd.Series(reply.num_nan.numpy(), index=index, name="NaN"),
        )

    def __repr__(self) -> str:
        rows, columns = self.norm.shape
        nans = int(self.num_nan.sum())
        return f"Capture of {rows} locations × {columns} tokens, {nans} NaN (.norm, .largest)"


class Captured(Mapping[str, Any]):
    """Values at locations of this forward, by location: a `Summary` each, or a numpy array.

    Arrays are float32 `[tokens, channels]`, `[tokens, heads, channels]` at a site with heads,
    `[1, vocabulary]` at logits. `positions`: of the tokens.

        found = session.capture([3, "layers.5.attention.heads"], what="tensor", tokens=-1)
        found["layers.5.attention.heads"].shape     # (1, heads, head_dim)
        found.frame()
    """

    def __init__(
        self,
        values: Mapping[str, Summary | npt.NDArray[np.float32]],
        positions: Sequence[int],
        forward: int,
        num_layers: int,
    ) -> None:
        self._values = dict(values)
        self.positions = list(positions)
        self.forward = forward
        self._num_layers = num_layers

    def __getitem__(self, location: int | str) -> Any:
        name = str(parse_location(location, self._num_layers))
        if name not in self._values:
            raise UnknownLocation(f"{name} was not captured: {', '.join(self._values)} were")
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __contains__(self, location: object) -> bool:
        try:
            return str(parse_location(location, self._num_layers)) in self._values
        except UnknownLocation:
            return False

    def __len__(self) -> int:
        return len(self._values)

    def frame(self) -> pd.DataFrame:
        """One row per location and token: position, L2 norm, largest magnitude of its vector."""
        import pandas as pd

        parts = []
        for location, value in self._values.items():
            if isinstance(value, Summary):
                norm, largest = value.norm_per_token, value.largest_per_token
            else:
                flat = value.reshape(len(value), -1)
                norm, largest = np.linalg.norm(flat, axis=1), np.abs(flat).max(axis=1)
            rows = {"location": location, "position": self.positions[-len(norm) :]}
            parts.append(pd.DataFrame({**rows, "norm": norm, "largest": largest}))
        return pd.concat(parts, ignore_index=True)

    def _rows(self) -> list[tuple[str, str, str]]:
        rows = []
        for location, value in self._values.items():
            norm = value.norm if isinstance(value, Summary) else float(np.linalg.norm(value))
            rows.append((location, str(list(value.shape)), f"{norm:.4g}"))
        return rows

    @property
    def _headline(self) -> str:
        count = len(self._values)
        return (
            f"{count} location{'s' * (count != 1)} of forward {self.forward},"
            " recomputed on a scratch fork"
        )

    def __repr__(self) -> str:
        rows = self._rows()
        wide = max(len(row[0]) for row in rows)
        lines = [f"  {name:<{wide}}  {shape} · norm {norm}" for name, shape, norm in rows]
        return "\n".join([self._headline, *lines])

    def _repr_html_(self) -> str:
        return cards.card(
            self._headline,
            cards.heading(self._headline),
            cards.table(("location", "shape", "norm"), self._rows()),
        )


def capture(
    session: Session, seen: int, locations: object, what: object, tokens: object
) -> Captured:
    """Ask for values at any locations of the forward that a session stands in."""
    if what not in ("summary", "tensor"):
        raise BadArgument(f"what is 'summary' or 'tensor', not {shown(what)}")
    client, num_layers = session.client, session.client.model.num_layers
    names = [str(parse_location(one, num_layers)) for one in listed(locations, "capture")]
    message = m.ReadSites(
        session_id=session.id,
        seen=seen,
        locations=tuple(names),
        what="summary" if what == "summary" else "tensor",
        tokens=selector(tokens),
    )
    values: dict[str, Summary | npt.NDArray[np.float32]] = {}
    with Opened(client) as opened:
        reply = client.call(message, m.SitesReply, timeout_s=COMPUTE_S, opens=opened)
        for one in reply.values:
            if one.summary is not None:
                values[one.location] = Summary.of(one.summary)
            elif one.tensor is not None:
                found = client.tensor(one.tensor, one.location)
                values[one.location] = found.astype(np.float32, copy=False)
    return Captured(values, reply.positions, session.newest.forward, num_layers)
