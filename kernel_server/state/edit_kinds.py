"""The kinds of edits: what each takes, and which numbers it accepts. Places and shapes come later.

A kind has a row in `KINDS`; whatever the row does not name is refused, so that no argument is
silently without effect. Which tokens and elements an edit may choose is decided in `edit_rules`,
what it computes is the engine's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kernel_server.protocol.errors import BadEdit, BadMessage
from kernel_server.protocol.messages import ALL, EditSpec


@dataclass(frozen=True, slots=True)
class Kind:
    """What one kind of edit takes, by names of `EditSpec`."""

    #: all of these
    needs: tuple[str, ...] = ()
    #: at least one of these
    needs_one_of: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    #: it says what the next token is, so its place is the logits
    of_next_token: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All that it takes."""
        return (*self.needs, *self.needs_one_of, *self.takes)


KINDS: dict[str, Kind] = {
    "scale": Kind(needs=("factor",)),
    "add": Kind(needs=("value",), takes=("alpha",)),
    "set": Kind(needs=("value",)),
    "zero": Kind(),
    "clamp": Kind(needs_one_of=("minimum", "maximum")),
    "project_out": Kind(needs=("value",)),
    "mean": Kind(),
    "swap": Kind(),
    "force": Kind(needs=("token_ids",), of_next_token=True),
    "ban": Kind(needs=("token_ids",), of_next_token=True),
    "replace": Kind(needs=("token_ids",), of_next_token=True),
}
_ARGUMENTS = ("factor", "alpha", "minimum", "maximum", "value", "token_ids")
_NUMBERS = ("factor", "alpha", "minimum", "maximum")
#: Kinds that look at several tokens of one forward, and what they do with them.
_OF_SEVERAL_TOKENS = {"mean": "takes the mean over tokens", "swap": "exchanges two tokens"}


def check_arguments(spec: EditSpec, vocab_size: int) -> None:
    """Raise `BadEdit` unless the edit has what its kind takes, and nothing else."""
    if spec.kind not in KINDS:
        raise BadEdit(f"edit kind {spec.kind!r} is not one of {', '.join(KINDS)}")
    _check_arrived(spec)
    _check_names(spec, KINDS[spec.kind])
    for name in _NUMBERS:
        number = getattr(spec, name)
        if number is not None and not math.isfinite(number):
            raise BadEdit(f"{name} is {number}: give a finite number")
    if spec.minimum is not None and spec.maximum is not None and spec.minimum > spec.maximum:
        raise BadEdit(f"clamp between {spec.minimum:g} and {spec.maximum:g} leaves no number")
    if spec.sticky and spec.kind in _OF_SEVERAL_TOKENS:
        raise BadEdit(
            f"{spec.kind} {_OF_SEVERAL_TOKENS[spec.kind]} of one forward, and a decode feeds one"
            " token: make it without sticky"
        )
    if spec.value is not None:
        _check_value(spec)
    if KINDS[spec.kind].of_next_token:
        _check_tokens(spec, vocab_size)


def given(spec: EditSpec, name: str) -> bool:
    """Whether an argument differs from what it is when nobody names it."""
    value = getattr(spec, name)
    return bool(value != 1.0 if name == "alpha" else value not in (None, ()))


def _check_arrived(spec: EditSpec) -> None:
    """Texts, uploads, named vectors and patches are numbers by the time an edit is judged."""
    missing = None
    if spec.upload_id is not None:
        missing = f"upload {spec.upload_id!r} of the edit's value has not arrived"
    elif spec.value is None and spec.vector is not None:
        missing = f"vector {spec.vector!r} has not been looked up"
    elif spec.value is None and spec.source is not None:
        missing = f"the value at the stop of session {spec.source.session_id} has not been read"
    elif spec.token_texts and not spec.token_ids:
        missing = f"the token {spec.token_texts[0]!r} has not been looked up"
    if missing:
        raise BadEdit(missing)


def _check_names(spec: EditSpec, kind: Kind) -> None:
    for name in _ARGUMENTS:
        word = _word(name)
        if given(spec, name) and name not in kind.names:
            takers = [k for k, row in KINDS.items() if name in row.names]
            verb = "does" if len(takers) == 1 else "do"
            raise BadEdit(f"{spec.kind} takes no {word}, {_listed(takers)} {verb}")
        if name in kind.needs and not given(spec, name):
            raise BadEdit(f"{spec.kind} needs {'tokens' if name == 'token_ids' else f'a {word}'}")
    if kind.needs_one_of and not any(given(spec, name) for name in kind.needs_one_of):
        raise BadEdit(f"{spec.kind} needs a {' or a '.join(kind.needs_one_of)}")


def _word(name: str) -> str:
    return "tokens to draw" if name == "token_ids" else name


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _check_value(spec: EditSpec) -> None:
    assert spec.value is not None
    try:
        values = spec.value.numpy()
    except (BadMessage, ValueError, TypeError) as error:
        raise BadEdit(f"the edit's value cannot be read: {error}") from None
    if values.ndim > 2 or values.size == 0:
        raise BadEdit(
            f"the value has shape {list(values.shape)}: give a scalar, a vector [channels] or"
            " [tokens, channels]"
        )
    if bad := int(values.size - np.count_nonzero(np.isfinite(values))):
        raise BadEdit(f"{bad} of {values.size} elements of the value are NaN or infinite")
    if spec.kind == "project_out":
        _check_directions(values)


def _check_directions(values: npt.NDArray[Any]) -> None:
    if not values.ndim:
        raise BadEdit("project_out takes a direction [channels] or several, not one number")
    with np.errstate(over="ignore", under="ignore"):  # what overflows is the engine's to refuse
        directions = np.atleast_2d(values).astype(np.float32)
    zero = np.flatnonzero(~directions.any(axis=1))
    if len(zero):
        which = (
            f"direction {zero[0]} of {len(directions)}" if len(directions) > 1 else "the direction"
        )
        raise BadEdit(f"{which} is zero everywhere, so there is nothing to project out")


def _check_tokens(spec: EditSpec, vocab_size: int) -> None:
    ids = spec.token_ids
    outside = [i for i in ids if not 0 <= i < vocab_size]
    if outside:
        raise BadEdit(f"token id {outside[0]} lies outside the vocabulary (0 to {vocab_size - 1})")
    if spec.heads != ALL or spec.channels != ALL:
        raise BadEdit(f"{spec.kind} names its tokens itself: leave heads and channels out")
    if spec.kind == "force" and len(ids) != 1:
        raise BadEdit(f"force takes one token, {len(ids)} are named: a forward draws one")
    if spec.kind == "replace" and len(ids) != 2:
        raise BadEdit(
            f"replace takes two tokens, the one to be replaced and its replacement; {len(ids)} are"
            " named"
        )
    if spec.kind == "replace" and ids[0] == ids[1]:
        raise BadEdit(f"replace takes two different tokens, and both are {ids[0]}")
    if spec.kind == "ban" and len(set(ids)) == vocab_size:
        raise BadEdit(f"ban of all {vocab_size} tokens leaves none to be drawn: leave one")
