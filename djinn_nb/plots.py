"""Figures from arrays, without pyplot: nothing global is touched, any thread may draw.

Pure functions: they fetch nothing and keep nothing, so notebooks, panels and tests share them.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Most columns drawn; of a longer forward the last tokens are shown, and the title says so.
MAX_TOKENS = 96
#: Most labels along an axis.
MAX_LABELS = 40
#: Letters of a title that fit in an inch.
TITLE_LETTERS = 13
#: Ink that is read on a white page and on a dark one: over 4.2 to 1 against both.
INK = "#787878"


def norm_heat_map(
    norm: npt.NDArray[Any],
    locations: Sequence[str],
    positions: Sequence[int],
    texts: Sequence[str] | None = None,
    *,
    title: str = "",
    label: str = "L2 norm",
) -> Figure:
    """L2 norm of each token's vector, `[locations, tokens]`, drawn with a log colour scale.

    locations: names of the rows, the first at the bottom. positions, texts: of the tokens. label:
    what the colours mean, where it is something else.

        figure = norm_heat_map(norm, locations, positions, texts)
        figure.savefig("norms.png")
    """
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    norm = np.asarray(norm, dtype=np.float64)
    hidden = max(0, norm.shape[1] - MAX_TOKENS)
    norm, positions = norm[:, hidden:], list(positions)[hidden:]
    labels = [str(p) for p in positions]
    if texts is not None and any(texts):
        labels = [visible(t) for t in list(texts)[hidden:]]
    rows, columns = norm.shape
    # beside the names and the colour bar, a token has the same width however many there are
    names = [_short(name) for name in locations]
    width = min(11.0, 1.05 + 0.07 * max(map(len, names), default=0) + 0.27 * columns)
    height = min(5.0, max(1.9, 1.1 + 0.13 * rows))
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    broken = ~np.isfinite(norm)
    positive = norm[~broken & (norm > 0)]
    if positive.size and positive.max() > positive.min():
        scale: Normalize = LogNorm(float(positive.min()), float(positive.max()))
    else:
        scale = Normalize(0.0, float(positive.max()) if positive.size else 1.0)
    shown = np.ma.masked_array(norm, mask=broken | (norm <= 0))
    image = axes.imshow(shown, aspect="auto", origin="lower", cmap="viridis", norm=scale)
    axes.set_facecolor("0.75")
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    kind = "log scale" if isinstance(scale, LogNorm) else "linear scale"
    kind += ", grey: NaN or 0" if shown.mask.any() else ""
    # a long label takes two lines: few rows make a low picture
    bar.set_label(f"{label}{' ' if len(label) < 12 else chr(10)}({kind})", size=8)
    if isinstance(scale, LogNorm):
        bar.ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    bar.ax.tick_params(labelsize=7, which="both")
    label_axis(axes.xaxis, labels, rotation=90)
    label_axis(axes.yaxis, names)
    note = f", the last {columns} of {columns + hidden} tokens" if hidden else ""
    axes.set_xlabel(f"token{note}", size=8)
    lines = textwrap.wrap(title, int(width * TITLE_LETTERS))
    if len(lines) > 1:  # over all of the figure: one token is narrower than any title
        figure.suptitle("\n".join(lines), size=9, parse_math=False)
    else:
        axes.set_title(title, size=9, parse_math=False)
    return figure


def mark(figure: Figure, row: int, column: int, columns: int, label: str) -> None:
    """Ring a cell of a heat map of so many tokens, and say in a legend what it is.

    mark(figure, 3, 12, len(positions), "first divergence")
    """
    column -= max(0, columns - MAX_TOKENS)
    if column < 0:
        return  # among the tokens that are not drawn
    axes = figure.axes[0]
    axes.plot(
        [column], [row], "o", markersize=9, fillstyle="none", color="#D55E00", markeredgewidth=1.6,
        linestyle="none", label=label,
    )  # fmt: skip
    axes.legend(fontsize=7, loc="upper left")


def strength_plot(
    lines: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]], *, label: str, title: str = ""
) -> Figure:
    """A metric over strength: for each line its mean over the prompts, and each prompt faintly.

    lines: name -> (strengths `[alphas]`, values `[alphas, prompts]`); the first is the direction,
    the others are its controls. NaN values are left out.

        strength_plot({"joy": (alphas, values), "random": (alphas, others)}, label="probability")
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.2), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="0.8", linewidth=0.8)
    for number, (name, (strengths, values)) in enumerate(lines.items()):
        colour, style = f"C{number}", "-" if number == 0 else "--"
        axes.plot(strengths, values, color=colour, alpha=0.18, linewidth=0.7)
        counted = np.isfinite(values)
        sums = np.where(counted, values, 0.0).sum(1)
        mean = np.divide(sums, counted.sum(1), out=np.full(len(sums), np.nan), where=counted.any(1))
        axes.plot(
            strengths, mean, color=colour, linestyle=style, marker="o", markersize=3.5, label=name
        )
    axes.set_xlabel("strength (alpha)", size=8)
    axes.set_ylabel(label, size=8, parse_math=False)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7)
    axes.set_title(title, size=9, parse_math=False)
    return figure


def label_axis(axis: Any, labels: Sequence[str], rotation: int = 0) -> None:
    """Labels at every place, or at every n-th when they would not fit."""
    step = -(-len(labels) // MAX_LABELS)
    places = range(0, len(labels), step)
    # a token's text may hold $, which matplotlib would read as mathematics
    axis.set_ticks(
        list(places), [labels[i] for i in places], size=7, rotation=rotation, parse_math=False
    )


def _short(location: str) -> str:
    return location.removeprefix("layers.").removesuffix(".output")


def visible(text: str) -> str:
    """A token's text with its spaces and line ends made visible, for a label."""
    shown = text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "�" for c in shown)


def on_any_page(figure: Figure) -> Figure:
    """The same figure without paper and in grey ink, for a page whose theme nobody knows.

    Colours that mean something stay as they are. Changes the figure it is given.

        png(on_any_page(figure))
    """
    from matplotlib.text import Text

    figure.patch.set_alpha(0.0)
    for axes in figure.axes:
        if axes.get_facecolor()[:3] == (1.0, 1.0, 1.0):
            axes.patch.set_alpha(0.0)
        axes.tick_params(which="both", color=INK, labelcolor=INK)
        for spine in axes.spines.values():
            spine.set_color(INK)
        if (legend := axes.get_legend()) is not None:
            legend.get_frame().set_facecolor("none")
            legend.get_frame().set_edgecolor(INK)
    for text in figure.findobj(Text):
        text.set_color(INK)
    return figure


def png(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as PNG."""
    target = io.BytesIO()
    with warnings.catch_warnings():
        # a script the font lacks is drawn as boxes; the token strip beside it has the text
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(target, format="png", dpi=dpi)
    return target.getvalue()
