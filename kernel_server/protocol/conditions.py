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

A number that is NaN compares false, except with `!=`. Dividing by zero raises.
"""

from __future__ import annotations

import difflib
import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from kernel_server.protocol.condition_closures import (
    COMPARISONS,
    Operand,
    Run,
    Step,
    Values,
    all_run,
    any_run,
    compare_run,
    product_run,
    sum_run,
    write,
)
from kernel_server.protocol.condition_lexemes import Lexeme, caret, lexemes, refuse
from kernel_server.protocol.errors import BadCondition, NotSupported

Kind = Literal["text", "number", "truth value"]

#: name -> what it is, for every variable of a condition
NAMES: dict[str, Kind] = {
    "token": "text",
    "token_id": "number",
    "position": "number",
    "forward": "number",
    "norm": "number",
    "hits": "number",
}
#: names of the logit lens: planned, and refused by name until then
PLANNED_NAMES = ("top_token", "entropy", "prob")

MAX_LENGTH = 2000
MAX_DEPTH = 50


_WORDS = ("and", "or", "not", "in", "true", "false")
_PYTHON_WORDS = {"True": "true", "False": "false", "AND": "and", "OR": "or", "NOT": "not"}


# --- tree -----------------------------------------------------------------------------------------

_OR, _AND, _NOT, _COMPARE, _SUM, _PRODUCT, _MINUS, _ATOM = range(8)


@dataclass(frozen=True, slots=True)
class _Node:
    """Part of a condition: what it is, how tightly it binds, its canonical text, its closure."""

    kind: Kind
    binds: int
    text: str
    run: Run
    start: int
    end: int
    #: a literal's value, when it is one
    literal: tuple[Any] | None = None
    name: str | None = None

    @property
    def operand(self) -> Operand:
        return self.name, self.literal, self.run

    def inside(self, binds: int) -> str:
        """Its text as an operand of something that binds as tightly as `binds`."""
        return self.text if self.binds >= binds else f"({self.text})"


# --- parser ---------------------------------------------------------------------------------------


class _Parser:
    """Recursive descent, one method per strength of binding; chains are loops, not recursion."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lexemes = lexemes(text)
        self.at = 0
        self.depth = 0
        self.names: set[str] = set()
        self.token_texts: dict[str, None] = {}

    # looking

    @property
    def next(self) -> Lexeme:
        return self.lexemes[self.at]

    def sees(self, *values: str) -> bool:
        return self.next.kind in ("operator", "name") and self.next.value in values

    def take(self) -> Lexeme:
        lexeme = self.next
        self.at += 1
        return lexeme

    def refuse(self, where: Lexeme | _Node, line: str) -> NoReturn:
        refuse(self.text, where.start, where.end, line)

    def deeper(self, lexeme: Lexeme) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.refuse(lexeme, f"nested deeper than {MAX_DEPTH} levels")

    def need(self, node: _Node, kind: Kind, what: str) -> None:
        if node.kind == kind:
            return
        here = _short(self.text[node.start : node.end])
        hint = ""
        if kind == "truth value":
            compared = 'token == " to"' if node.kind == "text" else "norm > 30"
            hint = f"; compare it with something, as in {compared}"
        self.refuse(node, f"{what} a {kind}, and {here} is a {node.kind}{hint}")

    # parsing

    def condition(self) -> _Node:
        if self.next.kind == "end":
            self.refuse(self.next, "the condition is empty; write a comparison, as in norm > 30")
        node = self.any()
        left = self.next
        if left.kind != "end":
            if left.value == ")":
                self.refuse(left, "unexpected ')': no '(' is open")
            self.refuse(left, f"unexpected {_shown(left)} after the end of the condition")
        self.need(node, "truth value", "a condition is")
        return node

    def any(self) -> _Node:
        return self.chain("or", _OR, self.all, any_run)

    def all(self) -> _Node:
        return self.chain("and", _AND, self.negation, all_run)

    def chain(
        self, word: str, binds: int, part: Callable[[], _Node], join: Callable[[list[Run]], Run]
    ) -> _Node:
        parts = [part()]
        while self.sees(word):
            self.take()
            parts.append(part())
        if len(parts) == 1:
            return parts[0]
        for node in parts:
            self.need(node, "truth value", f"each side of '{word}' is")
        text = f" {word} ".join(node.inside(binds + 1) for node in parts)
        run = join([node.run for node in parts])
        return _Node("truth value", binds, text, run, parts[0].start, parts[-1].end)

    def negation(self) -> _Node:
        if not self.sees("not"):
            return self.comparison()
        word = self.take()
        self.deeper(word)
        node = self.negation()
        self.depth -= 1
        self.need(node, "truth value", "what follows 'not' is")
        inner = node.run
        return _Node(
            "truth value",
            _NOT,
            f"not {node.inside(_NOT)}",
            lambda values: not inner(values),
            word.start,
            node.end,
        )

    def comparison(self) -> _Node:
        left = self.sum()
        if self.sees("in", "not"):
            node = self.membership(left)
        elif self.sees(*COMPARISONS):
            sign = self.take().value
            right = self.sum()
            self.comparable(left, sign, right)
            self.note_text(left, right)
            text = f"{left.inside(_SUM)} {sign} {right.inside(_SUM)}"
            run = compare_run(sign, left.operand, right.operand)
            node = _Node("truth value", _COMPARE, text, run, left.start, right.end)
        else:
            return left
        if self.sees(*COMPARISONS, "in"):
            self.refuse(self.next, "comparisons are not chained; write a < b and b < c")
        return node

    def comparable(self, left: _Node, sign: str, right: _Node) -> None:
        both = _Node("truth value", _COMPARE, "", left.run, left.start, right.end)
        if left.kind != right.kind:
            self.refuse(
                both,
                f"cannot compare a {left.kind} with a {right.kind}"
                f" ({_short(self.text[left.start : left.end])} is a {left.kind})",
            )
        if left.kind != "number" and sign not in ("==", "!="):
            self.refuse(both, f"'{sign}' compares numbers; these are {left.kind}s (use == or !=)")

    def membership(self, left: _Node) -> _Node:
        word = self.take()
        negated = word.value == "not"
        if negated:
            if not self.sees("in"):
                self.refuse(word, "unexpected 'not' here; 'not in' or '!=' compare")
            self.take()
        if left.kind == "truth value":
            self.refuse(left, "'in' looks for a text or a number, and this is a truth value")
        items, end = self.literals(left)
        members, find = frozenset(items), left.run
        listed = ", ".join(map(write, items))
        text = f"{left.inside(_SUM)} {'not in' if negated else 'in'} ({listed})"
        if negated:
            return _Node(
                "truth value", _COMPARE, text, lambda v: find(v) not in members, left.start, end
            )
        return _Node("truth value", _COMPARE, text, lambda v: find(v) in members, left.start, end)

    def literals(self, left: _Node) -> tuple[list[Any], int]:
        if not self.sees("("):
            self.refuse(self.next, "'in' is followed by literals in parentheses, as in (1, 2)")
        opened = self.take()
        items: list[Any] = []
        while True:
            item = self.unary()
            if item.literal is None:
                self.refuse(item, "the list of 'in' holds literals only")
            if item.kind != left.kind:
                self.refuse(item, f"this is a {item.kind}, and a {left.kind} is looked for")
            if left.name == "token":
                self.token_texts[item.literal[0]] = None
            items.append(item.literal[0])
            if self.sees(","):
                self.take()
                if not self.sees(")"):
                    continue
            if not self.sees(")"):
                self.refuse(opened, "this '(' is not closed")
            return items, self.take().end

    def sum(self) -> _Node:
        return self.arithmetic(("+", "-"), _SUM, self.product, sum_run)

    def product(self) -> _Node:
        return self.arithmetic(("*", "/", "%"), _PRODUCT, self.unary, product_run)

    def arithmetic(
        self,
        signs: tuple[str, ...],
        binds: int,
        part: Callable[[], _Node],
        join: Callable[[Run, list[Step]], Run],
    ) -> _Node:
        first = part()
        if not self.sees(*signs):
            return first
        self.need(first, "number", f"each side of '{self.next.value}' is")
        text, end = first.inside(binds), first.end
        rest: list[Step] = []
        while self.sees(*signs):
            sign = self.take().value
            node = part()
            self.need(node, "number", f"each side of '{sign}' is")
            # of the same strength only the first operand stands without parentheses
            text += f" {sign} {node.inside(binds + 1)}"
            by_zero = functools.partial(
                refuse, self.text, node.start, node.end, "division by zero: this is 0 here"
            )
            rest.append((sign, node.run, by_zero))
            end = node.end
        run = join(first.run, rest)
        return _Node("number", binds, text, run, first.start, end)

    def unary(self) -> _Node:
        if not self.sees("-"):
            return self.atom()
        sign = self.take()
        self.deeper(sign)
        node = self.unary()
        self.depth -= 1
        self.need(node, "number", "what follows '-' is")
        if node.literal is not None:
            return self.constant("number", -node.literal[0], sign.start, node.end)
        inner = node.run
        return _Node(
            "number",
            _MINUS,
            f"-{node.inside(_MINUS)}",
            lambda values: -inner(values),
            sign.start,
            node.end,
        )

    def atom(self) -> _Node:
        lexeme = self.take()
        if lexeme.kind == "number":
            return self.constant("number", lexeme.value, lexeme.start, lexeme.end)
        if lexeme.kind == "text":
            return self.constant("text", lexeme.value, lexeme.start, lexeme.end)
        if lexeme.kind == "operator" and lexeme.value == "(":
            return self.parenthesised(lexeme)
        if lexeme.kind == "name" and lexeme.value in ("true", "false"):
            value = lexeme.value == "true"
            return self.constant("truth value", value, lexeme.start, lexeme.end)
        if lexeme.kind == "name" and lexeme.value not in _WORDS:
            return self.variable(lexeme)
        if lexeme.kind == "end":
            self.refuse(lexeme, "the condition ends where a value should follow")
        self.refuse(lexeme, f"unexpected {_shown(lexeme)} where a value should stand")

    def parenthesised(self, opened: Lexeme) -> _Node:
        self.deeper(opened)
        node = self.any()
        self.depth -= 1
        if not self.sees(")"):
            if self.sees(","):
                self.refuse(self.next, "a list stands after 'in' only, as in token_id in (1, 2)")
            self.refuse(opened, "this '(' is not closed")
        closed = self.take()
        return _Node(
            node.kind, node.binds, node.text, node.run, opened.start, closed.end,
            node.literal, node.name,
        )  # fmt: skip

    def constant(self, kind: Kind, value: Any, start: int, end: int) -> _Node:
        # a negative number is written with a minus, yet nothing binds tighter than it
        return _Node(kind, _ATOM, write(value), lambda values: value, start, end, (value,))

    def variable(self, lexeme: Lexeme) -> _Node:
        name = lexeme.value
        if name in PLANNED_NAMES:
            line = f"{name!r} (the logit lens) is planned; this version knows {', '.join(NAMES)}"
            raise NotSupported(
                caret(self.text, lexeme.start, lexeme.end, line), condition=self.text, name=name
            )
        if self.sees("("):
            self.refuse(lexeme, f"{name!r} cannot be called: a condition has no functions")
        if name not in NAMES:
            near = difflib.get_close_matches(name, [*NAMES, *_WORDS], n=1, cutoff=0.6)
            near = [_PYTHON_WORDS[name]] if name in _PYTHON_WORDS else near
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(NAMES)}"
            self.refuse(lexeme, f"unknown name {_short(name)!r}, {hint}")
        self.names.add(name)
        return _Node(
            NAMES[name], _ATOM, name, operator.itemgetter(name), lexeme.start, lexeme.end, name=name
        )

    def note_text(self, left: _Node, right: _Node) -> None:
        """Remember a literal text compared with `token`."""
        for one, two in ((left, right), (right, left)):
            if one.name == "token" and two.literal is not None:
                self.token_texts[two.literal[0]] = None


def _short(text: str) -> str:
    """At most 40 characters of it, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= 40 else f"{line[:39]}…"


def _shown(lexeme: Lexeme) -> str:
    if lexeme.kind == "text":
        return f"text {_short(write(lexeme.value))}"
    return repr(_short(str(lexeme.value)))


# --- the public part ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Condition:
    """A parsed condition; `str(condition)` is its canonical text.

    names: the variables it reads. token_texts: the texts it compares with `token`, in order, so
    that one no token of the vocabulary has can be warned about.
    """

    text: str
    names: frozenset[str] = field(compare=False)
    token_texts: tuple[str, ...] = field(compare=False)
    canonical: str = field(compare=False, repr=False)
    _run: Run = field(compare=False, repr=False)

    def holds(self, values: Values) -> bool:
        """Whether it holds for one token, given at least the variables in `names`.

        Raises `BadCondition` where it divides by zero.
        """
        return bool(self._run(values))

    def __str__(self) -> str:
        return self.canonical

    def __reduce__(self) -> tuple[Any, ...]:
        return (parse_condition, (self.text,))


def parse_condition(text: str) -> Condition:
    """Parse a condition, or raise `BadCondition` with a caret under the mistake.

    `NotSupported` is raised for the names of the logit lens, which are planned.

    >>> condition = parse_condition('token == " to" and norm > 30')
    >>> condition.holds({"token": " to", "norm": 31.5})
    True
    """
    if not isinstance(text, str):
        raise BadCondition(f"a condition is a text such as 'norm > 30', not {_short(repr(text))}")
    if len(text) > MAX_LENGTH:
        raise BadCondition(
            f"the condition has {len(text)} characters; at most {MAX_LENGTH} are allowed"
        )
    parser = _Parser(text)
    node = parser.condition()
    return Condition(text, frozenset(parser.names), tuple(parser.token_texts), node.text, node.run)
