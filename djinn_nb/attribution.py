"""Direct logit attribution, as `stop.attribution()` gives it: which part added what to a logit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from djinn_nb import cards
from djinn_nb.checks import whole
from kernel_server.protocol import messages as m

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_SHOWN = 5

#: A rest of this share of the logit, or of the largest part, is no rounding, by the model's dtype.
_ROUNDING = {"float32": 1e-3}
_LOW_PRECISION_ROUNDING = 0.05


class Attribution:
    """The parts of a token's logit, or of the difference of two: embedding, heads, MLPs, bias.

    Each part's direct way to the logit, with the final norm's scale held at what it was; `total` is
    their sum, `rest` what the logit has besides them. `attention` rows are what a layer's heads
    leave over, such as a bias of the output projection.

        found = stop.attribution(" Mary", against=" John")
        found.top(5), found.by_layer(), found.rest
        found.plot()
    """

    def __init__(
        self,
        reply: m.AttributionReply,
        against: m.AttributionReply | None,
        location: str,
        dtype: str,
    ) -> None:
        self._replies = (reply,) if against is None else (reply, against)
        self._location = location
        self._rounding = _ROUNDING.get(dtype, _LOW_PRECISION_ROUNDING)
        values = reply.values.numpy().astype(np.float64)
        self._values = values if against is None else values - against.values.numpy()

    # -- what it is about -----------------------------------------------------------------

    @property
    def token_id(self) -> int:
        """The token whose logit has these parts."""
        return self._replies[0].token_id

    @property
    def text(self) -> str:
        """Its text; empty without a tokenizer."""
        return self._replies[0].text

    @property
    def logit(self) -> float:
        """The logit, or the difference of the two; before a soft cap where the head has one."""
        first, *second = (one.logit for one in self._replies)
        return first - sum(second)

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return float(self._values.sum())

    @property
    def rest(self) -> float:
        """What the logit has besides the parts: rounding, unless the model's norm is not linear, or
        the residual stream was edited between its parts, or after them."""
        return self.logit - self.total

    @property
    def note(self) -> str | None:
        """What else there is to know, such as that the logit is the one before a soft cap."""
        return self._replies[0].note

    # -- the parts ------------------------------------------------------------------------

    @property
    def frame(self) -> pd.DataFrame:
        """One row per part: kind, layer, head (missing where there is none) and value."""
        import pandas as pd

        reply = self._replies[0]
        table = pd.DataFrame(
            {"kind": reply.kinds, "layer": reply.layers, "head": reply.heads, "value": self._values}
        )
        for name in ("layer", "head"):
            table[name] = table[name].astype("Int64").mask(table[name] < 0)
        return table

    @property
    def heads(self) -> pd.DataFrame:
        """The heads' parts, one row per layer and one column per head; NaN where there is none."""
        table = self.frame[self.frame.kind == "head"]
        return table.pivot(index="layer", columns="head", values="value").reindex(self._layers)

    def by_layer(self) -> pd.DataFrame:
        """What attention (all heads and what they leave over) and MLP of each layer add."""
        table = self.frame.dropna(subset="layer")
        part = table.kind.where(table.kind == "mlp", "attention")
        found = table.assign(part=part).pivot_table(
            index="layer", columns="part", values="value", aggfunc="sum"
        )
        found = found.reindex(columns=["attention", "mlp"])
        found.columns.name = None
        return found.assign(total=found.sum(axis=1))

    def top(self, n: int = 10) -> pd.DataFrame:
        """The parts of the largest magnitude, that one first."""
        count = whole(n, "n", least=1)
        order = np.argsort(-np.abs(self._values), kind="stable")[:count]
        return self.frame.iloc[order].reset_index(drop=True)

    @property
    def _layers(self) -> list[int]:
        return sorted({layer for layer in self._replies[0].layers if layer >= 0})

    # -- how it shows itself --------------------------------------------------------------

    @property
    def _unit(self) -> str:
        first, *second = (repr(r.text) if r.text else f"id {r.token_id}" for r in self._replies)
        return f"logit of {first}" if not second else f"logit of {first} minus that of {second[0]}"

    @property
    def _headline(self) -> str:
        return (
            f"attribution of the {self._unit}: {self.logit:.4g} = {self.total:.4g} in"
            f" {len(self._values)} parts, rest {self.rest:.2g}"
        )

    def plot(self) -> Figure:
        """Heads as a heat map of layers × heads; MLPs, what heads leave over, embedding as bars."""
        from djinn_nb.figures import attribution_map

        table, heads = self.frame, self.heads
        by_kind = {
            kind: table[table.kind == kind].groupby("layer").value.sum().reindex(self._layers)
            for kind in ("mlp", "attention")
        }
        bars: dict[str, npt.NDArray[np.float64]] = {"mlp": by_kind["mlp"].to_numpy(np.float64)}
        left = by_kind["attention"].to_numpy(np.float64)
        if np.abs(np.nan_to_num(left)).max(initial=0.0) > 1e-3 * max(abs(self.logit), 1e-9):
            bars["attention besides heads"] = left
        grid = heads.to_numpy(np.float64)
        if not grid.shape[1]:
            grid = np.full((len(self._layers), 1), np.nan)
        return attribution_map(
            grid,
            bars,
            float(table.value[table.kind == "embedding"].sum()),
            title=self._headline,
            unit="difference" if len(self._replies) > 1 else "logit",
        )

    def _names(self) -> list[tuple[str, str]]:
        rows = []
        for row in self.top(_SHOWN).itertuples():
            place = str(row.kind)
            if row.kind == "head":
                place = f"layer {row.layer} head {row.head}"
            elif row.kind in ("mlp", "attention"):
                place = f"layer {row.layer} {row.kind}"
            rows.append((place, f"{row.value:+.4g}"))
        return rows

    def _notes(self) -> list[str]:
        notes = [self.note] if self.note else []
        if abs(self.rest) > self._rounding * max(
            abs(self.logit), float(np.abs(self._values).max())
        ):
            notes.append(
                f"the parts are not the whole logit, {self.rest:.2g} is left: an edit of the stream"
                " between the parts, of final_norm or the logits is none of them"
            )
        return [*notes, "recomputed on a scratch fork, the final norm's scale held fixed"]

    def __repr__(self) -> str:
        rows = self._names()
        width = max(len(name) for name, _ in rows)
        lines = [f"  {name:<{width}}  {value:>9}" for name, value in rows]
        return "\n".join([self._headline, *lines, *(f"  {note}" for note in self._notes())])

    def _repr_html_(self) -> str:
        return cards.card(
            self._headline,
            cards.heading(self._headline),
            cards.table(("part", "logits"), self._names(), "the largest parts"),
            cards.image(self.plot(), self._headline),
            *map(cards.note, self._notes()),
        )
