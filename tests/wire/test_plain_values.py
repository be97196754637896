"""Only small shapes of plain values are encoded, and only they are decoded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rpyc.core import brine

from kernel_server.wire import plain
from kernel_server.wire.frames import BrokenFrame

_LEAVES = st.none() | st.integers(-(10**17), 10**17) | st.text(max_size=300) | st.binary()
_VALUES = st.recursive(
    _LEAVES, lambda items: st.lists(items, max_size=4).map(tuple), max_leaves=12
).filter(lambda value: _depth(value) < plain.MAX_DEPTH - 1)


def _depth(value: object) -> int:
    return 1 + max(map(_depth, value), default=0) if isinstance(value, tuple) else 0


@given(message=st.integers(0, 255), sequence=st.integers(0, 2**40), value=_VALUES)
def test_a_plain_value_comes_back_and_stock_brine_reads_the_same(
    message: int, sequence: int, value: object
) -> None:
    frame = b"".join(plain.dump(message, sequence, value))

    assert plain.is_plain(value)
    assert plain.load(memoryview(frame)) == (message, sequence, value)
    assert brine.load(frame[1:]) == (sequence, value)


@given(st.binary(max_size=200))
def test_noise_is_refused_and_never_raises_anything_else(noise: bytes) -> None:
    try:
        plain.load(memoryview(noise))
    except BrokenFrame:
        return


@given(value=_VALUES, cut=st.integers(1, 50))
def test_a_truncated_message_is_refused(value: object, cut: int) -> None:
    frame = b"".join(plain.dump(1, 2, value))

    with pytest.raises(BrokenFrame):
        plain.load(memoryview(frame[:-cut]))


@pytest.mark.parametrize(
    "value", [True, 1.5, [1], {"a": 1}, bytearray(b"x"), memoryview(b"x"), 10**30, (1,) * 5, object]
)
def test_anything_else_does_not_count_as_plain(value: object) -> None:
    assert not plain.is_plain(value)


def test_a_large_payload_is_not_copied_when_it_is_sent() -> None:
    payload = bytes(2**20)

    _, tail = plain.dump(1, 2, (7, (1, (payload,))))

    assert tail is payload
