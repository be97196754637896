"""What happened to each session, and in what order: kept short, written out when asked for.

Entries of the common path are kept as they are and formatted on reading; requests are shortened
at once, so that no tensor and no long prompt is kept alive here.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from kernel_server.protocol.arrays import Array
from kernel_server.protocol.messages import ErrorInfo, Selector

#: Sessions that ended and can still be asked about.
KEPT_ENDED = 32


class Story:
    """The newest entries of each session."""

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._of: dict[str, deque[tuple[int, str, Any]]] = {}
        self._ended: deque[str] = deque()

    def note(self, session_id: str, number: int, name: str, detail: Any = "") -> None:
        """Add an entry; `number` is the event in whose course it happened."""
        kept = self._of.get(session_id)
        if kept is None:
            kept = self._of[session_id] = deque(maxlen=self._entries)
        kept.append((number, name, detail))

    def end(self, session_id: str) -> None:
        """The session is gone; its story is kept until others have ended after it."""
        self._ended.append(session_id)
        while len(self._ended) > KEPT_ENDED:
            self._of.pop(self._ended.popleft(), None)

    def lines(self, session_id: str) -> list[str]:
        """The story of a session, oldest first; empty when it has none."""
        return [
            f"{number} {name} {_text(detail)}".rstrip()
            for number, name, detail in self._of.get(session_id, ())
        ]


def brief(message: Any) -> str:
    """A message in one line: its fields that differ from their defaults, long ones shortened."""
    shown = []
    for name, spec in type(message).__dataclass_fields__.items():
        value = getattr(message, name)
        if name == "session_id" or value is None or value == spec.default:
            continue
        shown.append(f"{name}={_value(value)}")
    return ", ".join(shown)


def _value(value: Any) -> str:
    if isinstance(value, tuple) and len(value) > 8:
        return f"({', '.join(map(_value, value[:4]))}, … {len(value)} in all)"
    if isinstance(value, Array):
        return repr(value)
    if isinstance(value, ErrorInfo):
        return f"{value.code}: {value.message}"
    if isinstance(value, Selector) or hasattr(type(value), "__dataclass_fields__"):
        return f"{type(value).__name__}({brief(value)})"
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "…"


def _text(detail: Any) -> str:
    if isinstance(detail, str):
        return detail
    if isinstance(detail, dict):
        return ", ".join(f"{key}={_value(value)}" for key, value in detail.items())
    if hasattr(type(detail), "__dataclass_fields__"):
        return brief(detail)
    return str(detail)
