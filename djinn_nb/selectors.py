"""What a user may write for tokens, channels and values, as the contract's plain data.

Only form is checked here (a mistake is told before anything is sent); whether a selector fits the
session is decided by the server, which knows its tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from djinn_nb.checks import shown
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.errors import BadArgument, BadEdit, BadSelector
from kernel_server.protocol.messages import ALL, Selector

PHASES = ("all", "prompt", "generated")


def selector(what: object, *, name: str = "tokens") -> Selector:
    """A selector from an integer, a slice, integers, or (tokens only) a phase or a token's text.

    `None` and `...` select all. Token numbers are absolute positions in the session; negative ones
    count from the end.

    >>> selector(-1).indices, selector(slice(3, 7)).kind, selector(" Mary").text
    ((-1,), 'slice', ' Mary')
    """
    if what is None or what is Ellipsis:
        return ALL
    if isinstance(what, Selector):
        return what
    if isinstance(what, str):
        return _text_selector(what, name)
    if isinstance(what, slice):
        return _slice_selector(what, name)
    what = plain_array(what)
    if isinstance(what, np.ndarray) and what.ndim > 1:
        raise BadSelector(f"{name}: expected a list of positions, not an array {list(what.shape)}")
    if _whole_number(what) is not None:
        return Selector(kind="indices", indices=_indices((what,), name))
    if not isinstance(what, Iterable):
        raise _not_a_selector(what, name)
    return Selector(kind="indices", indices=_indices(what, name))


def _text_selector(text: str, name: str) -> Selector:
    if text == "all":
        return ALL
    if name != "tokens":
        raise BadSelector(f"{name}: expected numbers or 'all', not the text {text!r}")
    if text == "prompt":
        return Selector(kind="prompt")
    if text == "generated":
        return Selector(kind="generated")
    if not text:
        raise BadSelector("tokens: an empty text selects nothing")
    return Selector(kind="text", text=text)


def _slice_selector(what: slice, name: str) -> Selector:
    bounds = []
    for bound in (what.start, what.stop, what.step):
        number = _whole_number(bound)
        if bound is not None and number is None:
            raise BadSelector(f"{name}: the bounds of a slice are integers, not {bound!r}")
        bounds.append(number)
    start, stop, step = bounds
    if step == 0:
        raise BadSelector(f"{name}: the step of a slice cannot be 0")
    # as in Python, bounds beyond any length mean its ends
    start, stop = (None if b is None else min(max(b, -(2**62)), 2**62) for b in (start, stop))
    return Selector(kind="slice", start=start, stop=stop, step=step)


def _indices(items: Iterable[Any], name: str) -> tuple[int, ...]:
    numbers = []
    for item in items:
        number = _whole_number(item)
        if number is None:
            raise _not_a_selector(item, name)
        numbers.append(number)
        if not -(2**62) <= number <= 2**62:
            raise BadSelector(f"{name}: {shown(number)} lies outside every tensor")
    if not numbers:
        raise BadSelector(f"{name}: an empty list selects nothing")
    return tuple(numbers)


def _whole_number(value: object) -> int | None:
    """The integer, or None: a bool is no position."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _not_a_selector(what: object, name: str) -> BadSelector:
    texts = ", 'prompt', 'generated', 'all' or a token's text" if name == "tokens" else " or 'all'"
    return BadSelector(
        f"{name}: expected an integer, a slice, a list of integers{texts}, not {str(what)[:60]!r}"
    )


def plain_array(value: object) -> Any:
    """A torch tensor (without importing torch) or one of our variables as numpy; others as is."""
    if isinstance(value, (np.ndarray, np.generic, Array)):
        return value
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        try:
            tensor = value.detach().cpu()
            if tensor.is_floating_point() and tensor.element_size() < 4:
                tensor = tensor.float()  # numpy has not all of these; float32 holds their values
            return tensor.numpy()
        except (TypeError, NotImplementedError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise BadArgument(f"this tensor cannot be read as numbers: {reason}") from None
    if hasattr(value, "numpy") and hasattr(value, "shape"):
        return value.numpy()
    return value


def value_array(value: object, *, name: str) -> Array:
    """The values of an edit as a float32 array: a number, a vector or `[tokens, channels]`.

    Raises `BadEdit` for what is not numbers; NaN and infinities are refused too.

    >>> value_array([1, 2.5], name="add")
    Array(float32, [2])
    """
    array = plain_array(value)
    if isinstance(array, Array):
        array = array.numpy()
    try:
        numbers: npt.NDArray[Any] = np.asarray(array)
    except ValueError:
        raise BadEdit(f"{name}: the rows of the value have different lengths") from None
    if numbers.dtype.kind not in "iuf":
        raise BadEdit(f"{name}: expected numbers, not {str(value)[:60]!r}")
    if numbers.ndim > 2:
        raise BadEdit(
            f"{name}: expected a number, a vector [channels] or [tokens, channels],"
            f" not shape {list(numbers.shape)}"
        )
    if not numbers.size:
        raise BadEdit(f"{name}: the value is empty (shape {list(numbers.shape)})")
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused below, by count
        numbers = numbers.astype(np.float32)
    if bad := int(numbers.size - np.isfinite(numbers).sum()):
        raise BadEdit(f"{name}: {bad} of {numbers.size} numbers are NaN or infinite in float32")
    return Array.from_numpy(numbers)


def number(value: object, *, name: str) -> float:
    """A finite float, or `BadEdit`."""
    array = value_array(value, name=name)
    if array.shape not in ((), (1,)):
        raise BadEdit(f"{name}: expected one number, not shape {list(array.shape)}")
    plain = plain_array(value)
    return float(np.asarray(plain).reshape(-1)[0])
