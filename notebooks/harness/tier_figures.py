"""Figures of the notebooks about tiers, each a function of a record file and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from notebooks.harness.records import read_table

_COLOURS = {"device": "tab:blue", "host": "tab:orange", "disk": "tab:green"}


def _pairs(rows: int, height: float) -> tuple[Any, Any]:
    """A figure of two panels a row, and the panels `[rows, 2]`; height: of a row, inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, height * rows), layout="constrained")
    return figure, figure.subplots(rows, 2, squeeze=False)


def _shares(panel: Any, values: list[float], **look: Any) -> None:
    """Which share of the values is no larger, over a logarithmic axis."""
    ordered = sorted(values)
    panel.step(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], where="post", **look)
    panel.set_xscale("log")


def memory_pressure(path: Path) -> Any:
    """Pages by tier over time, by stage, stopped in a decode; and how long each swap took."""
    records = read_table(path)
    decode = records[records["stopped_in"] == "decode"]
    stages = list(dict.fromkeys(decode["stage"]))
    figure, axes = _pairs(len(stages), 3.6)
    for (left, right), stage in zip(axes, stages, strict=True):
        here = decode[decode["stage"] == stage]
        (seconds,) = here[here["name"] == "time of a sample"]["values"]
        for _, row in here[here["name"] == "pages in a tier"].iterrows():
            if any(row["values"]):
                left.plot(seconds, row["values"], color=_COLOURS[row["tier"]], label=row["tier"])
        left.set_xlabel("seconds")
        left.set_ylabel("pages")
        left.legend(fontsize=8)
        left.set_title(f"{stage}: all are stopped, then all are resumed", fontsize=10)
        for _, row in here[here["name"] == "duration of a swap"].iterrows():
            _shares(right, row["values"], label=f"{row['way']} ({len(row['values']):,})")
        right.set_xlabel("milliseconds of a copy that somebody waited for")
        right.set_ylabel("share of the copies")
        right.legend(fontsize=8)
        right.set_title(f"{stage}: swaps", fontsize=10)
    return figure


def resume_latency(path: Path) -> Any:
    """Client latency by the layer of the stop and the context, in prefill and in decode."""
    records = read_table(path)
    models = list(dict.fromkeys(records["model"]))
    figure, axes = _pairs(len(models), 4)
    for row, model in zip(axes, models, strict=True):
        here = records[records["model"] == model]
        for panel, kind in zip(row, ("decode", "prefill"), strict=True):
            _latencies(panel, here[here["stopped_in"] == kind])
            panel.set_title(f"{model}, stopped in a {kind}", fontsize=10)
        hand = here[here["name"] == "time of a manual offload"]
        rerun = here[here["name"] == "time of a rerun from token 0"]
        for place, tokens in enumerate(dict.fromkeys(here["tokens"])):
            ours = hand[hand["tokens"] == tokens]
            colour = f"C{place}"
            row[0].plot(ours["layer"], ours["value"], "x:", color=colour, linewidth=0.8)
            again = rerun[rerun["tokens"] == tokens]
            row[0].plot(again["layer"], again["value"], "-.", color=colour, linewidth=0.8)
        row[0].plot([], [], "kx:", label="manual offload")
        row[0].plot([], [], "k-.", label="rerun from token 0")
        row[0].legend(fontsize=7)
    return figure


def _latencies(panel: Any, records: Any) -> None:
    client = records[records["name"] == "client latency"]
    for place, tokens in enumerate(dict.fromkeys(client["tokens"])):
        for where, style in (("device", "o-"), ("host", "s--")):
            ours = client[(client["tokens"] == tokens) & (client["place"] == where)]
            label = f"{int(tokens):,} tokens, {where}"
            panel.plot(ours["layer"], ours["value"], style, color=f"C{place}", label=label)
    panel.set_yscale("log")
    panel.set_xlabel("layer of the stop")
    panel.set_ylabel("ms to the logits")
    panel.legend(fontsize=7)


def checkpoint_cost(path: Path) -> Any:
    """Dispatch, copies and baselines by bytes; and a running session beside the copies."""
    records = read_table(path)
    models = list(dict.fromkeys(records["model"]))
    figure, axes = _pairs(len(models), 4)
    lines = (
        ("time of the dispatch", None, "o-", "dispatch"),
        ("time of the copy down", None, "o-", "copy down"),
        ("time of the copy up", None, "o-", "copy up"),
        ("time of a plain copy", "host-device", "k:", "one plain copy up"),
        ("time tensor by tensor", "host-device", "x--", "tensor by tensor, up"),
        ("time of the prefill again", None, "s--", "prefill again"),
    )
    for (left, right), model in zip(axes, models, strict=True):
        here = records[records["model"] == model]
        sizes = here[here["name"] == "bytes of the pages"]
        size_of = {(r["tokens"], r["stopped_in"]): r["value"] for _, r in sizes.iterrows()}
        for name, way, style, label in lines:
            ours = here[here["name"] == name]
            if way is not None:
                ours = ours[ours["way"] == way]
            points = sorted(
                (size_of[r["tokens"], r["stopped_in"]] / 1e6, r["value"])
                for _, r in ours.iterrows()
            )
            if points:
                left.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        left.set_xscale("log")
        left.set_yscale("log")
        left.set_xlabel("MB of pages")
        left.set_ylabel("ms")
        left.legend(fontsize=7)
        left.set_title(f"{model}: a stopped session out and back", fontsize=10)
        tokens = here[here["name"] == "time between tokens, mean of a round"]
        for place, (_, row) in enumerate(tokens.iterrows()):
            right.plot([place] * len(row["values"]), row["values"], "o", markersize=4)
        copied = here[here["name"] == "bytes copied a second"].set_index("beside")["value"]
        labels = [f"{arm}\n{copied[arm]:.1f} GB/s" for arm in tokens["beside"]]
        right.set_xticks(range(len(tokens)), labels)
        right.set_ylim(bottom=0)
        right.set_ylabel("ms between tokens, mean of a round")
        right.set_title(f"{model}: a session that runs, beside copies of another", fontsize=10)
    return figure


def concurrent(path: Path) -> Any:
    """Time between a runner's tokens by how many stand still; control calls as they were."""
    records = read_table(path)
    models = list(dict.fromkeys(records["model"]))
    figure, axes = _pairs(len(models), 3.8)
    for (left, right), model in zip(axes, models, strict=True):
        here = records[records["model"] == model]
        tokens = here[here["name"] == "time between tokens"]
        labels = [f"{int(count)}" for count in tokens["stopped"]]
        left.boxplot(list(tokens["values"]), showfliers=False, tick_labels=labels)
        two = here[here["name"] == "time between tokens beside a second process"]
        left.plot([], [], "k:", label="beside a second process of stock")
        for _, row in two[two["how"] == "at once"].iterrows():
            left.axhline(row["value"], color="k", linestyle=":", linewidth=0.8)
        left.set_ylim(bottom=0)
        left.set_xlabel("stopped sessions")
        left.set_ylabel("ms between tokens")
        left.legend(fontsize=7)
        left.set_title(f"{model}: a session that runs beside stopped ones", fontsize=10)
        calls = here[here["name"] == "time of a control call"]
        for _, row in calls.iterrows():
            label = f"engine {row['engine']}, {int(row['stopped'])} stopped"
            _shares(right, [us / 1e3 for us in row["values"]], label=label)
        right.set_xlabel("ms of a control call")
        right.set_ylabel("share of the calls")
        right.legend(fontsize=7)
        right.set_title(f"{model}: control calls", fontsize=10)
    return figure


def sleep_resume(path: Path) -> Any:
    """Agents on the device over time, and the parts of a wake as they were, of models that have
    agents."""
    records = read_table(path)
    models = list(dict.fromkeys(records[records["name"] == "time of a sample"]["model"]))
    figure, axes = _pairs(len(models), 3.8)
    for (left, right), model in zip(axes, models, strict=True):
        here = records[records["model"] == model]
        (seconds,) = here[here["name"] == "time of a sample"]["values"]
        for _, row in here[here["name"] == "agents on the device"].iterrows():
            left.plot(seconds, row["values"], label=row["part"])
        (count,) = here[here["name"] == "agents"]["value"]
        left.axhline(count, color="k", linestyle=":", linewidth=0.8, label="all agents")
        left.set_ylim(bottom=0)
        left.set_xlabel("seconds")
        left.set_ylabel("agents on the device")
        left.legend(fontsize=7)
        left.set_title(f"{model}: agents that act and think", fontsize=10)
        for _, row in here[here["name"] == "time of a wake"].iterrows():
            style = "-" if row["wake"] == "hint" else "--"
            label = f"{row['part']}, {row['wake']}"
            _shares(right, [max(ms, 1e-3) for ms in row["values"]], label=label, linestyle=style)
        right.set_xlabel("ms")
        right.set_ylabel("share of the wakes")
        right.legend(fontsize=7)
        right.set_title(f"{model}: parts of a wake", fontsize=10)
    return figure
