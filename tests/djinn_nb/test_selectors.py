"""Tokens, channels and values as users write them become plain data, or a typed refusal."""

from __future__ import annotations

import numpy as np
import pytest

from djinn_nb.selectors import number, selector, value_array
from kernel_server.protocol.errors import BadEdit, BadSelector
from kernel_server.protocol.messages import ALL, Selector


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (None, ALL),
        (..., ALL),
        ("all", ALL),
        ("prompt", Selector(kind="prompt")),
        ("generated", Selector(kind="generated")),
        (" Mary", Selector(kind="text", text=" Mary")),
        (-1, Selector(kind="indices", indices=(-1,))),
        (np.int32(3), Selector(kind="indices", indices=(3,))),
        ([1, -2], Selector(kind="indices", indices=(1, -2))),
        (np.array([4, 5]), Selector(kind="indices", indices=(4, 5))),
        (range(2, 4), Selector(kind="indices", indices=(2, 3))),
        (slice(3, 7), Selector(kind="slice", start=3, stop=7)),
        (slice(None, None, -2), Selector(kind="slice", step=-2)),
        (Selector(kind="prompt"), Selector(kind="prompt")),
    ],
    ids=str,
)
def test_every_way_to_name_tokens_is_understood(written, expected):
    assert selector(written) == expected


def test_a_torch_tensor_of_positions_selects_them():
    import torch

    assert selector(torch.tensor([1, 2])).indices == (1, 2)


@pytest.mark.parametrize(
    "written", [1.5, True, [], [1.5], [True], "", {}, [[1, 2]], np.ones((2, 2), int), object()]
)
def test_what_is_no_selector_is_refused(written):
    with pytest.raises(BadSelector):
        selector(written)


def test_channels_take_numbers_only():
    assert selector("all", name="channels") == ALL
    with pytest.raises(BadSelector, match="channels"):
        selector("prompt", name="channels")


def test_a_slice_by_zero_is_refused():
    with pytest.raises(BadSelector, match="step"):
        selector(slice(0, 4, 0))


def test_values_become_float32():
    import torch

    for written in ([1, 2], (1.0, 2.0), np.array([1, 2], np.int8), torch.tensor([1.0, 2.0])):
        array = value_array(written, name="add")

        assert array.dtype == "float32"
        np.testing.assert_array_equal(array.numpy(), [1, 2])


def test_bfloat16_values_arrive_exactly():
    import torch

    values = torch.randn(64, dtype=torch.bfloat16)

    np.testing.assert_array_equal(value_array(values, name="set").numpy(), values.float().numpy())


@pytest.mark.parametrize(
    "written",
    ["x", None, [float("nan")], [1e39], [], [[1], [1, 2]], np.ones((1, 1, 1)), [1j], [True, False]],
    ids=str,
)
def test_values_that_are_not_finite_numbers_are_refused(written):
    with pytest.raises(BadEdit, match="add"):
        value_array(written, name="add")


def test_a_factor_keeps_its_double_precision():
    assert number(0.9, name="scale") == 0.9
    assert number(np.array([2]), name="scale") == 2.0
    with pytest.raises(BadEdit):
        number([1, 2], name="scale")
