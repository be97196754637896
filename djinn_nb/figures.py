"""Figures of what a look inside found: a preview, attention weights, an attribution.

Pure functions of arrays, as those of `plots`. Colours are told apart by colour-blind readers too,
and hatches and signs say the same.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from djinn_nb.plots import MAX_TOKENS, label_axis, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Most heads drawn side by side; the title says so when there are more.
MAX_HEADS = 32
#: Blue and orange of Okabe and Ito, "Color Universal Design" (2008).
_BEFORE, _AFTER = "#0072B2", "#E69F00"


def preview_bars(
    labels: Sequence[str],
    before: npt.NDArray[Any],
    after: npt.NDArray[Any],
    *,
    title: str = "",
) -> Figure:
    """Probabilities `[tokens]` of the next token without an edit and with it, as pairs of bars.

    NaN: not known, because the token is not among the most probable there; no bar is drawn.

        preview_bars([" Mary", " John"], before, after).savefig("preview.png")
    """
    from matplotlib.figure import Figure

    rows = np.arange(len(labels))
    figure = Figure(figsize=(5.6, 0.9 + 0.3 * len(labels)), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.barh(rows - 0.2, np.nan_to_num(before), 0.38, color=_BEFORE, label="before")
    axes.barh(
        rows + 0.2, np.nan_to_num(after), 0.38, color=_AFTER, hatch="///", edgecolor="white",
        label="after",
    )  # fmt: skip
    label_axis(axes.yaxis, [visible(label) for label in labels])
    axes.invert_yaxis()
    axes.set_xlabel("probability of the next token", size=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7)
    axes.set_title("\n".join(textwrap.wrap(title, 72)), size=8, loc="left", parse_math=False)
    return figure


def vector_figure(series: Sequence[tuple[str, npt.NDArray[Any]]]) -> Figure:
    """One or two vectors `[channels]`: their values over the channels, and how these are spread.

    series: name and values of each.

        vector_figure([("layers.3.output, token 2", stop.value[2].numpy())])
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 2.8), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1))
    styles = ((_BEFORE, "-", ""), (_AFTER, "--", "///"))
    spread = np.concatenate([values[np.isfinite(values)] for _, values in series])
    edges = np.histogram_bin_edges(spread, 40) if spread.size else np.linspace(0, 1, 41)
    for (name, values), (colour, line, hatch) in zip(series, styles, strict=False):
        left.plot(values, color=colour, linestyle=line, linewidth=0.8, label=name)
        counted = values[np.isfinite(values)]
        right.hist(counted, edges, color=colour, alpha=0.55, hatch=hatch, label=name)
    left.set_xlabel("channel", size=8)
    left.set_ylabel("value", size=8)
    right.set_xlabel("value", size=8)
    right.set_ylabel("channels", size=8)
    for axes in (left, right):
        axes.tick_params(labelsize=7)
    for text in left.legend(fontsize=7, loc="upper right").get_texts():
        text.set_parse_math(False)
    return figure


def attention_grid(
    weights: npt.NDArray[Any],
    heads: Sequence[int],
    token_labels: Sequence[str],
    key_labels: Sequence[str],
    *,
    title: str = "",
) -> Figure:
    """Attention weights `[tokens, heads, keys]`: one picture per head, one large one of a head.

    All share one colour scale from 0 to the largest weight. Of many tokens and keys the last are
    drawn, of many heads the first.

        attention_grid(weights[:, [3]], [3], labels, labels)
    """
    from matplotlib.figure import Figure

    shown = np.asarray(weights, np.float64)[-MAX_TOKENS:, :MAX_HEADS, -MAX_TOKENS:]
    tokens, count, keys = shown.shape
    columns = min(count, 4)
    rows = -(-count // columns)
    single = count == 1
    side = 4.6 if single else 2.0
    figure = Figure(
        figsize=(columns * side + 1.2, rows * side + 0.6), facecolor="white", layout="constrained"
    )
    top = float(np.nanmax(shown, initial=0.0)) or 1.0
    every = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for i, axes in enumerate(every):
        picture = np.ma.masked_invalid(shown[:, i])
        image = axes.imshow(picture, aspect="auto", cmap="viridis", vmin=0.0, vmax=top)
        axes.set_facecolor("0.75")
        axes.set_title(f"head {heads[i]}", size=8)
        if single or (tokens <= 24 and i % columns == 0):
            label_axis(axes.yaxis, [visible(one) for one in token_labels[-tokens:]])
        else:
            axes.set_yticks([])
        if single or (keys <= 24 and i >= count - columns):
            label_axis(axes.xaxis, [visible(one) for one in key_labels[-keys:]], rotation=90)
        else:
            axes.set_xticks([])
    bar = figure.colorbar(image, ax=every, pad=0.01)
    bar.set_label("attention weight", size=8)
    bar.ax.tick_params(labelsize=7)
    figure.supxlabel("key" + _cut(len(key_labels), keys), size=8)
    figure.supylabel("token" + _cut(len(token_labels), tokens), size=8)
    more = f", the first {count} of {len(heads)} heads" if len(heads) > count else ""
    figure.suptitle(f"{title}{more}", size=9, parse_math=False)
    return figure


def attribution_map(
    heads: npt.NDArray[Any],
    bars: Mapping[str, npt.NDArray[Any]],
    embedding: float,
    *,
    title: str = "",
    unit: str = "logit",
) -> Figure:
    """Parts of a logit: heads `[layers, heads]` as a heat map, other parts `[layers]` as bars.

    bars: by name, such as "mlp"; NaN where a layer has no such part. embedding: its own part, drawn
    below layer 0.

        attribution_map(heads, {"mlp": mlp}, embedding)
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    heads = np.asarray(heads, np.float64)
    layers = len(heads)
    height = min(9.0, 1.6 + 0.2 * layers)
    figure = Figure(figsize=(8.0, height), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    most = float(np.nanmax(np.abs(heads), initial=0.0)) or 1.0
    image = left.imshow(
        np.ma.masked_invalid(heads),
        aspect="auto", origin="lower", cmap="PuOr", norm=TwoSlopeNorm(0.0, -most, most),
    )  # fmt: skip
    left.set_facecolor("0.75")
    label_axis(left.xaxis, [str(i) for i in range(heads.shape[1])])
    label_axis(left.yaxis, [str(i) for i in range(layers)])
    left.set_xlabel("head", size=8)
    left.set_ylabel("layer", size=8)
    bar = figure.colorbar(image, ax=left, pad=0.01)
    grey = ", grey: no such head" if np.isnan(heads).any() else ""
    bar.set_label(f"part of the {unit}{grey}", size=8)
    bar.ax.tick_params(labelsize=7)
    width = 0.8 / max(len(bars), 1)
    for i, (name, values) in enumerate(bars.items()):
        places = np.arange(layers) + 1 + (i - (len(bars) - 1) / 2) * width
        colour, hatch = ((_BEFORE, ""), (_AFTER, "///"))[i % 2]
        right.barh(
            places, np.nan_to_num(values), width, color=colour, hatch=hatch, edgecolor="white",
            label=name,
        )  # fmt: skip
    right.barh([0], [embedding], 0.8, color="0.45", label="embedding")
    right.axvline(0, color="0.4", linewidth=0.6)
    label_axis(right.yaxis, ["embedding", *map(str, range(layers))])
    right.set_xlabel(f"part of the {unit}", size=8)
    right.tick_params(labelsize=7)
    right.legend(fontsize=7)
    # the same height for a layer on both sides
    left.set_ylim(-1.5, layers - 0.5)
    right.set_ylim(-0.5, layers + 0.5)
    figure.suptitle(title, size=9, parse_math=False)
    return figure


def _cut(total: int, shown: int) -> str:
    return f", the last {shown} of {total}" if total > shown else ""
