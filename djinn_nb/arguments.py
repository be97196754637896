"""The words of a magic's line: split, and turned into values. Nothing is evaluated as code.

A value is a Python literal, a slice such as `3:7`, or the name of a variable of the notebook.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from kernel_server.protocol.errors import BadArgument

_SLICE = re.compile(r"^(-?\d*):(-?\d*)(?::(-?\d+))?$")
_OPEN, _CLOSE = "([{", ")]}"


def split_words(line: str) -> list[str]:
    """Split at spaces that are outside quotes and brackets; quotes stay, a comment goes.

    >>> split_words('add=vec tokens=" Mary" channels=[1, 2]  # as in Python')
    ['add=vec', 'tokens=" Mary"', 'channels=[1, 2]']
    """
    words: list[str] = []
    word, quote, depth, escaped = "", "", 0, False
    for character in line:
        if quote:
            word += character
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == quote:
                quote = ""
            continue
        if character.isspace() and depth == 0:
            if word:
                words.append(word)
            word = ""
            continue
        if character == "#" and not word:
            break  # IPython hands over the whole line
        if character in "'\"":
            quote = character
        depth += (character in _OPEN) - (character in _CLOSE)
        word += character
    if quote or depth > 0:
        raise BadArgument(f"a {'quote' if quote else 'bracket'} is not closed in: {line.strip()}")
    return [*words, word] if word else words


def plain_words(line: str, texts: tuple[str, ...] = ()) -> list[str]:
    """The words with the quotes around whole words taken off, as a shell would.

    texts: flags that take the words up to the next flag as one text; quotes inside it stay, so
    that it may be written with quotes around it or without.

    >>> plain_words('''20 --if 'token == " to" and norm > 30' ''')
    ['20', '--if', 'token == " to" and norm > 30']
    >>> plain_words('''20 --if token == " to" --once''', texts=("--if",))
    ['20', '--if', 'token == " to"', '--once']
    """
    words: list[str] = []
    text: list[str] | None = None
    for word in split_words(line):
        if text is not None and not word.startswith("--"):
            text.append(word)
            continue
        if text:
            words.append(_as_one(text))
        text = [] if word in texts else None
        words.append(unquoted(word))
    return [*words, _as_one(text)] if text else words


def _as_one(words: list[str]) -> str:
    return unquoted(words[0]) if len(words) == 1 else " ".join(words)


def unquoted(word: str) -> str:
    """The text inside the quotes around `word`, or the word."""
    if len(word) >= 2 and word[0] == word[-1] and word[0] in "'\"":
        try:
            return str(ast.literal_eval(word))
        except (ValueError, SyntaxError):
            return word[1:-1]
    return word


def assignments(line: str) -> dict[str, str]:
    """The words `name=value` of a line, each name once."""
    found: dict[str, str] = {}
    for word in split_words(line):
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier() or not value:
            raise BadArgument(f"expected name=value, not {word!r} (no spaces around the =)")
        if name in found:
            raise BadArgument(f"{name} is given twice")
        found[name] = value
    return found


def value_of(text: str, names: Mapping[str, Any], *, words: tuple[str, ...] = ()) -> Any:
    """The value that `text` stands for: a literal, a slice, one of `words`, or a variable.

    >>> value_of("0.9", {}), value_of("3:7", {}), value_of("prompt", {}, words=("prompt",))
    (0.9, slice(3, 7, None), 'prompt')
    """
    if text in words:
        return text
    if found := _SLICE.match(text):
        start, stop, step = (int(g) if g else None for g in found.groups())
        return slice(start, stop, step)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    if text in names:
        return names[text]
    if text.isidentifier():
        raise BadArgument(f"there is no variable {text!r} in this notebook")
    raise BadArgument(
        f"{text!r} is neither a literal nor the name of a variable: assign it to one first"
    )
