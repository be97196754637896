"""The condition language: what it accepts, what it means, and how it points at a mistake."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernel_server.protocol.conditions import (
    MAX_DEPTH,
    MAX_LENGTH,
    NAMES,
    parse_condition,
)
from kernel_server.protocol.errors import BadCondition

VALUES = {"token": " to", "token_id": 7, "position": 11, "forward": 0, "norm": 31.5, "hits": 2}


def holds(text: str, **changed: Any) -> bool:
    return parse_condition(text).holds(VALUES | changed)


def refusal(text: str) -> str:
    with pytest.raises(BadCondition) as caught:
        parse_condition(text)
    return str(caught.value)


# --- what it means ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('token == " to" and norm > 30', True),
        ("token == ' to' and norm > 32", False),
        ("token != 'a' or norm > 1e9", True),
        ("not token == ' to'", False),
        ("position % 2 == 1", True),
        ("token_id in (1, 7, -3)", True),
        ("token_id not in (1, 7,)", False),
        ("token in ('a', ' to')", True),
        ("-5 % 3 == 1", True),
        ("7 - 2 - 3 == 2", True),
        ("8 / 2 / 2 == 2", True),
        ("7 - (2 - 3) == 8", True),
        ("2 + 3 * 4 == 14", True),
        ("-norm < -31 and - -norm == norm", True),
        ("hits >= 2 and hits <= 2", True),
        ("true", True),
        ("true and not false", True),
        ("(norm > 3) == true", True),
        ("(norm > 3) != (forward > 3)", True),
        ("not norm > 99 and norm > 3", True),
        ("false and false or true", True),
        ("false and (false or true)", False),
        (".5 + 1. + 1e-1 > 1.55", True),
        (r"token == '\x20t\u006f'", True),
        ("norm\n  > 3", True),
    ],
)
def test_a_condition_means_what_it_says(text, expected):
    assert holds(text) is expected


def test_a_nan_compares_false_and_differs_from_itself():
    assert not holds("norm > 0 or norm <= 0 or norm == norm", norm=math.nan)
    assert holds("norm != norm", norm=math.nan)


def test_and_and_or_stop_at_the_side_that_decides():
    assert not holds("hits != 0 and 1 / hits > 0", hits=0)
    assert holds("hits == 0 or 1 / hits > 0", hits=0)
    assert not parse_condition("token_id == 1 and norm > 3").holds({"token_id": 2})


@pytest.mark.parametrize("text", ["1 / hits > 0", "norm % (hits * 2) == 0"])
def test_dividing_by_zero_is_said_and_pointed_at(text):
    condition = parse_condition(text)

    with pytest.raises(BadCondition, match="division by zero") as caught:
        condition.holds(VALUES | {"hits": 0})

    assert "^" in str(caught.value)


def test_a_condition_tells_its_names_and_the_texts_it_compares_with_the_token():
    condition = parse_condition(
        '(token == " a" or " b" != token or token in ("c", " a")) and hits > 1'
    )

    assert condition.names == {"token", "hits"}
    assert condition.token_texts == (" a", " b", "c")


def test_a_condition_prints_canonically_and_survives_copy_and_pickle():
    condition = parse_condition("((token=='a\\n')) and(norm >3 or (hits)<-(2))")

    assert str(condition) == 'token == "a\\n" and (norm > 3 or hits < -2)'
    assert str(copy.deepcopy(condition)) == str(condition)
    assert pickle.loads(pickle.dumps(condition)) == condition


def test_every_name_can_be_used():
    for name, kind in NAMES.items():
        text = {"text": f"{name} == 'a'", "number": f"{name} == 1", "truth value": name}[kind]

        assert parse_condition(text).names == {name}


# --- mistakes ---------------------------------------------------------------------------------


def test_an_unknown_name_is_pointed_at_with_a_suggestion():
    assert refusal("nrom > 30") == (
        "unknown name 'nrom', did you mean 'norm'?\n  nrom > 30\n  ^^^^"
    )


def test_the_caret_stands_under_the_mistake_after_wide_characters():
    lines = refusal("token == '中' and nrom > 3").splitlines()

    # the wide character takes two columns, so one more space leads to the name
    assert lines[2].index("^") == lines[1].index("nrom") + 1
    assert lines[2].count("^") == 4


def test_the_caret_points_into_the_right_line():
    lines = refusal("norm > 3 and\n  nrom < 4").splitlines()

    assert lines[1:] == ["    nrom < 4", "    ^^^^"]


def test_a_long_condition_is_shown_around_the_mistake():
    text = " and ".join(["norm > 30"] * 40) + " and nrom > 3" + " and norm > 30" * 40
    message, shown, carets = refusal(text).splitlines()

    assert len(shown) < 80
    assert shown[carets.index("^") :].startswith("nrom")
    assert "nrom" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("norm", "compare it with something"),
        ("'a'", "compare it with something"),
        ("norm and hits > 1", "each side of 'and' is a truth value"),
        ("not norm", "what follows 'not' is a truth value"),
        ("token > 3", "cannot compare a text with a number"),
        ("token == 3", "cannot compare a text with a number"),
        ("norm == 'a'", "cannot compare a number with a text"),
        ("token < 'b'", "'<' compares numbers"),
        ("true < false", "'<' compares numbers"),
        ("(norm > 3) > 2", "cannot compare a truth value with a number"),
        ("token + 'a' == 'ba'", "each side of '+' is a number"),
        ("1 + true > 1", "each side of '+' is a number"),
        ("-token == 'a'", "what follows '-' is a number"),
        ("1 < norm < 3", "not chained"),
        ("norm > 3 == true", "not chained"),
        ("norm > 3 in (1, 2)", "not chained"),
        ("norm in 3", "parentheses"),
        ("norm in (hits)", "literals only"),
        ("norm in ('a')", "a number is looked for"),
        ("norm in ()", "unexpected ')'"),
        ("norm in (1, 2", "not closed"),
        ("norm in (1 2)", "not closed"),
        ("norm > 3 'a'", 'unexpected text "a" after the end'),
        ("(norm > 3) in (true)", "looks for a text or a number"),
        ("norm not > 3", "unexpected 'not'"),
        ("(norm > 3", "not closed"),
        ("norm > 3)", "no '(' is open"),
        ("norm >", "ends where a value should follow"),
        ("> 3", "unexpected '>'"),
        ("norm = 3", "did you mean '=='?"),
        ("norm > 3 && hits > 1", "did you mean 'and'?"),
        ("!true", "did you mean 'not'?"),
        ("True", "did you mean 'true'?"),
        ("norm ** 2 > 3", "unexpected '**'"),
        ("norm // 2 > 3", "unexpected '//'"),
        ("norm > 3 hits", "after the end"),
        ("(norm, hits) == 1", "a list stands after 'in' only"),
        ("token == 'a", "not closed"),
        ("token == 'a\nb'", "a new line is written"),
        (r"token == '\q'", "unknown escape"),
        (r"token == '\xg0'", "unknown escape"),
        (r"token == '\ud800'", "unknown escape"),
        (r"token == '\U00110000'", "unknown escape"),
        ("9007199254740993 > norm", "at most 9007199254740992"),
        ("1" * 1500 + " > norm", "at most 9007199254740992"),
        ("1e999 > norm", "too large for a double"),
        ("0x10 > norm", "not a number"),
        ("10_000 > norm", "not a number"),
        ("٣ > norm", "digits 0 to 9"),
        ("norm > 3 ? 1 : 0", "unexpected character '?'"),
        ("norm > 3 # why", "unexpected character '#'"),
        ("norm > \x00", "unexpected character"),
    ],
)
def test_a_mistake_is_said_in_one_line_with_a_caret_below(text, said):
    first, shown, carets = refusal(text).split("\n")

    assert said in first
    assert shown.startswith("  ")
    assert set(carets) == {" ", "^"}


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "__import__('os').system('true')",
        "lambda: 1",
        "lambda x: x > 1",
        "token.upper() == 'A'",
        "token.__class__ == 'a'",
        "norm.real > 3",
        "[x for x in (1, 2)]",
        "any(x > 1 for x in (1, 2))",
        "{1: 2}[1] > 1",
        "token[0] == 'a'",
        "norm if true else hits",
        "norm := 3",
        "open('a')",
        "eval('1') == 1",
        "f'{norm}' == token",
        "norm > 3; import os",
        "yield norm",
        "await norm > 3",
        "*norm > 3",
        "@norm > 3",
        "`norm` > 3",
        "$norm > 3",
        "globals > 3",
    ],
)
def test_code_in_a_condition_is_refused_with_a_caret(text):
    assert "^" in refusal(text).splitlines()[2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('prob(" Mary") > 0.5', True),
        ('prob(" Mary") + prob(" John") == 0.875', True),
        ('cosine("joy") < -0.5 and prob( " John" ) < 0.5', True),
        ('top_token == " Mary" and not top_token_changed', True),
        ("top_token_changed or entropy > 2", False),
        ('top_token in (" John", " Mary")', True),
        ("num_nan > 0 or num_inf == 2", True),
        ("top_token != token", True),
    ],
)
def test_the_lens_and_named_vectors_are_read_by_name_and_text(text, expected):
    values = {
        ("prob", " Mary"): 0.75,
        ("prob", " John"): 0.125,
        ("cosine", "joy"): -0.7,
        "top_token": " Mary",
        "top_token_changed": False,
        "entropy": 1.5,
        "num_nan": 0,
        "num_inf": 2,
    }

    assert parse_condition(text).holds(VALUES | values) is expected


def test_a_condition_tells_which_texts_and_vectors_it_needs():
    condition = parse_condition(
        'prob(" a") > prob(" b") and (top_token == " c" or token in (" d", " e"))'
        ' and cosine("joy") > prob(" a")'
    )

    assert condition.prob_texts == (" a", " b")
    assert condition.vectors == ("joy",)
    assert condition.token_texts == (" c", " d", " e")
    assert condition.names == {"prob", "cosine", "top_token", "token"}
    assert str(parse_condition(str(condition))) == str(condition)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prob > 0.5", "'prob' is a function"),
        ('prob(" a", " b") > 0', "takes one text"),
        ("prob(token) > 0", "one text in quotes"),
        ("cosine(3) > 0", "one text in quotes"),
        ('prob("") > 0', "empty text"),
        ('cosine("joy" > 0', "not closed"),
        ('entropy("a") > 0', "'entropy' cannot be called"),
        ("top_token > 3", "cannot compare a text with a number"),
        ("top_token_changed == 1", "cannot compare a truth value with a number"),
        ("top_tokn == 'a'", "did you mean 'top_token'"),
    ],
)
def test_a_function_or_lens_name_used_wrongly_is_refused_with_a_caret(text, words):
    line = refusal(text)

    assert words in line
    assert "^" in line


@pytest.mark.parametrize("value", [None, 3, b"norm > 3", True])
def test_only_text_is_a_condition(value):
    with pytest.raises(BadCondition, match="a condition is a text"):
        parse_condition(value)


# --- bounds -----------------------------------------------------------------------------------


def test_a_condition_that_is_too_long_is_refused_by_its_length():
    with pytest.raises(BadCondition, match=f"{MAX_LENGTH + 1} characters"):
        parse_condition("norm > 3".ljust(MAX_LENGTH + 1))


@pytest.mark.parametrize(("left", "right"), [("(", ")"), ("not ", ""), ("not (", ")"), ("-(", ")")])
def test_nesting_is_bounded(left, right):
    inner = "1" if left == "-(" else "true"
    tail = " > 0" if left == "-(" else ""
    levels = MAX_DEPTH // len(left.replace(" ", "").replace("not", "n"))
    parse_condition(left * levels + inner + right * levels + tail).holds({})

    assert "nested deeper" in refusal(left * (levels + 1) + inner + right * (levels + 1) + tail)


@pytest.mark.parametrize("sign", ["+", "-", "*", "/", "%"])
def test_a_chain_as_long_as_a_condition_may_be_is_computed(sign):
    text = sign.join("1" * 990)

    assert isinstance(holds(f"{text} == 1"), bool)


@pytest.mark.parametrize("word", ["and", "or"])
def test_a_long_chain_of_truth_values_is_computed(word):
    assert holds(f" {word} ".join(["true"] * 220))


# --- random trees against an evaluator of their own -----------------------------------------------

Tree = tuple[Any, ...]
_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=4) | st.just(" to")
_integers = st.integers(0, 2**53)
_floats = st.floats(0, 1e300, allow_nan=False, allow_infinity=False)


def _numbers(depth: int) -> st.SearchStrategy[Tree]:
    leaf = st.one_of(
        st.tuples(st.just("number"), st.integers(0, 9) | _integers | _floats),
        st.tuples(st.just("name"), st.sampled_from(["position", "norm", "hits", "token_id"])),
    )
    if depth == 0:
        return leaf
    part = _numbers(depth - 1)
    binary = st.tuples(st.sampled_from("+-*/%"), part, part)
    return leaf | st.tuples(st.just("minus"), part) | binary


def _truths(depth: int) -> st.SearchStrategy[Tree]:
    numbers = _numbers(2)
    text_leaf = st.tuples(st.just("text"), _texts) | st.just(("name", "token"))
    number_leaf = st.tuples(st.just("number"), st.integers(0, 9) | _floats)
    leaf = st.one_of(
        st.tuples(st.just("truth"), st.booleans()),
        st.tuples(st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), numbers, numbers),
        st.tuples(st.sampled_from(["==", "!="]), text_leaf, text_leaf),
        st.tuples(
            st.sampled_from(["in", "not in"]),
            numbers,
            st.lists(number_leaf, min_size=1, max_size=3),
        ),
        st.tuples(
            st.sampled_from(["in", "not in"]),
            text_leaf,
            st.lists(st.tuples(st.just("text"), _texts), min_size=1, max_size=3),
        ),
    )
    if depth == 0:
        return leaf
    part = _truths(depth - 1)
    binary = st.tuples(st.sampled_from(["and", "or", "==", "!="]), part, part)
    return leaf | st.tuples(st.just("not"), part) | binary


def _printed(tree: Tree) -> str:
    """With every parenthesis, so that it says nothing of precedence."""
    match tree:
        case ("number", value):
            return repr(value)
        case ("text", value):
            return _quoted(value)
        case ("name", name):
            return name
        case ("truth", value):
            return "true" if value else "false"
        case ("minus", part):
            return f"(-{_printed(part)})"
        case ("not", part):
            return f"(not {_printed(part)})"
        case (sign, left, list() as items):
            return f"({_printed(left)} {sign} ({', '.join(map(_printed, items))}))"
        case (sign, left, right):
            return f"({_printed(left)} {sign} {_printed(right)})"
    raise AssertionError(tree)


def _quoted(value: str) -> str:
    return '"' + "".join(_escaped(char) for char in value) + '"'


def _escaped(char: str) -> str:
    return f"\\U{ord(char):08x}" if ord(char) > 126 or char in '\\"\n' or ord(char) < 32 else char


class _ZeroDivisor(Exception):
    pass


def _evaluated(tree: Tree) -> Any:
    """What the tree means, computed straight from the definition of each sign."""
    match tree:
        case ("number" | "text" | "truth", value):
            return value
        case ("name", name):
            return VALUES[name]
        case ("minus", part):
            return -_evaluated(part)
        case ("not", part):
            return not _evaluated(part)
        case ("and", left, right):
            return _evaluated(right) if _evaluated(left) else False
        case ("or", left, right):
            return True if _evaluated(left) else _evaluated(right)
        case ("in", left, list() as items):
            return any(_evaluated(left) == item[1] for item in items)
        case ("not in", left, list() as items):
            return all(_evaluated(left) != item[1] for item in items)
    sign, one, two = tree[0], _evaluated(tree[1]), _evaluated(tree[2])
    if sign in ("/", "%") and two == 0:
        raise _ZeroDivisor
    match sign:
        case "+":
            return float(one) + float(two)
        case "-":
            return float(one) - float(two)
        case "*":
            return float(one) * float(two)
        case "/":
            return float(one) / float(two)
        case "%":
            return float(one) % float(two)
        case "==":
            return one == two
        case "!=":
            return one != two
        case "<":
            return one < two
        case "<=":
            return one <= two
        case ">":
            return one > two
    return one >= two


@given(_truths(3))
def test_a_random_condition_means_what_its_tree_means(tree):
    condition = parse_condition(_printed(tree))
    again = parse_condition(str(condition))

    assert str(again) == str(condition)
    assert again.names == condition.names
    try:
        expected = _evaluated(tree)
    except _ZeroDivisor:
        for one in (condition, again):
            with pytest.raises(BadCondition, match="division by zero"):
                one.holds(VALUES)
        return
    assert condition.holds(VALUES) is expected
    assert again.holds(VALUES) is expected


# --- garbage ------------------------------------------------------------------------------------

_pieces = st.sampled_from(
    [*NAMES, "prob(' a')", "cosine(",
     "and", "or", "not", "in", "(", ")", ",", "==", "<", "-", "+", "*", "/", "%", "1",
     "2.5", "'a'", '"', "'", "\\", "true", "false", ".", "prob", "x", " ", "\n", "中", "1e9", "["]
)  # fmt: skip


@given(st.text(max_size=60) | st.lists(_pieces, max_size=25).map(" ".join))
def test_garbage_is_refused_with_a_typed_error_or_is_a_condition(text):
    try:
        condition = parse_condition(text)
    except BadCondition as error:
        assert error.message
        return

    assert str(parse_condition(str(condition))) == str(condition)
