"""What a notebook's claim is judged by: criteria that must hold, and controls that must break them.

A *control* plants a fault and puts the figure it causes through the very criterion that passes
without it. A fault that changes no bit on this device proves nothing, so it is reported as one that
does not bite, and another of its kind must.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Comparison = Literal["==", "!=", "<=", ">=", "<", ">"]
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
Value = float | int | bool | str


class VerdictFailed(AssertionError):
    """A criterion or a control is not as it must be; the table says which."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """`value comparison limit` must be true. A NaN passes nothing."""

    name: str
    value: Value
    comparison: Comparison
    limit: Value
    unit: str = ""

    def __post_init__(self) -> None:
        if self.comparison not in _COMPARE:
            raise ValueError(f"{self.comparison!r} is none of {', '.join(_COMPARE)}")

    @property
    def passed(self) -> bool:
        return self.accepts(self.value)

    def accepts(self, value: Value) -> bool:
        """Would this value pass?"""
        if any(isinstance(v, float) and math.isnan(v) for v in (value, self.limit)):
            return False
        return bool(_COMPARE[self.comparison](value, self.limit))

    def line(self) -> dict[str, Any]:
        return {"kind": "criterion", **asdict(self), "passed": self.passed}


@dataclass(frozen=True, slots=True)
class Control:
    """A planted fault, the criterion it must break, and the figure it caused there.

    changed: elements whose bits the fault changed where it acts; 0: it does not bite here.
    group: controls of one group stand for each other when one does not bite.
    """

    name: str
    group: str
    criterion: str
    changed: int
    value: Value
    caught: bool

    @property
    def bites(self) -> bool:
        return self.changed > 0

    @property
    def outcome(self) -> str:
        if not self.bites:
            return "does not bite"
        return "caught" if self.caught else "NOT caught"

    def line(self) -> dict[str, Any]:
        return {"kind": "control", **asdict(self), "outcome": self.outcome}


@dataclass(frozen=True, slots=True)
class Unjudged:
    """What was not judged here: `not run` or `not applicable`, with the reason; never a pass."""

    name: str
    outcome: Literal["not run", "not applicable"]
    why: str

    def line(self) -> dict[str, Any]:
        return {"kind": "unjudged", **asdict(self)}


def failures(criteria: Sequence[Criterion], controls: Sequence[Control]) -> list[str]:
    """Why the claim does not stand, one line each; empty when it does."""
    lines = []
    if not criteria:
        lines.append("no criterion was judged")
    if not controls:
        lines.append("no control was run: nothing shows that the check can fail")
    for criterion in criteria:
        if not criterion.passed:
            lines.append(
                f"criterion '{criterion.name}': {show(criterion.value)} is not"
                f" {criterion.comparison} {show(criterion.limit)}"
            )
    for control in controls:
        if control.bites and not control.caught:
            lines.append(
                f"control '{control.name}' was not caught: '{control.criterion}' passes with"
                f" {show(control.value)} although {control.changed} elements were changed"
            )
    for group in sorted({control.group for control in controls}):
        if not any(c.bites for c in controls if c.group == group):
            lines.append(f"no control of the group '{group}' bites on this device and dtype")
    return lines


def table(
    criteria: Sequence[Criterion],
    controls: Sequence[Control],
    unjudged: Sequence[Unjudged] = (),
) -> str:
    """The verdict as plain text: criteria first, then controls, then what was not judged."""
    rows = [("criterion", "value", "must be", "")]
    for criterion in criteria:
        unit = f" {criterion.unit}" if criterion.unit else ""
        rows.append(
            (
                criterion.name,
                f"{show(criterion.value)}{unit}",
                f"{criterion.comparison} {show(criterion.limit)}",
                "pass" if criterion.passed else "FAIL",
            )
        )
    rows.append(("control (planted fault)", "value", "elements changed", ""))
    rows += [
        (control.name, show(control.value), show(control.changed), control.outcome)
        for control in controls
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    rule = "─" * max(len(line.rstrip()) for line in lines)
    split = len(criteria) + 1
    lines = [*lines[:split], rule, *lines[split:]]
    if unjudged:
        lines += [rule, *(f"{one.name}: {one.outcome} ({one.why})" for one in unjudged)]
    return "\n".join(line.rstrip() for line in lines)


def show(value: Value) -> str:
    """A figure for the table: exact when it is a count, four digits otherwise."""
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if type(value) is int else str(value)
    return f"{value:.4g}"
