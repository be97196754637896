"""Raw records as JSON lines: what was measured, in which unit, by what, how often.

One file per notebook and hardware. Line 1 is the header; then `record`, `criterion` and `control`
lines in the order they came; a `verdict` line last. Figures and tables are made from these files
alone, so whoever has the file can draw them again.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

FORMAT = 1

Source = Literal["wall clock", "CUDA event", "NVML", "allocator", "count"]
SOURCES: tuple[Source, ...] = ("wall clock", "CUDA event", "NVML", "allocator", "count")


@dataclass(frozen=True, slots=True)
class Record:
    """One measured quantity: all its repetitions, and the conditions they were made under."""

    name: str
    values: tuple[float, ...]
    unit: str
    source: Source
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile: the spread."""
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return low, high

    def line(self) -> dict[str, Any]:
        return {
            "kind": "record",
            "name": self.name,
            "value": self.median,
            "unit": self.unit,
            "source": self.source,
            "repetitions": len(self.values),
            "spread": list(self.quartiles),
            "values": list(self.values),
            "conditions": self.conditions,
        }


def make_record(
    name: str, values: float | list[float], unit: str, source: Source, conditions: dict[str, Any]
) -> Record:
    """Check and make a record; raises ValueError for no value, a NaN or an unknown source."""
    given = tuple(values) if isinstance(values, list | tuple) else (values,)
    if not given:
        raise ValueError(f"record {name!r} has no value")
    if source not in SOURCES:
        raise ValueError(f"record {name!r}: source {source!r} is none of {', '.join(SOURCES)}")
    if bad := [v for v in given if math.isnan(v)]:
        raise ValueError(f"record {name!r}: {len(bad)} of {len(given)} values are not a number")
    return Record(name, tuple(given), unit, source, conditions)


class RecordFile:
    """The file of one run, written line by line so that a run that dies leaves what it had."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self.append({"kind": "header", "format": FORMAT, **header})

    def append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every line of a record file, header first."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def read_table(path: Path, name: str | None = None) -> Any:
    """The records of a file as a DataFrame, one column per condition; only `name` if given."""
    import pandas as pd

    rows = [
        {k: v for k, v in line.items() if k not in ("kind", "conditions")} | line["conditions"]
        for line in read_lines(path)
        if line["kind"] == "record" and name in (None, line["name"])
    ]
    return pd.DataFrame(rows)
