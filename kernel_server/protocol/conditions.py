"""The language of breakpoint conditions: parser, type check, evaluator. All our own.

A condition is data: it is parsed here, once, into closures, and never reaches Python's `eval`. It
is judged for each token fed at the breakpoint's location; who supplies the variables, and what
follows when it holds, is decided elsewhere::

    token == " to" and norm > 30          position % 2 == 0 or token_id in (464, 318)
    not (forward < 4 and hits == 0)       norm / 2 >= position + 10

    or  and  not      truth values; `and` and `or` stop at the first side that decides
    == !=             two texts, two numbers or two truth values
    < <= > >=         two numbers; not chained
    in, not in        a list of literals of one kind, in parentheses
    + - * / %         numbers, computed as doubles; `%` takes the sign of its right side
    prob(" Mary")     what the logit lens gives this token; cosine("joy"), with a named vector

A number that is NaN compares false, except with `!=`. Dividing by zero raises.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kernel_server.protocol.condition_closures import Run, Values
from kernel_server.protocol.condition_names import FUNCTIONS, LENS_NAMES, NAMES
from kernel_server.protocol.condition_parser import MAX_DEPTH, Parser, short
from kernel_server.protocol.errors import BadCondition

__all__ = [
    "FUNCTIONS",
    "LENS_NAMES",
    "MAX_DEPTH",
    "MAX_LENGTH",
    "NAMES",
    "Condition",
    "parse_condition",
]

MAX_LENGTH = 2000


@dataclass(frozen=True, slots=True)
class Condition:
    """A parsed condition; `str(condition)` is its canonical text.

    names: the variables and functions it reads. token_texts: the texts it compares with those of
    tokens, in order, so that one no token of the vocabulary has can be warned about.
    prob_texts, vectors: the texts that `prob` and `cosine` are called with.
    """

    text: str
    names: frozenset[str] = field(compare=False)
    token_texts: tuple[str, ...] = field(compare=False)
    prob_texts: tuple[str, ...] = field(compare=False)
    vectors: tuple[str, ...] = field(compare=False)
    canonical: str = field(compare=False, repr=False)
    _run: Run = field(compare=False, repr=False)

    def holds(self, values: Values) -> bool:
        """Whether it holds for one token, given at least the variables in `names`; the values of
        functions are found under `(name, text)`.

        Raises `BadCondition` where it divides by zero.
        """
        return bool(self._run(values))

    def __str__(self) -> str:
        return self.canonical

    def __reduce__(self) -> tuple[Any, ...]:
        return (parse_condition, (self.text,))


def parse_condition(text: str) -> Condition:
    """Parse a condition, or raise `BadCondition` with a caret under the mistake.

    >>> condition = parse_condition('token == " to" and norm > 30')
    >>> condition.holds({"token": " to", "norm": 31.5})
    True
    """
    if not isinstance(text, str):
        raise BadCondition(f"a condition is a text such as 'norm > 30', not {short(repr(text))}")
    if len(text) > MAX_LENGTH:
        raise BadCondition(
            f"the condition has {len(text)} characters; at most {MAX_LENGTH} are allowed"
        )
    parser = Parser(text)
    node = parser.condition()
    return Condition(
        text,
        frozenset(parser.names),
        tuple(parser.token_texts),
        tuple(parser.calls["prob"]),
        tuple(parser.calls["cosine"]),
        node.text,
        node.run,
    )
