"""Write the contract's plain data as TypeScript types: `extension/src/protocol.ts`.

`python -m kernel_server.protocol.typescript` writes the file, `--check` compares it. What a
snapshot says is decided in `snapshot`; this file only spells its dataclasses, and the words they
draw on, in the other language. A type it has no spelling for is an error, never `any`.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from kernel_server.protocol import location, messages, snapshot

#: Where the extension keeps it, in a checkout.
TARGET = Path(__file__).parents[2] / "extension" / "src" / "protocol.ts"
_AGAIN = "python -m kernel_server.protocol.typescript"
_PLAIN = {str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}
#: Words with a name of their own.
_WORDS: dict[str, Any] = {
    "Status": messages.Status,
    "Reason": messages.Reason,
    "When": messages.When,
    "BreakpointKind": messages.BreakpointKind,
    "Connection": snapshot.Connection,
    "Level": snapshot.Level,
    "Outcome": snapshot.Outcome,
    "Tier": snapshot.Tier,
}
_NAMES = {hint: name for name, hint in _WORDS.items()}
#: Lists that the extension needs at run time.
_LISTS = {"LAYER_SITES": location.LAYER_SITES, "OUTER_SITES": location.OUTER_SITES}


def protocol_ts() -> str:
    """The whole file.

    >>> "export interface Snapshot {" in protocol_ts()
    True
    """
    parts = [
        f"// Generated from kernel_server.protocol; do not edit. To make it anew:\n//   {_AGAIN}",
        *(_words(name, hint) for name, hint in _WORDS.items()),
        *(_list(name, values) for name, values in _LISTS.items()),
        *(_interface(shape) for shape in _shapes()),
    ]
    return "\n\n".join(parts) + "\n"


def type_of(hint: Any) -> str:
    """A Python type in TypeScript. Raises TypeError for one that has no spelling here.

    >>> type_of(tuple[str, ...] | None)
    'readonly string[] | null'
    """
    if hint in _NAMES:
        return _NAMES[hint]
    if hint in _PLAIN:
        return _PLAIN[hint]
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint.__name__
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(_text(word) for word in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_of(one) for one in arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        inner = type_of(arguments[0])
        return f"readonly ({inner})[]" if " " in inner else f"readonly {inner}[]"
    raise TypeError(f"{hint!r} has no spelling in TypeScript: add one to type_of")


def _shapes() -> list[type]:
    """The dataclasses of `snapshot`, in its order: each stands before those that hold it."""
    found = vars(snapshot).values()
    return [
        one
        for one in found
        if isinstance(one, type)
        and dataclasses.is_dataclass(one)
        and one.__module__ == snapshot.__name__
    ]


def _interface(shape: type) -> str:
    hints = typing.get_type_hints(shape)
    notes = dict(_notes(shape))
    lines = [_comment(inspect.getdoc(shape) or "", ""), f"export interface {shape.__name__} {{"]
    for field in dataclasses.fields(shape):
        if note := notes.get(field.name):
            lines.append(_comment(note, "  "))
        lines.append(f"  readonly {field.name}: {type_of(hints[field.name])};")
    return "\n".join([*lines, "}"])


def _notes(shape: type) -> Iterator[tuple[str, str]]:
    """What the `#:` lines above a field say of it."""
    note: list[str] = []
    for line in inspect.getsource(shape).splitlines():
        text = line.strip()
        if text.startswith("#:"):
            note.append(text.removeprefix("#:").strip())
            continue
        name, separator, _ = text.partition(":")
        if note and separator and name.isidentifier():
            yield name, " ".join(note)
        note = []


def _words(name: str, hint: Any) -> str:
    lines = [f"  | {_text(word)}" for word in typing.get_args(hint)]
    return "\n".join([f"export type {name} =", *lines]) + ";"


def _list(name: str, values: tuple[str, ...]) -> str:
    lines = ",\n".join(f"  {_text(value)}" for value in values)
    return f"export const {name}: readonly string[] = [\n{lines}\n];"


def _text(word: str) -> str:
    return f"'{word}'"


def _comment(text: str, indent: str) -> str:
    lines = text.splitlines()
    if len(lines) == 1:
        return f"{indent}/** {lines[0]} */"
    inner = "\n".join(f"{indent} * {line}".rstrip() for line in lines)
    return f"{indent}/**\n{inner}\n{indent} */"


def main(arguments: list[str] | None = None) -> int:
    """Write the file; with --check, compare it: exit status 1 if it would be another."""
    parser = argparse.ArgumentParser(prog=_AGAIN, description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("path", nargs="?", type=Path, default=TARGET, help="the file")
    chosen = parser.parse_args(arguments)
    wanted = protocol_ts()
    if not chosen.check:
        if not chosen.path.parent.is_dir():
            print(f"{chosen.path.parent} is not there: run this in a checkout", file=sys.stderr)
            return 1
        chosen.path.write_text(wanted, encoding="utf-8")
        return 0
    if chosen.path.is_file() and chosen.path.read_text(encoding="utf-8") == wanted:
        return 0
    print(f"{chosen.path.name} is not what the contract says: run {_AGAIN}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
