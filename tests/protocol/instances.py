"""Instances of every message, generated from its annotations."""

from __future__ import annotations

import math
import types
import typing
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin

from hypothesis import strategies as st

from kernel_server.protocol import messages
from kernel_server.protocol.arrays import ITEM_BYTES, Array
from kernel_server.protocol.codec import MAX_INT, MIN_INT
from kernel_server.protocol.messages import MESSAGES
from kernel_server.protocol.token_list import TokenList

_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_integers = st.integers(-3, 300) | st.integers(MIN_INT, MAX_INT)
_plain = st.recursive(
    st.none() | st.booleans() | _integers | st.floats() | _texts,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(_texts, part, max_size=3),
    max_leaves=6,
)
_token_ids = st.lists(st.integers(MIN_INT, 2**63 - 1), max_size=80)
_LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    str: _texts,
    int: _integers,
    float: st.floats(),
    bool: st.booleans(),
    TokenList: _token_ids.map(TokenList),
    Any: _plain,
}


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """An array of any dtype and small shape, with random bytes."""
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    size = math.prod(shape) * ITEM_BYTES[dtype]
    return Array(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


def _of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of one annotation."""
    origin, args = get_origin(kind), get_args(kind)
    if kind in _LEAVES:
        return _LEAVES[kind]
    if kind is Array:
        return arrays()
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (Union, types.UnionType):
        return st.one_of(*(st.none() if one is type(None) else _of(one) for one in args))
    if origin is tuple and args[1:] == (Ellipsis,):
        return st.lists(_of(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(_of, args))
    if origin is dict:
        return st.dictionaries(_of(args[0]), _plain, max_size=3)
    return instances(kind)


def instances(cls: type[Any]) -> st.SearchStrategy[Any]:
    """Instances of one message class with every field set."""
    hints = typing.get_type_hints(cls, vars(messages))
    made = {field.name: st.deferred(lambda h=hints[field.name]: _of(h)) for field in fields(cls)}
    return st.builds(cls, **made)


def any_message() -> st.SearchStrategy[Any]:
    """An instance of any message class."""
    return st.sampled_from(sorted(MESSAGES)).flatmap(lambda name: instances(MESSAGES[name]))


def same(one: Any, two: Any) -> bool:
    """Equal, with NaN equal to NaN and minus zero unequal to zero, down to the leaves."""
    if isinstance(one, float) and isinstance(two, float):
        both_nan = math.isnan(one) and math.isnan(two)
        return both_nan or (one == two and math.copysign(1, one) == math.copysign(1, two))
    if type(one) is not type(two):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if type(one).__name__ in MESSAGES:
        return all(same(getattr(one, f.name), getattr(two, f.name)) for f in fields(one))
    return bool(one == two)
