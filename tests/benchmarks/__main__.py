"""`make bench`: every benchmark, its figures against their limits, and a record of them.

    python -m tests.benchmarks [--only forwards|control|wire|checks] [--repetitions N] [--write]

With --write the record goes to notebooks/results/<hardware>/benchmarks.json, of which the README's
table is made. Exits 1 when a figure misses its limit: a missed figure is shown, not hidden.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from notebooks.harness import hardware
from tests.benchmarks import checks, control, forwards, wire

RESULTS = Path(__file__).parents[2] / "notebooks" / "results"

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("--only", choices=sorted(_PARTS), action="append")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--write", action="store_true", help="keep the record for the README")
    options = parser.parse_args()
    rows: list[Row] = []
    for name in options.only or _PARTS:
        print(f"{name} …", file=sys.stderr, flush=True)
        rows += _PARTS[name](options.repetitions)
    _print(rows)
    if options.write:
        _write(rows)
    return 0 if all(row["passed"] for row in rows) else 1


def _forwards(repetitions: int) -> list[Row]:
    found = forwards.measure(repetitions)
    rows = [
        _row(f"{name}, ÷ stock", found["ratio"][name], "×", "<=", 1.15, repetitions)
        for name in found["ratio"]
        if "unhit" not in name
    ]
    rows += [
        _row(f"{name}, more per forward", spread, "µs", None, None, repetitions)
        for name, spread in found["difference_us"].items()
        if "unhit" in name
    ]
    return rows


def _checks(repetitions: int) -> list[Row]:
    found = checks.measure(repetitions)
    return [
        _row(f"4 armed, unhit conditions ({name.split(', ')[1]})", spread, "µs", "<=", 20.0,
             repetitions)
        for name, spread in found["us"].items()
        if name.startswith("four checks")
    ]  # fmt: skip


def _control(repetitions: int) -> list[Row]:
    us = control.measure(repetitions)["us"]
    idle, busy, beside = us["idle"], us["computing"], us["beside a computing process"]
    calls = repetitions * control.CALLS
    return [
        _plain("control call while computing, p50 ÷ idle", busy["p50"] / idle["p50"], 2.0, calls),
        _plain(
            "control call while computing, p99 ÷ beside a computing process",
            busy["p99"] / beside["p99"], 3.0, calls,
        ),
        *(
            _row(f"control call, {name}, p50 to p99",
                 {"median": each["p50"], "q1": each["p50"], "q3": each["p99"]}, "µs", None, None,
                 calls)
            for name, each in us.items()
        ),
    ]  # fmt: skip


def _wire(repetitions: int) -> list[Row]:
    rates = wire.measure(repetitions)["rate_to_bare_rpyc"]
    return [
        _row(f"20 MiB {name}, rate ÷ bare rpyc", spread, "×", ">=", 0.8, repetitions)
        for name, spread in rates.items()
        if name.startswith("chunks")
    ]


_PARTS = {"forwards": _forwards, "checks": _checks, "control": _control, "wire": _wire}


def _row(
    name: str,
    spread: dict[str, float],
    unit: str,
    comparison: str | None,
    limit: float | None,
    repetitions: int,
) -> Row:
    value = spread["median"]
    passed = True
    if comparison is not None and limit is not None:
        passed = value <= limit if comparison == "<=" else value >= limit
    return {
        "name": name,
        "value": value,
        "low": spread["q1"],
        "high": spread["q3"],
        "unit": unit,
        "comparison": comparison,
        "limit": limit,
        "repetitions": repetitions,
        "passed": passed,
    }


def _plain(name: str, value: float, limit: float, repetitions: int) -> Row:
    rounded = round(value, 3)
    spread = {"median": rounded, "q1": rounded, "q3": rounded}
    return _row(name, spread, "×", "<=", limit, repetitions)


def _print(rows: list[Row]) -> None:
    print(f"{'':4}  {'benchmark':<66} {'median':>9}  {'quartiles':>19}  limit")
    for row in rows:
        mark = "ok" if row["passed"] else "MISS"
        if row["comparison"] is None:
            mark = ""
        quartiles = f"{row['low']:.4g} – {row['high']:.4g}"
        limit = f"{row['comparison']} {row['limit']}" if row["comparison"] else ""
        value = f"{row['value']:.4g}"
        print(f"{mark:4}  {row['name']:<66} {value:>9}  {quartiles:>19}  {limit} {row['unit']}")


def _write(rows: list[Row]) -> None:
    about = hardware.describe("cpu")
    record = {
        "format": 1,
        "hardware": about,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "benchmarks": rows,
    }
    folder = RESULTS / about["slug"]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as draft:
        json.dump(record, draft, indent=2)
    Path(draft.name).replace(folder / "benchmarks.json")
    print(f"written to {(folder / 'benchmarks.json').relative_to(RESULTS.parents[1])}")


if __name__ == "__main__":
    sys.exit(main())
