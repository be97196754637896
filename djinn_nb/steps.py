"""One action of a person, ready to be carried out, with the Python that repeats it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """One action, ready to be carried out. waits: until a session rests or a model is loaded."""

    label: str
    code: str
    run: Callable[[], Any]
    waits: bool = False


def words(given: dict[str, Any]) -> str:
    """Keywords as they are written in a call.

    >>> words({"scale": 0.5, "tokens": -1})
    'scale=0.5, tokens=-1'
    """
    return ", ".join(f"{name}={value!r}" for name, value in given.items())
