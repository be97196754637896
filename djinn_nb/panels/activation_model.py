"""Activation: the vector of one token at one place, alone or against another.

Against another token, another layer, or another session that stands at a stop. Read on a scratch
fork of each; figures are computed here, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from djinn_nb import sites
from djinn_nb.panels.pictures import Picture
from djinn_nb.stopped import Stopped
from kernel_server.protocol.errors import BadArgument
from kernel_server.protocol.snapshot import Snapshot

#: Bars of the histogram, channels in the table.
BINS, CHANNELS = 48, 12
AGAINST = ("nothing", "token", "layer", "session")


class ActivationModel(Picture):
    """One vector `[channels]`, and what it is compared with.

    `shown` holds `location`, `position`, `series` (one or two: `name`, float32 `values`, `norm`),
    `bins` (the edges and the counts of each), `channels` (the largest of the first, or the most
    unlike), `cosine` and `distance` (None when alone), and the choices `sites` and `sessions`.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        self.site = "output"
        self.against: tuple[str, Any] = ("nothing", None)
        super().__init__(*args, **more)

    def wish_of(self, snapshot: Snapshot) -> tuple[Any, ...]:
        chosen, model = snapshot.selection, snapshot.model
        assert model is not None
        head = chosen.head if self.site.startswith("attention.") else None
        kind, value = self.against
        moved = None
        if kind == "session":  # its values are others once it has moved
            moved = next((s.stop_number for s in snapshot.sessions if s.id == value), None)
        return self.site, chosen.layer, head, chosen.token, kind, value, moved

    def marks_of(self, snapshot: Snapshot) -> dict[str, Any]:
        here = snapshot.session_id
        others = [s.id for s in snapshot.sessions if s.status == "stopped" and s.id != here]
        kind, value = self.against
        more = {"sessions": others, "site": self.site, "against": kind, "value": value}
        return super().marks_of(snapshot) | more

    def heard(self, message: Mapping[str, Any]) -> None:
        """`site`: which tensor of the layer. `against`: with what it is compared."""
        if message.get("type") == "site":
            site = message.get("value")
            model = self.bench.snapshot().model
            known = () if model is None else site_names(model.sites)
            if site not in known:
                raise BadArgument(f"there is no site {site!r}; known: {', '.join(known)}")
            assert isinstance(site, str)
            self.site = site
        elif message.get("type") == "against":
            kind, value = message.get("kind"), message.get("value")
            if kind not in AGAINST:
                raise BadArgument(f"an activation is compared with {', '.join(AGAINST)}")
            wanted = {"token": int, "layer": int, "session": str}.get(str(kind), type(None))
            if type(value) is not wanted:
                raise BadArgument(f"choose a {kind} to compare with")
            assert isinstance(kind, str)
            self.against = (kind, value)
        else:
            super().heard(message)
        self.follow(self.bench.snapshot())

    def read(self, stop: Stopped, key: tuple[Any, ...]) -> dict[str, Any]:
        site, layer, head, token, kind, value, _ = key[3:]
        model = stop.session.client.model
        first, end = stop._stop.first_token, stop._stop.end_token
        position = end - 1 if token is None else token
        location = stop.location if layer is None else f"layers.{layer}.{site}"
        if location == "logits":
            position = end - 1
        other_location, other_position, other = location, position, stop.session
        if kind == "token":
            other_position = value
        elif kind == "layer":
            other_location = f"layers.{value}.{site}"
        elif kind == "session":
            assert stop.session.client is self.bench.current.need_server().client
            other = self.bench.current.need_server().attach(value)
        if not first <= position < end:
            raise BadArgument(
                f"token {position} was fed in an earlier forward: this one has"
                f" {_span(first, end)}; choose one of these, or go back to a stop of forward 0"
            )
        rows = {(location, position): self._row(stop.session, location, position, head)}
        name = self._name(stop, location, position, head)
        series = [(name, rows[location, position])]
        if kind == "session":
            there = self._row(other, other_location, other_position, head)
            series.append((f"{name} in session {other.id}", there))
        elif kind != "nothing":
            place = (other_location, other_position)
            if place not in rows:
                rows[place] = self._row(stop.session, *place, head)
            series.append((self._name(stop, *place, head), rows[place]))
        return {
            "location": location,
            "position": position,
            "sites": list(site_names(tuple(s.site for s in model.sites[0]) if model.sites else ())),
            "num_layers": model.num_layers,
            "tokens": [[t.position, t.text] for t in stop.tokens],
            **figures(series),
        }

    def _row(self, session: Any, location: str, position: int, head: int | None) -> Any:
        found = session.capture(location, what="tensor", tokens=position)[location][0]
        if found.ndim == 2 and head is not None and head < len(found):
            found = found[head]
        return found.reshape(-1)

    def _name(self, stop: Stopped, location: str, position: int, head: int | None) -> str:
        text = stop.session.client.token_texts([stop.session.newest.tokens[position]])[0]
        axes = sites.axes_at(stop.session.client.model, location)
        part = "" if head is None or "head" not in axes else f", head {head}"
        return f"{location}{part}, token {position}" + (f" {text!r}" if text else "")


def _span(first: int, end: int) -> str:
    return f"token {first} alone" if end - first == 1 else f"tokens {first} to {end - 1}"


def site_names(found: tuple[str, ...]) -> tuple[str, ...]:
    """Sites of a layer whose tensor is a vector per token."""
    return (*(name for name in found if name not in ("attention.pattern", "output")), "output")


def figures(series: list[tuple[str, npt.NDArray[np.float32]]]) -> dict[str, Any]:
    """What is drawn and said of one or two vectors; of unlike lengths only each alone.

    >>> figures([("a", np.float32([3, 4])), ("b", np.float32([4, -3]))])["cosine"]
    0.0
    """
    rows = [values.astype(np.float64) for _, values in series]
    alike = len({len(row) for row in rows}) == 1
    pair = len(rows) == 2 and alike
    finite = np.concatenate([row[np.isfinite(row)] for row in rows])
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    norms = [float(np.linalg.norm(row)) for row in rows]
    product = norms[0] * norms[-1]
    cosine = float(rows[0] @ rows[1] / product) if pair and product else None
    size = np.abs(rows[0] - rows[1]) if pair else np.abs(rows[0])
    order = np.argsort(-np.nan_to_num(size, nan=np.inf), kind="stable")[:CHANNELS]
    return {
        "series": [
            {"name": name, "values": values.astype(np.float32).tobytes(), "norm": norm}
            for (name, values), norm in zip(series, norms, strict=True)
        ],
        "bins": {
            "edges": edges.tolist(),
            "counts": [np.histogram(row[np.isfinite(row)], edges)[0].tolist() for row in rows],
        },
        "channels": [[int(c), *(float(row[c]) for row in (rows if pair else rows[:1]))]
                     for c in order],
        "unlike": None if alike else f"{len(rows[0])} and {len(rows[1])} channels: not compared",
        "cosine": cosine,
        "distance": float(np.linalg.norm(rows[0] - rows[1])) if pair else None,
        "num_broken": int(sum((~np.isfinite(row)).sum() for row in rows)),
    }  # fmt: skip
