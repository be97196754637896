"""Layers × tokens: norms of everything, and the logit lens of what is looked at.

Norms of all tokens come once per stop. The lens is read tile by tile, as the window moves: each is
one pass of this forward beside the session. A tile that nobody looks at any more is not asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from djinn_nb.panels.pictures import Picture, version_text
from djinn_nb.stopped import Stopped
from kernel_server.protocol.errors import BadArgument

#: Tokens in a tile at most, and cells, which the server bounds; candidates per cell.
TILE_TOKENS, TILE_CELLS, CANDIDATES = 128, 4096, 3
#: Tiles kept of a stop.
MOST_TILES = 64


class LayersModel(Picture):
    """The grid: a row per location (the embedding, then each layer's output), a column per token.

    `shown` holds `rows`, `tokens`, `norm` (float32 `[rows, tokens]`, NaN where nothing has run),
    `first` (the first token of this forward: the lens reads from there on), `reached` (rows of this
    forward that have run), `stop` and `tile` (tokens in a tile of the lens).
    """

    verbs = ("toggle_breakpoint", "set_breakpoint", "run_to", "rewind")

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._tiles: dict[int, tuple[dict[str, Any], list[bytes]]] = {}

    def changed(self, key: tuple[Any, ...]) -> None:
        self._tiles = {}

    def read(self, stop: Stopped, key: tuple[Any, ...]) -> dict[str, Any]:
        found = stop.capture(span="session")
        norm = found.norm.to_numpy(np.float32)
        num_layers = stop.session.client.model.num_layers
        rows = ["embedding", *(f"layers.{i}.output" for i in range(num_layers))]
        whole: npt.NDArray[np.float32] = np.full((len(rows), norm.shape[1]), np.nan, np.float32)
        whole[: len(norm)] = norm
        first, end = stop.tokens[0].position, int(found.norm.columns[-1]) + 1
        ids = stop.session.newest.tokens[:end]
        reached = min(stop.layers_executed, num_layers) + 1
        return {
            "rows": rows,
            "tokens": stop.session.client.token_texts(ids),
            "norm": whole.tobytes(),
            "unit": "L2 norm",
            "first": first,
            "reached": reached,
            "stop": {
                "location": stop.location,
                "forward": stop.forward,
                "row": reached - 1,
                "reason": stop.reason,
            },
            "tile": max(1, min(TILE_TOKENS, TILE_CELLS // reached)),
        }

    # -- the lens, tile by tile -----------------------------------------------------------

    def heard(self, message: Mapping[str, Any]) -> None:
        """`need`: a tile of the lens, by its number within this forward."""
        if message.get("type") != "need":
            super().heard(message)
        with self._lock:
            key, index = self._key, message.get("tile")
            if key is None or message.get("version") != version_text(key):
                return  # asked of a stop that was left
            if self.shown["state"] != "ready":
                return
            count = len(self.shown["tokens"]) - self.shown["first"]
            if type(index) is not int or not 0 <= index * self.shown["tile"] < count:
                raise BadArgument(f"there is no tile {index!r} of {count} tokens")
            if index in self._tiles:
                self.sent(*self._tiles[index])
                return
            stop = self.stop_of(self.bench.snapshot())
            if stop is None:
                return
            shown = self.shown
            self.bench.ask(
                f"lens {id(self)}",
                lambda: self._lens(stop, shown, index),
                lambda found, error: self._lens_told(key, index, found, error),
            )

    def _lens(
        self, stop: Stopped, shown: Mapping[str, Any], index: int
    ) -> tuple[dict[str, Any], list[bytes]]:
        first = shown["first"] + index * shown["tile"]
        end = min(first + shown["tile"], len(shown["tokens"]))
        rows = shown["rows"][: shown["reached"]]
        table = stop.session.lens(rows, tokens=slice(first, end), top_k=CANDIDATES)
        ranks = int(table["rank"].max())
        message = {
            "type": "tile", "tile": index, "first": first, "count": end - first,
            "rows": len(rows), "ranks": ranks, "texts": table.text.tolist(),
        }  # fmt: skip
        shares = table.probability.to_numpy(np.float32)
        entropy = table.entropy_nats.to_numpy(np.float32)[::ranks]
        return message, [shares.tobytes(), entropy.tobytes()]

    def _lens_told(
        self,
        key: tuple[Any, ...],
        index: int,
        found: tuple[dict[str, Any], list[bytes]] | None,
        error: BaseException | None,
    ) -> None:
        with self._lock:
            if key != self._key:
                return
            version = version_text(key)
            if found is None:
                text = str(error)
                self.sent({"type": "no tile", "tile": index, "version": version, "text": text}, [])
                return
            found[0]["version"] = version
            while len(self._tiles) >= MOST_TILES:
                self._tiles.pop(next(iter(self._tiles)))
            self._tiles[index] = found
            self.sent(*found)

    # -- its values -----------------------------------------------------------------------

    def norms(self) -> npt.NDArray[np.float32]:
        """L2 norms `[rows, tokens]`, NaN where nothing has run; of a picture that is ready."""
        flat = np.frombuffer(self.shown["norm"], np.float32)
        return flat.reshape(len(self.shown["rows"]), -1)
