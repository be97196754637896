"""A magic's line is read as words and literals; nothing in it is run."""

from __future__ import annotations

import pytest

from djinn_nb.arguments import assignments, plain_words, split_words, value_of
from kernel_server.protocol.errors import BadArgument


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("20 --once", ["20", "--once"]),
        ("""20 --if 'token == " to" and norm'""", ["20", "--if", 'token == " to" and norm']),
        ('"it\'s" x', ["it's", "x"]),
        ("", []),
        ("  a   b ", ["a", "b"]),
        (r'"a\"b"', ['a"b']),
    ],
)  # fmt: skip
def test_words_are_split_as_a_shell_would(line, words):
    assert plain_words(line) == words


@pytest.mark.parametrize(
    ("line", "condition"),
    [
        ("""3 --once --if 'token == " to" and norm > 3'""", 'token == " to" and norm > 3'),
        ("""3 --if token == " to" and norm > 3 --once""", 'token == " to" and norm > 3'),
        ("""3 --if " to" == token --once""", '" to" == token'),
        ("3 --once --if norm > -3", "norm > -3"),
    ],
)
def test_a_text_after_a_flag_keeps_the_quotes_inside_it(line, condition):
    words = plain_words(line, texts=("--if",))

    assert words[words.index("--if") + 1] == condition
    assert sorted(words) == sorted(["3", "--once", "--if", condition])


def test_quotes_and_brackets_keep_a_value_together():
    assert split_words('tokens=" to the" channels=[1, (2, 3)] alpha=4') == [
        'tokens=" to the"',
        "channels=[1, (2, 3)]",
        "alpha=4",
    ]


@pytest.mark.parametrize("line", ['tokens=" Mary', "channels=[1, 2", "a='"])
def test_an_open_quote_or_bracket_is_told(line):
    with pytest.raises(BadArgument, match="not closed"):
        split_words(line)


def test_assignments_are_names_and_values():
    assert assignments("scale=0.9 tokens=-1") == {"scale": "0.9", "tokens": "-1"}
    for line in ("scale = 2", "scale", "=2", "1=2", "a=1 a=2", "scale="):
        with pytest.raises(BadArgument):
            assignments(line)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-1", -1),
        ("0.9", 0.9),
        ("'prompt'", "prompt"),
        ("prompt", "prompt"),
        ('" Mary"', " Mary"),
        ("[1, 2]", [1, 2]),
        ("3:7", slice(3, 7)),
        (":", slice(None)),
        ("-2:", slice(-2, None)),
        ("::-1", slice(None, None, -1)),
        ("True", True),
        ("vector", "the vector"),
    ],
)
def test_values_are_literals_slices_words_and_variables(text, value):
    assert value_of(text, {"vector": "the vector"}, words=("prompt",)) == value


@pytest.mark.parametrize(
    "text", ["vektor", "vector*2", "__import__('os')", "f(1)", "vector.T", "["]
)
def test_code_and_unknown_names_are_refused(text):
    with pytest.raises(BadArgument):
        value_of(text, {"vector": 1})
