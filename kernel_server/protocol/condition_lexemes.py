"""Conditions as lexemes, and where in the text a mistake is: the letters of the language.

What the lexemes mean together is decided in `conditions`.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from kernel_server.protocol.errors import BadCondition

#: the largest whole number up to which a double holds every one
MAX_INTEGER = 2**53

_FOREIGN = {"&&": "and", "||": "or", "!": "not", "=": "==", "&": "and", "|": "or", "<>": "!="}
_CODE = {".": "attributes", "[": "indexing", "{": "braces", ":": "colons", ";": "statements"}
_LEXEME = re.compile(
    r"(?P<space>\s+)"
    r"|(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|(?P<name>[^\W\d]\w*)"
    r"|(?P<operator>==|!=|<=|>=|<>|&&|\|\||\*\*|//|[-+*/%<>(),=&|!.\[\]{}:;])",
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
_WINDOW = 72


# --- showing where --------------------------------------------------------------------------------


def caret(text: str, start: int, end: int, line: str) -> str:
    """`line`, then the part of the condition around `start:end` with carets under it."""
    first = text.rfind("\n", 0, start) + 1
    last = text.find("\n", start)
    last = len(text) if last < 0 else last
    end = max(min(end, last), start + 1)
    lead = tail = ""
    if last - first > _WINDOW:
        low = max(first, min(start - _WINDOW // 3, last - _WINDOW))
        high = min(last, low + _WINDOW)
        lead, tail = "…" if low > first else "", "…" if high < last else ""
        first, last, end = low, high, max(min(end, high), start + 1)
    shown = "".join(c if c.isprintable() else " " for c in text[first:last])
    before, under = shown[: start - first], shown[start - first : end - first]
    carets = "^" * max(_width(under), 1)
    return f"{line}\n  {lead}{shown}{tail}\n  {' ' * (len(lead) + _width(before))}{carets}"


def _width(text: str) -> int:
    """Columns in a terminal."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)


def refuse(text: str, start: int, end: int, line: str) -> NoReturn:
    raise BadCondition(caret(text, start, end, line), condition=text, start=start, end=end)


# --- tokenizer ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lexeme:
    kind: Literal["number", "text", "name", "operator", "end"]
    value: Any
    start: int
    end: int


def lexemes(text: str) -> list[Lexeme]:
    made: list[Lexeme] = []
    at = 0
    while at < len(text):
        if text[at] in "'\"":
            made.append(_text_literal(text, at))
            at = made[-1].end
            continue
        found = _LEXEME.match(text, at)
        if found is None:
            refuse(text, at, at + 1, f"unexpected character {text[at]!r}")
        kind, value = found.lastgroup, found.group()
        if kind == "number":
            made.append(Lexeme("number", _number(text, value, at, found.end()), at, found.end()))
        elif kind == "name":
            made.append(Lexeme("name", value, at, found.end()))
        elif kind == "operator":
            _refuse_foreign(text, value, at, found.end())
            made.append(Lexeme("operator", value, at, found.end()))
        at = found.end()
    return [*made, Lexeme("end", None, len(text), len(text))]


def _refuse_foreign(text: str, value: str, start: int, end: int) -> None:
    if value in _FOREIGN:
        refuse(text, start, end, f"unexpected {value!r}, did you mean {_FOREIGN[value]!r}?")
    if value in _CODE:
        refuse(text, start, end, f"unexpected {value!r}: a condition has no {_CODE[value]}")


def _number(text: str, digits: str, start: int, end: int) -> int | float:
    follows = text[end : end + 1]
    if follows.isalnum() or follows == "_":
        refuse(text, start, end + 1, f"{text[start : end + 1]!r} is not a number")
    if not digits.isascii():
        refuse(text, start, end, "numbers are written with the digits 0 to 9")
    # the length is looked at first: int() of a long text is slow, and refused by Python itself
    if digits.isdigit() and (len(digits) > 100 or int(digits) > MAX_INTEGER):
        line = f"a whole number here is at most {MAX_INTEGER}, where doubles stop being exact"
        refuse(text, start, end, line)
    value = int(digits) if digits.isdigit() else float(digits)
    if not math.isfinite(value):
        refuse(text, start, end, "the number is too large for a double (1.8e308)")
    return value


def _text_literal(text: str, start: int) -> Lexeme:
    quote, at = text[start], start + 1
    parts: list[str] = []
    while True:
        char = text[at : at + 1]
        if char in ("", "\n"):
            line = f"the text is not closed: a {quote} is missing"
            refuse(text, start, at, line if not char else f"{line} (a new line is written \\n)")
        if char == quote:
            return Lexeme("text", "".join(parts), start, at + 1)
        if char != "\\":
            parts.append(char)
            at += 1
            continue
        value, at = _escape(text, at)
        parts.append(value)


def _escape(text: str, at: int) -> tuple[str, int]:
    """The character an escape at `at` stands for, and where the text goes on."""
    letter = text[at + 1 : at + 2]
    if letter in _ESCAPES:
        return _ESCAPES[letter], at + 2
    size = {"x": 2, "u": 4, "U": 8}.get(letter, 0)
    digits = text[at + 2 : at + 2 + size]
    if size and re.fullmatch(f"[0-9a-fA-F]{{{size}}}", digits):
        number = int(digits, 16)
        # halves of a pair are not characters: no token text holds one
        if number < 0x110000 and not 0xD800 <= number < 0xE000:
            return chr(number), at + 2 + size
    known = r"\n \t \r \\ \' \" \xHH \uHHHH \UHHHHHHHH"
    refuse(text, at, at + 2 + size, f"unknown escape; the known ones are {known}")
