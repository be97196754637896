"""Activation: the vector of one token at one place, alone or against another.

Against another token, another layer, or another session that stands at a stop. Read on a scratch
fork of each; figures are computed here, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from djinn_nb.panels.pictures import Picture, layer_of
from djinn_nb.session import Session
from djinn_nb.stopped import Stopped
from kernel_server.protocol.errors import BadArgument
from kernel_server.protocol.snapshot import Snapshot

#: Bars of the histogram, channels in the table.
BINS, CHANNELS = 48, 12
AGAINST = ("nothing", "token", "layer", "session")


class ActivationModel(Picture):
    """One vector `[channels]`, and what it is compared with.

    `shown` holds `location`, `position`, `series` (one or two: `name`, float32 `values`, `norm`),
    `bins` (the edges and the counts of each), `channels` (numbers of the largest of the first, or
    of the most unlike), `cosine` and `distance` (None when alone, or where one is no number), and
    the choices `sites` and `tokens`. `site` is None for the place where the session stands.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        self.site: str | None = None
        self.against: tuple[str, Any] = ("nothing", None)
        super().__init__(*args, **more)

    def wish_of(self, snapshot: Snapshot) -> tuple[Any, ...]:
        chosen = snapshot.selection
        location = self._location(snapshot)
        head = chosen.head if ".attention." in location else None
        kind, value = self.against
        moved = None
        if kind == "session":  # its values are others once it has moved
            moved = next((s.stop_number for s in snapshot.sessions if s.id == value), None)
        return location, head, chosen.token, kind, value, moved

    def _location(self, snapshot: Snapshot) -> str:
        """Where the session stands; else the tensor chosen, of the layer chosen."""
        session, model = snapshot.session, snapshot.model
        assert session is not None and session.location is not None and model is not None
        if self.site is None and snapshot.selection.layer is None:
            return session.location
        site = self.site or site_at(session.location)
        known = site_names(model.sites)
        return f"layers.{layer_of(snapshot)}.{site if site in known else 'output'}"

    def marks_of(self, snapshot: Snapshot) -> dict[str, Any]:
        here = snapshot.session_id
        others = [s.id for s in snapshot.sessions if s.status == "stopped" and s.id != here]
        kind, value = self.against
        model = snapshot.model
        return super().marks_of(snapshot) | {
            "site": self.site or "",
            "sites": [] if model is None else list(site_names(model.sites)),
            "num_layers": 0 if model is None else model.num_layers,
            "sessions": others,
            "against": kind,
            "value": value,
        }

    def heard(self, message: Mapping[str, Any]) -> None:
        """`site`: which tensor of the layer, "" as at the stop. `against`: what to compare with."""
        snapshot = self.bench.snapshot()
        if message.get("type") == "site":
            site = message.get("value")
            known = () if snapshot.model is None else site_names(snapshot.model.sites)
            if site != "" and site not in known:
                raise BadArgument(f"there is no site {site!r}; known: {', '.join(known)}")
            self.site = str(site) or None
        elif message.get("type") == "against":
            kind, value = message.get("kind"), message.get("value")
            if kind not in AGAINST:
                raise BadArgument(f"an activation is compared with {', '.join(AGAINST)}")
            _require_other(snapshot, str(kind), value)
            self.against = (str(kind), value)
        else:
            super().heard(message)
        self.follow(snapshot)

    def read(self, stop: Stopped, key: tuple[Any, ...]) -> dict[str, Any]:
        location, head, token, kind, value, _ = key[3:]
        first, end = stop._stop.first_token, stop._stop.end_token
        position = end - 1 if token is None or location == "logits" else token
        if not first <= position < end:
            raise BadArgument(
                f"token {position} was fed in an earlier forward: this one has"
                f" {_span(first, end)}; choose one of these, or go back to a stop of forward 0"
            )
        series = [self._series(stop, stop.session, location, position, head)]
        if kind == "token":
            series.append(self._series(stop, stop.session, location, value, head))
        elif kind == "layer":
            place = f"layers.{value}.{site_at(location)}"
            series.append(self._series(stop, stop.session, place, position, head))
        elif kind == "session":
            other = self.bench.current.need_server().attach(value)
            name, row = self._series(stop, other, location, position, head)
            series.append((f"{name} in session {other.id}", row))
        return {
            "location": location,
            "position": position,
            "tokens": [[t.position, t.text] for t in stop.tokens],
            **figures(series),
        }

    def _series(
        self, stop: Stopped, session: Session, location: str, position: int, head: int | None
    ) -> tuple[str, npt.NDArray[np.float32]]:
        """A vector and its name. A place with heads gives that of one, or of all in a row."""
        found = session.capture(location, what="tensor", tokens=position)[location][0]
        part = ""
        if found.ndim == 2:
            whole = head is None or head >= len(found)  # of keys and values there may be fewer
            part = f", all {len(found)} heads" if whole else f", head {head}"
            found = found if whole else found[head]
        text = stop.session.client.token_texts([session.newest.tokens[position]])[0]
        name = f"{location}{part}, token {position}" + (f" {text!r}" if text else "")
        return name, found.reshape(-1)


def site_at(location: str) -> str:
    """`mlp.output` of `layers.3.mlp.output`; the output of a layer for places outside of one."""
    return location.split(".", 2)[2] if location.startswith("layers.") else "output"


def _require_other(snapshot: Snapshot, kind: str, value: object) -> None:
    """Raises BadArgument unless there is such a token, layer or session to compare with."""
    wanted = {"token": int, "layer": int, "session": str}.get(kind, type(None))
    if type(value) is not wanted:
        raise BadArgument(f"choose a {kind} to compare with, not {value!r}")
    if isinstance(value, int):
        session, model = snapshot.session, snapshot.model
        of = session.num_tokens if session and kind == "token" else model.num_layers if model else 0
        if not 0 <= value < of:
            raise BadArgument(f"there is no {kind} {value}: {kind}s go from 0 to {of - 1}")
    elif kind == "session" and value not in [one.id for one in snapshot.sessions]:
        raise BadArgument(f"there is no session {value!r} on the server")


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
    distance = float(np.linalg.norm(rows[0] - rows[1])) if pair else None
    size = np.abs(rows[0] - rows[1]) if pair else np.abs(rows[0])
    order = np.argsort(-np.nan_to_num(size, nan=np.inf), kind="stable")[:CHANNELS]
    return {
        "series": [
            {"name": name, "values": values.astype(np.float32).tobytes(), "norm": number(norm)}
            for (name, values), norm in zip(series, norms, strict=True)
        ],
        "bins": {
            "edges": edges.tolist(),
            "counts": [np.histogram(row[np.isfinite(row)], edges)[0].tolist() for row in rows],
        },
        "channels": [int(channel) for channel in order],
        "unlike": None if alike else f"{len(rows[0])} and {len(rows[1])} channels: not compared",
        "cosine": number(cosine),
        "distance": number(distance),
        "num_broken": int(sum((~np.isfinite(row)).sum() for row in rows)),
    }


def number(value: float | None) -> float | None:
    """What JSON can carry: None for NaN and infinities, of which `num_broken` tells."""
    return value if value is not None and np.isfinite(value) else None
