"""The strip of tokens: prompt and continuation, each with one number of a measure that is chosen.

Norms are kept by the server for every token; the lens and a difference are computed beside the
session, and only for the tokens that this forward feeds. A token without a number says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from djinn_nb.panels.pictures import Picture, version_of
from djinn_nb.stopped import Stopped
from kernel_server.protocol.errors import BadArgument
from kernel_server.protocol.snapshot import NodeBrief, Snapshot

#: measure -> what its numbers are, with the unit
MEASURES = {
    "norm": "L2 norm of the token's vector",
    "entropy": "entropy of the logit lens, nats",
    "probability": "probability of the lens' top token, 0 to 1",
    "difference": "L2 norm of the difference to another node",
}
#: Most tokens whose lens is read at once; the server bounds the places of one answer.
MOST_LENS = 4096


class TokensModel(Picture):
    """Tokens, and a number of each at one location.

    `shown` holds `tokens`, `ids`, `prompt` (how many are the prompt), `first` (the first token of
    this forward), `measure`, `unit`, `location`, `values` (float32 `[tokens]`, NaN without one),
    `missing` (why there is none), `measures` (name, what it is, why it cannot be chosen now),
    `others` (nodes to differ from: number and words) and `other` (the one chosen).
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._measure = "norm"
        self._other: int | None = None
        #: norms of all tokens at the stop that was read last: version, `[rows, tokens]`
        self._norms: tuple[Any, npt.NDArray[np.float32]] | None = None

    # -- what is wished -------------------------------------------------------------------

    def wish_of(self, snapshot: Snapshot) -> tuple[Any, ...]:
        others = tuple(number for number, _ in others_of(snapshot.branches))
        return (snapshot.selection.layer, self._measure, self._other, others)

    def heard(self, message: Mapping[str, Any]) -> None:
        """`measure`: colour by another one, of the difference to another node."""
        if message.get("type") != "measure":
            super().heard(message)
        name, other = message.get("name"), message.get("other")
        if name not in MEASURES:
            raise BadArgument(f"a measure is {', '.join(MEASURES)}, not {name!r}")
        if other is not None and type(other) is not int:
            raise BadArgument(f"a node is a whole number, not {other!r}")
        with self._lock:
            self._measure, self._other = name, other if other is not None else self._other
        self.follow(self.bench.snapshot())

    # -- reading --------------------------------------------------------------------------

    def read(self, stop: Stopped, key: tuple[Any, ...]) -> dict[str, Any]:
        layer, measure, other, others = key[3:]
        session, snapshot = stop.session, self.bench.snapshot()
        client = session.client
        norms = self._norms_of(stop)
        first, end = stop.tokens[0].position, norms.shape[1]
        ids = list(session.newest.tokens[:end])
        reached = min(stop.layers_executed, client.model.num_layers)
        # a layer that this forward has not come to has no values of it yet
        row = reached if layer is None else min(layer + 1, reached)
        location = f"layers.{row - 1}.output" if row else "embedding"
        other = other if other in others else (others[-1] if others else None)
        lacks = {} if others else {"difference": NO_OTHER}
        measure = "norm" if measure in lacks else measure
        values, missing = self._values(stop, measure, row, location, other, norms, first)
        words = dict(others_of(snapshot.branches))
        return {
            "tokens": client.token_texts(ids),
            "ids": ids,
            "prompt": session.newest.num_prompt_tokens,
            "first": first,
            "location": location,
            "measure": measure,
            "unit": MEASURES[measure],
            "values": values.astype(np.float32).tobytes(),
            "missing": missing,
            "measures": [[name, text, lacks.get(name, "")] for name, text in MEASURES.items()],
            "others": [[number, words.get(number, str(number))] for number in others],
            "other": other,
        }

    def _norms_of(self, stop: Stopped) -> npt.NDArray[np.float32]:
        version = version_of(stop)
        kept = self._norms
        if kept is None or kept[0] != version:
            found = stop.capture(span="session").norm.to_numpy(np.float32)
            kept = self._norms = (version, found)
        return kept[1]

    def _values(
        self,
        stop: Stopped,
        measure: str,
        row: int,
        location: str,
        other: int | None,
        norms: npt.NDArray[np.float32],
        first: int,
    ) -> tuple[npt.NDArray[np.float32], str]:
        """A number per token, NaN without one, and why those have none."""
        end = norms.shape[1]
        if measure == "norm":
            return norms[row], "no norm was kept"
        values = np.full(end, np.nan, np.float32)
        if measure == "difference":
            found = stop.session.diff(other, lens=False)
            table = found.difference
            here = [position for position in table.columns if position < end]
            values[here] = table.loc[location, here].to_numpy(np.float32)
            return values, "of the common past, or not computed on both sides"
        begin = max(first, end - MOST_LENS)
        table = stop.session.lens(location, tokens=slice(begin, end), top_k=1)
        column = "entropy_nats" if measure == "entropy" else "probability"
        values[table.position.to_numpy()] = table[column].to_numpy(np.float32)
        return values, "of an earlier forward: the lens reads the tokens of this one"

    # -- its values -----------------------------------------------------------------------

    def values(self) -> npt.NDArray[np.float32]:
        """The numbers `[tokens]`, NaN without one; of a picture that is ready."""
        return np.frombuffer(self.shown["values"], np.float32)


#: why the difference cannot be chosen
NO_OTHER = "there is no other node yet: go on or step, and come back"


def others_of(nodes: tuple[NodeBrief, ...]) -> list[tuple[int, str]]:
    """Nodes that the current one can be compared with: number, and in words."""
    return [
        (node.number, f"node {node.number}: {node.location}, forward {node.forward}")
        for node in nodes
        if not node.current and node.location is not None and node.status == "stopped"
    ]
