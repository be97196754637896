"""Arrays as they cross the wire: dtype, shape and bytes, checked on the way in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from kernel_server.protocol.arrays import ITEM_BYTES, Array
from kernel_server.protocol.errors import BadMessage
from tests.protocol.instances import arrays

NUMPY_DTYPES = sorted(set(ITEM_BYTES) - {"bfloat16"})


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)])
def test_a_numpy_array_comes_back(dtype, shape):
    values = np.arange(6).astype(dtype)[: int(np.prod(shape))].reshape(shape)
    array = Array.from_numpy(values)

    assert (array.dtype, array.shape, array.nbytes) == (dtype, shape, values.nbytes)
    assert array.numpy().dtype == values.dtype
    assert np.array_equal(array.numpy(), values)


@given(arrays())
def test_any_bytes_of_the_right_size_are_an_array(array):
    assert array.numpy().shape == array.shape


def test_every_bfloat16_is_held_exactly():
    torch = pytest.importorskip("torch")
    bits = np.arange(65536, dtype=np.uint16)
    array = Array("bfloat16", (65536,), bits.tobytes())
    exact = torch.from_numpy(bits.astype(np.int32)).to(torch.int16).view(torch.bfloat16)

    assert array.numpy().dtype == np.float32
    assert array.numpy().tobytes() == exact.float().numpy().tobytes() or np.array_equal(
        array.numpy(), exact.float().numpy(), equal_nan=True
    )


def test_what_is_not_contiguous_or_not_little_endian_is_rewritten():
    values = np.arange(6, dtype=">f4").reshape(2, 3).T

    assert bytes(Array.from_numpy(values).data) == values.astype("<f4").tobytes()
    assert np.array_equal(Array.from_numpy(values).numpy(), values)


def test_a_contiguous_array_is_not_copied():
    values = np.zeros(10, dtype=np.float32)
    array = Array.from_numpy(values)
    values[3] = 5

    assert array.numpy()[3] == 5


def test_a_byte_that_is_neither_true_nor_false_is_true():
    assert Array("bool", (3,), b"\x00\x01\x7f").numpy().tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("dtype", "shape", "size", "said"),
    [
        ("float128", (1,), 16, "'float128' is not one of"),
        ("float32", (-1,), 4, "not a shape"),
        ("float32", (1,) * 9, 4, "not a shape"),
        ("float32", (2, 2), 15, r"shape \[2, 2\] float32 needs 16 bytes, 15 came"),
        ("float32", (0, 2**60), 0, "too large"),
    ],
)
def test_what_is_no_array_is_refused(dtype, shape, size, said):
    with pytest.raises(BadMessage, match=said):
        Array(dtype, shape, bytes(size))


@pytest.mark.parametrize("values", ["text", [object()], 1j, np.datetime64("2020")])
def test_values_that_are_not_numbers_do_not_cross(values):
    with pytest.raises(BadMessage, match="do not cross the wire"):
        Array.from_numpy(values)


def test_arrays_are_equal_by_what_they_hold():
    one = Array("uint8", (2,), b"ab")

    assert one == Array("uint8", (2,), memoryview(b"ab"))
    assert hash(one) == hash(Array("uint8", (2,), memoryview(b"ab")))
    assert one not in (Array("int8", (2,), b"ab"), Array("uint8", (1, 2), b"ab"), "ab")
    assert repr(one) == "Array(uint8, [2])"
