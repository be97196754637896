"""From the text of a condition to closures: recursive descent, with a kind for every part.

Each mistake is refused with a caret under it. The language is described in `conditions`.
"""

from __future__ import annotations

import difflib
import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from kernel_server.protocol.condition_closures import (
    COMPARISONS,
    Operand,
    Run,
    Step,
    all_run,
    any_run,
    compare_run,
    product_run,
    sum_run,
    write,
)
from kernel_server.protocol.condition_lexemes import Lexeme, lexemes, refuse
from kernel_server.protocol.condition_names import CALLS, FUNCTIONS, NAMES, TOKEN_NAMES, Key, Kind

MAX_DEPTH = 50

_WORDS = ("and", "or", "not", "in", "true", "false")
_PYTHON_WORDS = {"True": "true", "False": "false", "AND": "and", "OR": "or", "NOT": "not"}


# --- tree -----------------------------------------------------------------------------------------

_OR, _AND, _NOT, _COMPARE, _SUM, _PRODUCT, _MINUS, _ATOM = range(8)


@dataclass(frozen=True, slots=True)
class Node:
    """Part of a condition: what it is, how tightly it binds, its canonical text, its closure."""

    kind: Kind
    binds: int
    text: str
    run: Run
    start: int
    end: int
    #: a literal's value, when it is one
    literal: tuple[Any] | None = None
    name: Key | None = None

    @property
    def operand(self) -> Operand:
        return self.name, self.literal, self.run

    def inside(self, binds: int) -> str:
        """Its text as an operand of something that binds as tightly as `binds`."""
        return self.text if self.binds >= binds else f"({self.text})"


# --- parser ---------------------------------------------------------------------------------------


class Parser:
    """Recursive descent, one method per strength of binding; chains are loops, not recursion."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lexemes = lexemes(text)
        self.at = 0
        self.depth = 0
        self.names: set[str] = set()
        self.token_texts: dict[str, None] = {}
        #: function -> the texts it is called with, in order
        self.calls: dict[str, dict[str, None]] = {name: {} for name in FUNCTIONS}

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

    def refuse(self, where: Lexeme | Node, line: str) -> NoReturn:
        refuse(self.text, where.start, where.end, line)

    def deeper(self, lexeme: Lexeme) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.refuse(lexeme, f"nested deeper than {MAX_DEPTH} levels")

    def need(self, node: Node, kind: Kind, what: str) -> None:
        if node.kind == kind:
            return
        here = short(self.text[node.start : node.end])
        hint = ""
        if kind == "truth value":
            compared = 'token == " to"' if node.kind == "text" else "norm > 30"
            hint = f"; compare it with something, as in {compared}"
        self.refuse(node, f"{what} a {kind}, and {here} is a {node.kind}{hint}")

    # parsing

    def condition(self) -> Node:
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

    def any(self) -> Node:
        return self.chain("or", _OR, self.all, any_run)

    def all(self) -> Node:
        return self.chain("and", _AND, self.negation, all_run)

    def chain(
        self, word: str, binds: int, part: Callable[[], Node], join: Callable[[list[Run]], Run]
    ) -> Node:
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
        return Node("truth value", binds, text, run, parts[0].start, parts[-1].end)

    def negation(self) -> Node:
        if not self.sees("not"):
            return self.comparison()
        word = self.take()
        self.deeper(word)
        node = self.negation()
        self.depth -= 1
        self.need(node, "truth value", "what follows 'not' is")
        inner = node.run
        return Node(
            "truth value",
            _NOT,
            f"not {node.inside(_NOT)}",
            lambda values: not inner(values),
            word.start,
            node.end,
        )

    def comparison(self) -> Node:
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
            node = Node("truth value", _COMPARE, text, run, left.start, right.end)
        else:
            return left
        if self.sees(*COMPARISONS, "in"):
            self.refuse(self.next, "comparisons are not chained; write a < b and b < c")
        return node

    def comparable(self, left: Node, sign: str, right: Node) -> None:
        both = Node("truth value", _COMPARE, "", left.run, left.start, right.end)
        if left.kind != right.kind:
            self.refuse(
                both,
                f"cannot compare a {left.kind} with a {right.kind}"
                f" ({short(self.text[left.start : left.end])} is a {left.kind})",
            )
        if left.kind != "number" and sign not in ("==", "!="):
            self.refuse(both, f"'{sign}' compares numbers; these are {left.kind}s (use == or !=)")

    def membership(self, left: Node) -> Node:
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
            return Node(
                "truth value", _COMPARE, text, lambda v: find(v) not in members, left.start, end
            )
        return Node("truth value", _COMPARE, text, lambda v: find(v) in members, left.start, end)

    def literals(self, left: Node) -> tuple[list[Any], int]:
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
            if left.name in TOKEN_NAMES:
                self.token_texts[item.literal[0]] = None
            items.append(item.literal[0])
            if self.sees(","):
                self.take()
                if not self.sees(")"):
                    continue
            if not self.sees(")"):
                self.refuse(opened, "this '(' is not closed")
            return items, self.take().end

    def sum(self) -> Node:
        return self.arithmetic(("+", "-"), _SUM, self.product, sum_run)

    def product(self) -> Node:
        return self.arithmetic(("*", "/", "%"), _PRODUCT, self.unary, product_run)

    def arithmetic(
        self,
        signs: tuple[str, ...],
        binds: int,
        part: Callable[[], Node],
        join: Callable[[Run, list[Step]], Run],
    ) -> Node:
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
        return Node("number", binds, text, run, first.start, end)

    def unary(self) -> Node:
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
        return Node(
            "number",
            _MINUS,
            f"-{node.inside(_MINUS)}",
            lambda values: -inner(values),
            sign.start,
            node.end,
        )

    def atom(self) -> Node:
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

    def parenthesised(self, opened: Lexeme) -> Node:
        self.deeper(opened)
        node = self.any()
        self.depth -= 1
        if not self.sees(")"):
            if self.sees(","):
                self.refuse(self.next, "a list stands after 'in' only, as in token_id in (1, 2)")
            self.refuse(opened, "this '(' is not closed")
        closed = self.take()
        return Node(
            node.kind, node.binds, node.text, node.run, opened.start, closed.end,
            node.literal, node.name,
        )  # fmt: skip

    def constant(self, kind: Kind, value: Any, start: int, end: int) -> Node:
        # a negative number is written with a minus, yet nothing binds tighter than it
        return Node(kind, _ATOM, write(value), lambda values: value, start, end, (value,))

    def variable(self, lexeme: Lexeme) -> Node:
        name = lexeme.value
        if name in FUNCTIONS:
            return self.call(lexeme)
        if self.sees("("):
            functions = " and ".join(CALLS.values())
            self.refuse(lexeme, f"{name!r} cannot be called: the functions are {functions}")
        if name not in NAMES:
            known = [*NAMES, *FUNCTIONS]
            near = difflib.get_close_matches(name, [*known, *_WORDS], n=1, cutoff=0.6)
            near = [_PYTHON_WORDS[name]] if name in _PYTHON_WORDS else near
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            self.refuse(lexeme, f"unknown name {short(name)!r}, {hint}")
        self.names.add(name)
        return Node(
            NAMES[name], _ATOM, name, operator.itemgetter(name), lexeme.start, lexeme.end, name=name
        )

    def call(self, lexeme: Lexeme) -> Node:
        """A function and its one text; its value is asked for by both."""
        name = lexeme.value
        if not self.sees("("):
            self.refuse(lexeme, f"{name!r} is a function: write {CALLS[name]}")
        opened = self.take()
        text = self.take()
        if text.kind != "text":
            self.refuse(text, f"{name!r} takes one text in quotes, as in {CALLS[name]}")
        if not self.sees(")"):
            self.refuse(opened, f"this '(' is not closed: {name!r} takes one text")
        end = self.take().end
        if not text.value:
            self.refuse(text, f"{name!r} of an empty text; write {CALLS[name]}")
        self.names.add(name)
        self.calls[name][text.value] = None
        key = (name, text.value)
        shown = f"{name}({write(text.value)})"
        return Node(
            FUNCTIONS[name], _ATOM, shown, operator.itemgetter(key), lexeme.start, end, name=key
        )

    def note_text(self, left: Node, right: Node) -> None:
        """Remember a literal text compared with that of a token."""
        for one, two in ((left, right), (right, left)):
            if one.name in TOKEN_NAMES and two.literal is not None:
                self.token_texts[two.literal[0]] = None


def short(text: str) -> str:
    """At most 40 characters of it, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= 40 else f"{line[:39]}…"


def _shown(lexeme: Lexeme) -> str:
    if lexeme.kind == "text":
        return f"text {short(write(lexeme.value))}"
    return repr(short(str(lexeme.value)))
