"""Figures of the evaluation notebooks, each a function of a record file and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from notebooks.harness.records import read_table


def resume_is_exact(path: Path, tolerance: dict[str, float]) -> Any:
    """Values that differ from the reference run, with and without faults; distance to stock.

    tolerance: largest allowed distance by dtype, in standard deviations of stock's row.
    """
    from matplotlib.figure import Figure

    records = read_table(path)
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)

    healthy = records[records["name"] == "values that differ from the reference run"]
    planted = records[records["name"] == "values that differ with a fault"]
    bars = [("no fault, all models, layers, forwards", healthy["value"].sum(), "tab:blue")]
    bars += [
        (f"{row['fault']}\n({row['model']}, {row['dtype']})", row["value"], "tab:orange")
        for _, row in planted.iterrows()
    ]
    labels, counts, colours = zip(*bars[::-1], strict=True)
    left.barh(labels, counts, color=colours)
    for place, count in enumerate(counts):
        left.annotate(f" {int(count):,}", (count, place), va="center", fontsize=7)
    left.set_xscale("symlog")
    left.set_xlim(0, max(counts) * 20 + 10)
    left.tick_params(axis="y", labelsize=7)
    left.set_xlabel("logits and tokens whose bits differ from the reference run")
    left.set_title("Stopped and continued: none differ, unless a fault is planted", fontsize=10)

    far = records[records["name"] == "distance to stock logits"]
    cases = [f"{row['model']}, {row['dtype']}" for _, row in far.iterrows()]
    for place, (_, row) in enumerate(far.iterrows()):
        # Equal bits have distance 0, which a logarithmic axis cannot show: they sit at its edge.
        shown = [max(value, 1e-8) for value in row["values"]]
        right.plot(shown, [place] * len(shown), ".", color="tab:blue", markersize=4)
        limit = tolerance[row["dtype"]]
        right.plot([limit, limit], [place - 0.4, place + 0.4], color="tab:red")
    right.set_yticks(range(len(cases)), cases, fontsize=7)
    right.set_xscale("log")
    right.set_xlabel("largest difference to a stock logit, in standard deviations")
    right.set_title("Every forward beside stock transformers (red: the tolerance)", fontsize=10)
    return figure
