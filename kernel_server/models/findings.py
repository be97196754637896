"""What one question of a load check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: the worst value met, what was allowed, and where it was."""

    name: str
    value: float
    tolerance: float
    where: str = ""

    @property
    def passed(self) -> bool:
        return self.value <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the protocol."""
        return {
            "name": self.name,
            "value": self.value,
            "tolerance": self.tolerance,
            "where": self.where,
            "passed": self.passed,
        }
