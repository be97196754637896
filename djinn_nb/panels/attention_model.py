"""Attention: all heads of a layer as small maps, and one of them in full.

Weights of a window of tokens are read together and stay here; what travels is a small map of each
head, and the whole of the head that is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from djinn_nb.panels.pictures import Picture, layer_of, version_text
from djinn_nb.stopped import Stopped
from kernel_server.protocol.errors import BadArgument
from kernel_server.protocol.location import parse_location
from kernel_server.protocol.snapshot import Snapshot

#: Tokens whose rows are read together, and by how many the window moves; cells of a small map.
WINDOW, STEP, SMALL = 128, 64, 64


class AttentionModel(Picture):
    """Weights of one layer: `[tokens, heads, keys]` for a window of this forward's tokens.

    `shown` holds `layer`, `heads` (their numbers), `first` (of the window's tokens), `count`,
    `keys`, `tokens` (texts of all keys), `maps` (uint8 `[heads, rows, columns]`, the square root of
    the largest weight of each cell, 255 for 1), `shape` of one map, and `ahead`: the layer has not
    run in the session, and was run beside it. `marks` has `num_layers` and `of_layer` too, so that
    a layer without weights can be left.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.weights: npt.NDArray[np.float32] | None = None

    def wish_of(self, snapshot: Snapshot) -> tuple[Any, ...]:
        return layer_of(snapshot), self._window(snapshot)

    def marks_of(self, snapshot: Snapshot) -> dict[str, Any]:
        if self.stop_of(snapshot) is None or snapshot.model is None:
            return super().marks_of(snapshot) | {"num_layers": 0, "of_layer": None}
        more = {"num_layers": snapshot.model.num_layers, "of_layer": layer_of(snapshot)}
        return super().marks_of(snapshot) | more

    def _window(self, snapshot: Snapshot) -> int:
        """The first token of the window: one that holds the token chosen, or the last ones."""
        stop = self.stop_of(snapshot)
        if stop is None:  # another stop was bound meanwhile: its snapshot is on the way
            return 0
        first, end = stop._stop.first_token, stop._stop.end_token
        if end - first <= WINDOW:
            return first
        token = snapshot.selection.token
        token = end - 1 if token is None or not first <= token < end else token
        start = first + (token - first) // STEP * STEP - STEP // 2
        return max(first, min(start, end - WINDOW))

    def changed(self, key: tuple[Any, ...]) -> None:
        self.weights = None

    def read(self, stop: Stopped, key: tuple[Any, ...]) -> dict[str, Any]:
        layer, start = key[-2:]
        start = max(start, stop._stop.first_token)
        end = min(start + WINDOW, stop._stop.end_token)
        found = stop.attention(layer=layer, tokens=slice(start, end))
        maps = np.stack([small(found.weights[:, i]) for i in range(len(found.heads))])
        with self._lock:
            if key == self._key:
                self.weights = found.weights
        return {
            "layer": layer,
            "heads": found.heads,
            "first": found.positions[0],
            "count": len(found.positions),
            "keys": found.weights.shape[2],
            "tokens": stop.session.client.token_texts(
                stop.session.newest.tokens[: found.weights.shape[2]]
            ),
            "maps": np.round(255 * np.sqrt(np.nan_to_num(maps))).astype(np.uint8).tobytes(),
            "shape": list(maps.shape[1:]),
            "forward_first": stop._stop.first_token,
            "ahead": layer >= stop.layers_executed and not _is_inside(stop, layer),
            "stop": {"location": stop.location, "forward": stop.forward},
        }

    def heard(self, message: Mapping[str, Any]) -> None:
        """`need`: all weights of one head in the window."""
        if message.get("type") != "need":
            super().heard(message)
        with self._lock:
            if self._key is None or message.get("version") != version_text(self._key):
                return
            if self.weights is None or self.shown["state"] != "ready":
                return
            head, heads = message.get("head"), self.shown["heads"]
            if head not in heads:
                raise BadArgument(f"layer {self.shown['layer']} has no head {head!r}")
            weights = np.ascontiguousarray(self.weights[:, heads.index(head)])
            answer = {"type": "head", "head": head, "version": message["version"]}
            self.sent(answer, [weights.tobytes()])


def small(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """`[tokens, keys]` as a map of at most `SMALL` cells a side: the largest weight of each."""
    for axis in (0, 1):
        count = weights.shape[axis]
        if count > SMALL:
            edges = (np.arange(SMALL) * count) // SMALL
            weights = np.maximum.reduceat(weights, edges, axis=axis)
    return weights


def _is_inside(stop: Stopped, layer: int) -> bool:
    """Whether the session stands inside this layer, where its attention may have run."""
    place = parse_location(stop.location, stop.session.client.model.num_layers)
    return place.is_inner and place.layer == layer
