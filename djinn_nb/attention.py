"""Attention weights of a layer, as `stop.attention()` gives them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from djinn_nb import cards
from djinn_nb.checks import whole
from kernel_server.protocol.errors import BadArgument

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Attention:
    """Which earlier tokens each token of this forward attends to, by head.

    `weights`: float32 `[tokens, heads, keys]`, after the softmax. `heads`: their numbers in the
    model. `positions`: of the tokens; keys are the positions from 0.

        found = stop.attention(layer=9)
        found.weights[-1, 3].argmax()           # the key that head 3 looks at most
        found.plot(head=3)
    """

    def __init__(
        self,
        layer: int,
        heads: Sequence[int],
        positions: Sequence[int],
        weights: npt.NDArray[np.float32],
        texts: Sequence[str],
    ) -> None:
        self.layer = layer
        self.heads = list(heads)
        self.positions = list(positions)
        self.weights = weights
        self._texts = list(texts)

    def _at(self, head: object) -> int:
        number = whole(head, "head")
        if number not in self.heads:
            raise BadArgument(f"head {number} is not among those read: {self._heads}")
        return self.heads.index(number)

    @property
    def _heads(self) -> str:
        first, last = self.heads[0], self.heads[-1]
        if self.heads == list(range(first, last + 1)) and first != last:
            return f"heads {first} to {last}"
        return f"heads {', '.join(map(str, self.heads))}" if first != last else f"head {first}"

    def frame(self, head: int) -> pd.DataFrame:
        """The weights of one head: a row per token, a column per key, labelled by (position, text).

        Raises BadArgument for a head that was not read.
        """
        import pandas as pd

        weights = self.weights[:, self._at(head)]
        keys = range(weights.shape[1])
        names = ("position", "token")
        return pd.DataFrame(
            weights,
            index=pd.MultiIndex.from_tuples(self._named(self.positions), names=names),
            columns=pd.MultiIndex.from_tuples(self._named(keys), names=names),
        )

    def _named(self, positions: Iterable[int]) -> list[tuple[int, str]]:
        return [(position, self._texts[position]) for position in positions]

    def plot(self, head: int | None = None) -> Figure:
        """One picture per head, or one large one of `head`."""
        from djinn_nb.figures import attention_grid

        weights, heads = self.weights, self.heads
        if head is not None:
            at = self._at(head)
            weights, heads = weights[:, [at]], [heads[at]]
        labels = [text or str(p) for p, text in enumerate(self._texts)]
        return attention_grid(
            weights,
            heads,
            [labels[p] for p in self.positions],
            labels[: weights.shape[2]],
            title=f"layers.{self.layer}.attention.pattern",
        )

    def __repr__(self) -> str:
        tokens, _, keys = self.weights.shape
        return (
            f"Attention of layer {self.layer}, {self._heads}: [{tokens} tokens, {len(self.heads)}"
            f" heads, {keys} keys] (.weights, .frame(head), .plot()); recomputed on a scratch fork"
        )

    def _repr_html_(self) -> str:
        return cards.card(
            repr(self),
            cards.heading(f"attention of layer {self.layer}, {self._heads}"),
            cards.image(self.plot(), repr(self)),
            cards.note("recomputed on a scratch fork; .weights, .frame(head), .plot(head)"),
        )
