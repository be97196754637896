"""How a message is made and told apart: the registry that the codec reads."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, TypeVar, dataclass_transform

PROTOCOL_VERSION = 1

#: name -> class, for every message and every part of one
MESSAGES: dict[str, type[Any]] = {}

_T = TypeVar("_T", bound=type)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def message(cls: _T) -> _T:
    """Make `cls` a frozen keyword-only dataclass and register it with the codec."""
    made: Any = dataclass(frozen=True, slots=True, kw_only=True)(cls)
    MESSAGES[cls.__name__] = made
    return made  # type: ignore[no-any-return]


@cache
def contract_digest() -> str:
    """Short hash of every message's fields and types: equal where both sides mean the same."""
    shapes = [
        f"{name}({', '.join(f'{f.name}: {f.type}' for f in fields(cls))})"
        for name, cls in sorted(MESSAGES.items())
    ]
    return hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:12]
