"""One run of an evaluation notebook: its claim, records, criteria, controls and verdict.

The notebook decides what is measured and what must hold; this file writes it down and judges. What
the record file looks like is decided in `records`, what makes a verdict in `verdict`.
"""

from __future__ import annotations

import datetime
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from notebooks.harness import hardware, records
from notebooks.harness.records import RecordFile, Source, make_record
from notebooks.harness.verdict import (
    Comparison,
    Control,
    Criterion,
    Unjudged,
    Value,
    VerdictFailed,
    failures,
    table,
)


class Run:
    """Write down what a notebook measures and judge its claim.

    notebook: its file name without the ending. claim: one sentence that can be false.
    size: `smoke` (CPU) or `full` (one GPU). results: the folder that holds a folder per hardware;
    None: a temporary one, so that a run in passing never replaces a kept record.

        run = Run("01_resume_is_exact", claim="Stopping changes no bit.", size="smoke")
        run.require("logits that differ", 0, "==", 0)
        run.control("a zeroed page", criterion="logits that differ", changed=512, value=4096)
        run.verdict()
    """

    def __init__(
        self, notebook: str, claim: str, size: str, results: str | Path | None = None
    ) -> None:
        self.notebook = notebook
        self.claim = claim
        self.size = size
        self.device = hardware.device_for(size)
        self.hardware = hardware.describe(self.device)
        self.criteria: list[Criterion] = []
        self.controls: list[Control] = []
        self.unjudged: list[Unjudged] = []
        folder = Path(results) if results is not None else Path(tempfile.mkdtemp(prefix="djinn-"))
        self._began = time.monotonic()
        self._file = RecordFile(
            folder / self.hardware["slug"] / f"{notebook}.jsonl",
            {
                "notebook": notebook,
                "claim": claim,
                "size": size,
                "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
                "hardware": self.hardware,
            },
        )

    @property
    def path(self) -> Path:
        """The record file."""
        return self._file.path

    @property
    def full(self) -> bool:
        return self.size == "full"

    def record(
        self,
        name: str,
        values: float | list[float],
        unit: str,
        source: Source,
        **conditions: Any,
    ) -> float:
        """Write one measured quantity with all its repetitions; returns the median.

        source: `wall clock`, `CUDA event`, `NVML`, `allocator` or `count`.
        """
        made = make_record(name, values, unit, source, conditions)
        self._file.append(made.line())
        return made.median

    def table(self, name: str | None = None) -> Any:
        """The records written so far, read back from the file, as a DataFrame."""
        return records.read_table(self.path, name)

    def require(
        self, name: str, value: Value, comparison: Comparison, limit: Value, unit: str = ""
    ) -> bool:
        """State a criterion with its value; judged by `verdict`. Returns whether it holds."""
        if any(known.name == name for known in self.criteria):
            raise ValueError(f"criterion {name!r} is stated twice")
        criterion = Criterion(name, value, comparison, limit, unit)
        self.criteria.append(criterion)
        return criterion.passed

    def control(
        self, name: str, *, criterion: str, changed: int, value: Value, group: str | None = None
    ) -> bool:
        """Put the figure a planted fault caused through a criterion; it must not pass.

        criterion: name of one stated before. changed: elements whose bits the fault changed where
        it acts (0: it does not bite here). value: what the check measured with the fault in place.
        group: controls that stand for each other when one does not bite; its own name otherwise.
        """
        judge = next((known for known in self.criteria if known.name == criterion), None)
        if judge is None:
            raise ValueError(f"control {name!r}: no criterion is named {criterion!r}")
        control = Control(name, group or name, criterion, changed, value, not judge.accepts(value))
        self.controls.append(control)
        return control.caught

    def leave_open(
        self, name: str, outcome: Literal["not run", "not applicable"], why: str
    ) -> None:
        """Say of a criterion or baseline that it was not judged here, and why."""
        self.unjudged.append(Unjudged(name, outcome, why))

    def verdict(self) -> None:
        """Print the table, write it to the record file, and raise VerdictFailed if need be."""
        wrong = failures(self.criteria, self.controls)
        verdict = "fail" if wrong else "pass"
        for criterion in self.criteria:
            self._file.append(criterion.line())
        for control in self.controls:
            self._file.append(control.line())
        for one in self.unjudged:
            self._file.append(one.line())
        seconds = round(time.monotonic() - self._began, 1)
        self._file.append({"kind": "verdict", "verdict": verdict, "why": wrong, "seconds": seconds})
        print(self.claim)
        print()
        print(table(self.criteria, self.controls, self.unjudged))
        print()
        print(f"{verdict.upper()} on {self.hardware['name']}, size {self.size}, {seconds} s")
        if wrong:
            raise VerdictFailed("; ".join(wrong))
