"""Conditions as closures: what each sign computes, and how a literal is written.

Which parts a condition has, and that their kinds fit, is decided in `conditions` beforehand.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from kernel_server.protocol.condition_names import Key

Values = Mapping[Any, Any]
Run = Callable[[Values], Any]
#: (sign, operand, what to do when the operand is a zero divisor)
Step = tuple[str, Run, Callable[[], NoReturn]]
#: (how its value is asked for, if it is a variable or a function; its value in a tuple, if it is a
#: literal; its closure)
Operand = tuple[Key | None, tuple[Any] | None, Run]


def write(value: Any) -> str:
    """A literal as the language writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        return repr(value)
    names = {"\n": r"\n", "\t": r"\t", "\r": r"\r", "\\": r"\\", '"': r"\""}
    return '"' + "".join(names.get(c) or (c if c.isprintable() else _code(c)) for c in value) + '"'


def _code(char: str) -> str:
    number = ord(char)
    return f"\\x{number:02x}" if number < 256 else f"\\U{number:08x}"


COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def compare_run(sign: str, left: Operand, right: Operand) -> Run:
    """`left sign right`."""
    compare = COMPARISONS[sign]
    (name, _, one), (_, literal, two) = left, right
    if name is not None and literal is not None:
        # the usual condition; looked up without a call
        value = literal[0]
        if sign == "==":
            return lambda values: values[name] == value
        if sign == ">":
            return lambda values: values[name] > value
        return lambda values: compare(values[name], value)
    return lambda values: compare(one(values), two(values))


def sum_run(first: Run, rest: list[Step]) -> Run:
    """`first`, then + and - from left to right, in doubles."""
    terms = [(run, sign == "-") for sign, run, _ in rest]

    def run(values: Values) -> float:
        total = float(first(values))
        for term, minus in terms:
            total = total - term(values) if minus else total + term(values)
        return total

    return run


def product_run(first: Run, rest: list[Step]) -> Run:
    """`first`, then *, / and % from left to right, in doubles."""

    def run(values: Values) -> float:
        total = float(first(values))
        for sign, factor, by_zero in rest:
            number = factor(values)
            if sign == "*":
                total *= number
            elif number == 0:
                by_zero()
            else:
                total = total / number if sign == "/" else total % number
        return total

    return run


def all_run(parts: list[Run]) -> Run:
    """Whether every part holds; the first that does not decides."""
    if len(parts) == 2:
        one, two = parts
        return lambda values: one(values) and two(values)
    return lambda values: all(part(values) for part in parts)


def any_run(parts: list[Run]) -> Run:
    """Whether a part holds; the first that does decides."""
    if len(parts) == 2:
        one, two = parts
        return lambda values: one(values) or two(values)
    return lambda values: any(part(values) for part in parts)
