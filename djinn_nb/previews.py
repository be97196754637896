"""What an edit would do to the next token: shown side by side, without anything being changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from djinn_nb import cards
from djinn_nb.plots import visible
from kernel_server.protocol import messages as m
from kernel_server.protocol.errors import BadArgument

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from djinn_nb.metrics import Metric

#: Logits `[vocabulary]`, float32: without the edits, and with them.
BothLogits: TypeAlias = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, repr=False)
class MetricChange:
    """A metric of the next token's distribution without the edits, and with them."""

    name: str
    unit: str
    before: float
    after: float

    @property
    def change(self) -> float:
        return self.after - self.before

    def __repr__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.name}: {self.before:.4g} → {self.after:.4g} ({self.change:+.4g}){unit}"


class Preview:
    """The next token's distribution as it would be with an edit, and as it is; nothing is changed.

    Made by `stop.preview()`. Applying the edit and going on gives these logits, bit for bit.

        found = stop.preview(add=vector, alpha=4, tokens=-1)
        found.after, found.kl, found.logits_after
        found.plot()
    """

    def __init__(
        self,
        reply: m.PreviewReply,
        ask: Callable[[], BothLogits],
        label: str,
        logits: BothLogits | None = None,
        metrics: Sequence[Metric] = (),
    ) -> None:
        self._reply = reply
        self._ask = ask
        self._label = label
        self._logits = logits
        self._changes = []
        if logits is not None:
            for one in metrics:
                change = MetricChange(one.name, one.unit, one(logits[0]), one(logits[1]))
                self._changes.append(change)

    # -- the distributions ----------------------------------------------------------------

    @property
    def before(self) -> pd.DataFrame:
        """The most probable next tokens without the edits: text, token_id, probability."""
        return _table(self._reply.before)

    @property
    def after(self) -> pd.DataFrame:
        """The most probable next tokens with the edits: text, token_id, probability."""
        return _table(self._reply.after)

    @property
    def frame(self) -> pd.DataFrame:
        """Both side by side, one row per token; NaN where it is not among the most probable.

        Once the logits have been fetched every probability is known.
        """
        import pandas as pd

        before, after = self.before.set_index("token_id"), self.after.set_index("token_id")
        ids = list(dict.fromkeys([*after.index, *before.index]))
        texts = {**before.text.to_dict(), **after.text.to_dict()}
        if self._logits is not None:
            columns = [_probabilities(row)[ids] for row in self._logits]
        else:
            columns = [one.probability.reindex(ids).to_numpy() for one in (before, after)]
        return pd.DataFrame(
            {
                "text": [texts[i] for i in ids],
                "token_id": ids,
                "before": columns[0],
                "after": columns[1],
            }
        )

    @property
    def kl(self) -> float:
        """Kullback-Leibler divergence of the distribution with the edits from that without, nats:
        Σ after · (log after − log before)."""
        return self._reply.kl

    @property
    def logits_before(self) -> npt.NDArray[np.float32]:
        """Logits without the edits, `[vocabulary]`; fetched when first asked for."""
        return self._both()[0].copy()

    @property
    def logits_after(self) -> npt.NDArray[np.float32]:
        """Logits with the edits, `[vocabulary]`; fetched when first asked for.

        Raises StaleStop when the session has moved on, or was edited, before they were fetched.
        """
        return self._both()[1].copy()

    def _both(self) -> BothLogits:
        if self._logits is None:
            self._logits = self._ask()
        return self._logits

    # -- what changed ---------------------------------------------------------------------

    @property
    def elements_changed(self) -> int:
        """Elements that the edits changed in this forward, together."""
        return sum(self._reply.elements_changed)

    @property
    def changed_by_edit(self) -> tuple[int, ...]:
        """Elements that each edit changed in this forward, in the order given."""
        return self._reply.elements_changed

    @property
    def metric(self) -> MetricChange:
        """The one metric asked for, before and after. Raises BadArgument unless there is one."""
        if len(self._changes) != 1:
            raise BadArgument(
                f"the preview has {len(self._changes)} metrics: preview(metric=...) takes one or"
                " several, .metrics lists them"
            )
        return self._changes[0]

    @property
    def metrics(self) -> list[MetricChange]:
        """Every metric asked for, before and after."""
        return list(self._changes)

    # -- how it shows itself --------------------------------------------------------------

    def plot(self) -> Figure:
        """Bars of the probabilities before and after, one pair per token."""
        from djinn_nb.figures import preview_bars

        table = self.frame
        return preview_bars(
            [text or f"id {i}" for text, i in zip(table.text, table.token_id, strict=True)],
            table.before.to_numpy(np.float64),
            table.after.to_numpy(np.float64),
            title=self._headline,
        )

    @property
    def _headline(self) -> str:
        count = self.elements_changed
        if count == 0:
            return f"{self._label}: changes nothing, no element differs"
        what = "1 element" if count == 1 else f"{count:,} elements"
        return f"{self._label}: {what} changed, KL {self.kl:.4g} nats"

    def _rows(self) -> list[tuple[str, str, str]]:
        arms = (self._reply.before, self._reply.after)
        # of a token that is not among the most probable no more is known than that
        floors = [float(one.probabilities.numpy()[0][-1]) for one in arms]
        rows = []
        for row in self.frame.itertuples():
            shown = [
                below(floor) if np.isnan(value) else probability_text(value)
                for value, floor in zip((row.before, row.after), floors, strict=True)
            ]
            name = visible(row.text) if row.text else f"id {row.token_id}"
            rows.append((name, shown[0], shown[1]))
        return rows

    def _notes(self) -> list[str]:
        return [*map(repr, self._changes), "computed on scratch forks; the session is unchanged"]

    def __repr__(self) -> str:
        rows = [("next token", "before", "after"), *self._rows()]
        width = max(len(row[0]) for row in rows)
        lines = [f"  {name:<{width}}  {before:>7}  {after:>7}" for name, before, after in rows]
        return "\n".join([self._headline, *lines, *(f"  {note}" for note in self._notes())])

    def _repr_html_(self) -> str:
        table = cards.table(("next token", "before", "after"), self._rows(), "probability")
        return cards.card(
            f"Preview: {self._headline}",
            cards.heading(self._headline),
            table,
            *map(cards.note, self._notes()),
        )


def probability_text(value: float) -> str:
    """A probability with three digits; one that would read as none, as less than the least."""
    return f"{value:.3f}" if value >= 0.0005 else below(value)


def below(bound: float) -> str:
    """That a probability is at most a bound, rounded up: `<0.001`, never less than that.

    >>> below(0.0123), below(1e-7)
    ('<0.013', '<0.001')
    """
    return f"<{max(1, math.ceil(bound * 1000)) / 1000:.3f}"


def _table(reply: m.LensReply) -> pd.DataFrame:
    import pandas as pd

    ids = reply.token_ids.numpy()[0]
    return pd.DataFrame(
        {
            "text": list(reply.texts[0]) if reply.texts else [""] * len(ids),
            "token_id": ids.astype(int),
            "probability": reply.probabilities.numpy()[0].astype(np.float64),
        }
    )


def _probabilities(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    row = logits.astype(np.float64)
    shifted = np.exp(row - row.max())
    return np.asarray(shifted / shifted.sum())
