"""What a direction does by how strongly it is added, beside a random direction of the same norm."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from djinn_nb import ahead
from djinn_nb.checks import shown, whole
from djinn_nb.directions import random_direction
from djinn_nb.metrics import Metric, metrics_on
from djinn_nb.progress import Progress
from djinn_nb.runs import ended, error_text, first_logits, raise_if_all, run_out, values_of
from djinn_nb.selectors import number, value_array
from kernel_server.protocol.errors import BadArgument, DjinnError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from djinn_nb.server import Server
    from djinn_nb.vectors import Vector


class StrengthCurve:
    """A table of runs by direction, strength and prompt, and its plot.

    frame: one row per run: direction, alpha, prompt, one column per metric, text (generated),
    tokens (their number), error.

        curve = joy.strength_curve(prompts, [-2, 0, 2], metric)
        curve.mean()
        curve.plot()
    """

    def __init__(self, frame: pd.DataFrame, metrics: Sequence[Metric], title: str) -> None:
        self.frame = frame
        self.metrics = tuple(metrics)
        self._title = title

    def mean(self) -> pd.DataFrame:
        """Each metric's mean over the prompts, one row per direction and strength."""
        names = [metric.name for metric in self.metrics]
        grouped = self.frame.groupby(["direction", "alpha"], sort=False)
        return grouped[names].mean()

    def plot(self, metric: str | None = None) -> Figure:
        """One metric over the strength: mean and each prompt, the direction beside its control.

        metric: its name; None for the first. Raises BadArgument when the curve has none.
        """
        from djinn_nb.plots import strength_plot

        if not self.metrics:
            raise BadArgument("the curve was made without a metric, so there is nothing to plot")
        chosen = [one for one in self.metrics if metric in (None, one.name)]
        if not chosen:
            names = ", ".join(repr(one.name) for one in self.metrics)
            raise BadArgument(f"the curve has no metric {metric!r}: there is {names}")
        name = chosen[0].name
        lines = {}
        for direction, rows in self.frame.groupby("direction", sort=False):
            table = rows.pivot(index="alpha", columns="prompt", values=name).sort_index()
            lines[str(direction)] = (table.index.to_numpy(), table.to_numpy(np.float64))
        label = name if not chosen[0].unit else f"{name} ({chosen[0].unit})"
        return strength_plot(lines, label=label, title=self._title)

    def __repr__(self) -> str:
        return f"{self._title}\n{self.mean() if self.metrics else self.frame}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self._title)}</p>" + str(self.frame.to_html(max_rows=60))


def measure(
    vector: Vector,
    server: Server,
    prompts: Sequence[Any],
    alphas: Sequence[float],
    metric: object,
    *,
    max_new_tokens: int,
    tokens: object,
    location: int | str | None,
    seed: int,
    inexact: bool,
) -> StrengthCurve:
    """Run every prompt at every strength, with the vector and with the control.

    Strength 0 is run once, without an edit, and stands in both columns of figures.
    """
    import pandas as pd

    if isinstance(prompts, str) or not len(prompts):
        raise BadArgument(f"prompts is a list of one or more prompts, not {shown(prompts)}")
    strengths = [number(alpha, name="alpha") for alpha in alphas]
    if not strengths or len(set(strengths)) != len(strengths):
        raise BadArgument(f"alphas are one or more different numbers, not {shown(alphas)}")
    metrics = metrics_on(metric, server.model)
    wanted = whole(max_new_tokens, "max_new_tokens", least=1)
    control = random_direction(vector.numpy(inexact=inexact), whole(seed, "seed", least=0))
    names = (vector.name, f"random (seed {seed})")
    place = vector.location if location is None else location
    rows: list[dict[str, Any]] = []
    errors: list[DjinnError] = []

    def run(prompt: Any, name: str, alpha: float) -> dict[str, Any]:
        with ended(server.launch(prompt, max_new_tokens=wanted)) as session:
            if alpha and name == vector.name:
                vector.apply(session, alpha, tokens=tokens, location=place, inexact=inexact)
            elif alpha:
                change = {"add": value_array(control, name="add"), "alpha": alpha}
                ahead.edit(session, **change, tokens=tokens, location=place, sticky=True)
            logits = first_logits(session) if any(m.of == "logits" for m in metrics) else None
            end = run_out(session)
            values = values_of(metrics, logits, end.generated_text)
            return values | {"text": end.generated_text, "tokens": len(end.generated_tokens)}

    def row(prompt: Any, name: str, alpha: float) -> dict[str, Any]:
        try:
            return run(prompt, name, alpha) | {"error": ""}
        except DjinnError as error:
            errors.append(error)
            return {"text": "", "tokens": 0, "error": error_text(error)}

    total = len(prompts) * (2 * len(strengths) - (0.0 in strengths))
    with Progress(f"strengths of {vector.name}", unit="run") as progress:
        done = 0
        for index, prompt in enumerate(prompts):
            for alpha in strengths:
                for name in names:
                    if alpha == 0 and name != vector.name:
                        found = {k: v for k, v in rows[-1].items() if k not in ("direction",)}
                    else:
                        found = row(prompt, name, alpha)
                        done += 1
                        progress.at(done, total)
                    rows.append(found | {"direction": name, "alpha": alpha, "prompt": index})
    raise_if_all(errors, total)
    measured = [metric.name for metric in metrics]
    columns = ["direction", "alpha", "prompt", *measured, "text", "tokens", "error"]
    other = "" if vector.is_of_this_model else f" · made on {vector.info.model}"
    title = f"{vector.name} at {place}, {len(prompts)} prompt{'s' * (len(prompts) > 1)}{other}"
    return StrengthCurve(pd.DataFrame(rows, columns=columns), metrics, title)
