"""Figures of the notebook about edits, each a function of a record file and of nothing else.

Colours are of Okabe and Ito, "Color Universal Design" (2008); marks and line styles say the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from notebooks.harness.records import read_table

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.6"


def effects(path: Path) -> Any:
    """What a scale does by layer, a direction by strength, an ablation by layer and head."""
    from matplotlib.figure import Figure

    records = read_table(path)
    figure = Figure(figsize=(13, 8), facecolor="white", layout="constrained")
    (scale, story), (layers, heads) = figure.subplots(2, 2)
    _scale(scale, records)
    _stories(story, records)
    _layers(layers, records)
    _heads(figure, heads, records)
    return figure


def beside_hooks(path: Path, tolerance: dict[str, float]) -> Any:
    """Distance of every edited run to the same edit by hooks, as it is and with a fault planted.

    tolerance: largest allowed distance by dtype, in standard deviations of the hooked row.
    """
    from matplotlib.figure import Figure

    records = read_table(path)
    rows = records[
        records["name"].isin(["distance to hooks", "distance to hooks with a fault"])
    ].reset_index(drop=True)
    figure = Figure(figsize=(10, 0.8 + 0.24 * len(rows)), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    labels = []
    for place, row in rows.iterrows():
        faulty = row["name"] != "distance to hooks"
        # Equal bits have distance 0, which a logarithmic axis cannot show: they sit at its edge.
        shown = np.maximum(row["values"], 1e-8)
        colour, mark = (ORANGE, "x") if faulty else (BLUE, ".")
        axes.plot(shown, [place] * len(shown), mark, color=colour, markersize=4)
        limit = tolerance[row["dtype"]]
        axes.plot([limit, limit], [place - 0.4, place + 0.4], color="black", linewidth=1.5)
        fault = f" · {row['fault']}" if faulty else ""
        labels.append(f"{row['edit']}{fault} ({row['dtype']})")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("largest difference of one logit, in standard deviations of the hooked row")
    axes.set_title(
        "Every forward beside hooks by hand: as it is (dots), with a fault planted (crosses);"
        " bars: tolerance",
        fontsize=9,
    )
    return figure


def _scale(axes: Any, records: Any) -> None:
    tokens = records[records["name"] == "tokens changed by scale 0.9"]
    share = records[records["name"] == "probability moved by scale 0.9"]
    other = axes.twinx()
    for sticky, style in ((False, "-"), (True, ":")):
        where = "every token" if sticky else "the prompt"
        rows, moved = (table[table["sticky"] == sticky] for table in (tokens, share))
        if rows.empty:
            continue
        means = rows["values"].map(np.mean)
        axes.plot(rows["layer"], means, "o" + style, color=BLUE, label=f"tokens, {where}")
        means = 100 * moved["values"].map(np.mean)
        other.plot(moved["layer"], means, "s" + style, color=ORANGE, label=f"probability, {where}")
    axes.set_ylim(-1, 33)
    axes.set_ylabel("changed of the next 32 tokens (mean over prompts)")
    axes.set_xlabel("layer whose output is scaled by 0.9")
    other.set_ylim(bottom=0)
    other.set_ylabel("% of the next token's distribution moved (mean)")
    handles = [*axes.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, fontsize=8)
    axes.set_title("A layer scaled by 0.9, in the prompt or in every token", fontsize=10)


def _stories(axes: Any, records: Any) -> None:
    rows = records[records["name"] == "stories flipped"]
    for direction, line in rows.groupby("direction"):
        good = direction == "good"
        line = line.sort_values("strength")
        axes.plot(
            line["strength"], 100 * line["value"], "o-" if good else "s--",
            color=BLUE if good else ORANGE, label="sentiment" if good else direction,
        )  # fmt: skip
    axes.axhline(90, color=BLUE, linewidth=0.8, linestyle=":")
    axes.axhline(20, color=ORANGE, linewidth=0.8, linestyle=":")
    axes.set_ylim(-3, 103)
    axes.set_xlabel("strength (× the distance between good and bad stories)")
    axes.set_ylabel("% of held-out stories flipped")
    axes.legend(fontsize=8)
    axes.set_title("A direction added at every token (dotted: what is required)", fontsize=10)


def _layers(axes: Any, records: Any) -> None:
    rows = records[records["name"] == "logit difference"]
    base = float(np.mean(rows[rows["part"] == "nothing"]["values"].iloc[0]))
    found = rows[rows["part"] == "attention"]
    axes.bar(found["layer"], found["values"].map(np.mean), color=BLUE)
    axes.axhline(base, color="black", linewidth=1, linestyle="--", label="nothing ablated")
    axes.set_xlabel("layer whose attention adds nothing")
    axes.set_ylabel("logit difference, right − wrong name (logits)")
    axes.legend(fontsize=8)
    axes.set_title("Who gets the drink, without a layer's attention", fontsize=10)


def _heads(figure: Any, axes: Any, records: Any) -> None:
    rows = records[records["name"] == "logit difference"]
    base = float(np.mean(rows[rows["part"] == "nothing"]["values"].iloc[0]))
    found = rows[rows["part"] == "head"].astype({"layer": int, "head": int})
    # Layers that were not searched stay blank.
    grid = np.full((int(rows["layer"].max()) + 1, int(found["head"].max()) + 1), np.nan)
    for _, row in found.iterrows():
        grid[row["layer"], row["head"]] = np.mean(row["values"]) - base
    reach = float(np.nanmax(np.abs(grid)))
    axes.set_facecolor(GREY)
    image = axes.imshow(grid, aspect="auto", origin="lower", cmap="PuOr_r", vmin=-reach, vmax=reach)
    for layer, head in np.argwhere(np.abs(np.nan_to_num(grid)) > 0.3 * reach):
        axes.annotate(
            f"{grid[layer, head]:+.1f}", (head, layer), ha="center", va="center", size=7,
            color="white" if abs(grid[layer, head]) > 0.6 * reach else "black",
        )  # fmt: skip
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("change of the logit difference (logits)")
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title("… without one head (grey: not looked at)", fontsize=10)
