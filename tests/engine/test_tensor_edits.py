"""What an edit does to the bits of a tensor, what it reports, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernel_server.engine.tensor_edits import apply_edits
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.errors import BadEdit
from kernel_server.protocol.messages import EditSpec
from kernel_server.state.instructions import EditPlan
from tests.engine.edit_plans import BITS, DTYPES, FIRST, awkward, bits, chunks_of, plan

torch.set_num_threads(1)

# --- the formulas -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_kind_computes_in_float32_and_rounds_once(dtype):
    before = chunks_of([4], dtype=dtype)
    x, value = before[0][0].float(), torch.linspace(-1, 1, 6)

    for edit, expected in [
        (plan("scale", factor=0.9), x * 0.9),
        (plan("add", alpha=4.0, value=value), x + value * 4.0),
        (plan("set", value=value), value.expand(4, 6)),
        (plan("set", value=0.1), torch.full((4, 6), 0.1)),
        (plan("zero"), torch.zeros(4, 6)),
    ]:
        after, (result,) = apply_edits(before, [edit], FIRST)

        assert bits(after) == bits([expected.to(dtype)[None]])
        assert result.positions == (100, 101, 102, 103)
        assert result.norm_before == pytest.approx(float(x.norm()))
        assert result.norm_after == pytest.approx(float(after[0].float().norm()))
        assert result.elements_changed == int((after[0] != before[0]).sum())


def test_only_the_chosen_rows_and_channels_change_and_the_input_never_does():
    before = chunks_of([3, 3, 2])
    kept = bits(before)
    after, (result,) = apply_edits(before, [plan("zero", rows=(1, 4, 5), channels=(0, 2))], FIRST)

    assert bits(before) == kept
    assert after[2] is before[2]
    joined, changed = torch.cat(before, 1)[0], torch.cat(after, 1)[0]
    expected = joined.clone()
    expected[[[1], [4], [5]], [[0, 2]]] = 0
    assert torch.equal(changed, expected)
    assert result.positions == (101, 104, 105)
    assert result.elements_changed == 6
    assert result.norm_after == 0
    assert result.norm_before == pytest.approx(float(joined[[1, 4, 5]][:, [0, 2]].norm()))


def test_a_matrix_gives_each_token_its_row_in_the_order_of_the_selection():
    before = chunks_of([2, 2], width=2)
    value = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    after, (result,) = apply_edits(before, [plan("set", rows=(3, 0, 2), value=value)], FIRST)

    joined = torch.cat(after, 1)[0]
    assert joined[[3, 0, 2]].tolist() == value
    assert torch.equal(joined[1], before[0][0, 1])
    assert result.positions == (100, 102, 103)


def test_a_matrix_over_all_tokens_follows_the_chunks():
    before = chunks_of([2, 3], width=2)
    value = np.arange(10.0).reshape(5, 2)
    after, _ = apply_edits(before, [plan("set", value=value)], FIRST)

    assert torch.cat(after, 1)[0].tolist() == value.tolist()


def test_channels_take_a_value_of_their_own_number_and_order():
    before = chunks_of([2], width=4)
    after, _ = apply_edits(before, [plan("set", channels=(3, 1), value=[5.0, 6.0])], FIRST)

    assert after[0][0, :, [3, 1]].tolist() == [[5.0, 6.0], [5.0, 6.0]]
    assert torch.equal(after[0][0, :, [0, 2]], before[0][0, :, [0, 2]])


def test_edits_apply_in_order_and_each_reports_its_own():
    before = [torch.ones(1, 1, 4)]
    after, results = apply_edits(
        before,
        [plan("add", value=1.0, edit_id=1), plan("scale", factor=3.0, edit_id=2)],
        FIRST,
    )

    assert after[0].tolist() == [[[6.0] * 4]]
    assert [(r.edit_id, r.norm_before, r.norm_after) for r in results] == [(1, 2, 4), (2, 4, 12)]


def test_the_same_edit_of_the_same_tensor_gives_the_same_bits_in_other_chunks():
    whole = chunks_of([7], dtype=torch.bfloat16)
    parts = list(whole[0].split([2, 4, 1], 1))
    edit = plan("add", alpha=0.3, value=np.linspace(-1, 1, 6), rows=(1, 2, 6))

    in_one, (one,) = apply_edits(whole, [edit], FIRST)
    in_parts, (three,) = apply_edits(parts, [edit], FIRST)

    assert bits(in_one) == bits([torch.cat(in_parts, 1)])
    assert one.elements_changed == three.elements_changed


def test_bfloat16_and_integer_values_are_taken_as_numbers():
    before = chunks_of([1], width=2)
    raw = Array("bfloat16", (2,), b"\x80\x3f\x00\xc0")  # 1, -2
    spec = EditSpec(kind="set", location="embedding", value=raw)
    edit = EditPlan(edit_id=1, point=0, spec=spec, rows=None, channels=None)

    assert apply_edits(before, [edit], 0)[0][0].tolist() == [[[1.0, -2.0]]]


# --- logits: the last row only -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "matched"), [(None, True), ((13,), True), ((0, 13), True), ((2,), False)]
)
def test_a_tensor_of_the_last_row_only_takes_edits_of_that_row(rows, matched):
    logits = [torch.ones(1, 1, 5)]
    after, (result,) = apply_edits(
        logits, [plan("zero", rows=rows, channels=(2,))], 0, first_row=13
    )

    assert result.positions == ((13,) if matched else ())
    assert result.elements_changed == int(matched)
    assert after[0][0, 0].tolist() == [1, 1, 0 if matched else 1, 1, 1]


def test_a_matrix_value_keeps_its_row_when_only_the_last_is_there():
    value = [[1.0, 1.0], [2.0, 2.0]]
    after, _ = apply_edits(
        [torch.zeros(1, 1, 2)], [plan("set", rows=(4, 9), value=value)], 0, first_row=9
    )

    assert after[0].tolist() == [[[2.0, 2.0]]]


# --- identity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "edit",
    [
        plan("scale", factor=1.0),
        plan("add", alpha=0.0, value=3.0),
        plan("add", alpha=2.0, value=0.0),
        plan("add", alpha=1.0, value=np.zeros((2, 8))),
        plan("scale", factor=1.0, rows=(1,), channels=(0, 4)),
        plan("add", alpha=0.0, value=[1.0, 2.0], rows=(0, 1), channels=(2, 3)),
    ],
)
def test_an_identity_edit_changes_no_bit(dtype, edit):
    before = [awkward(dtype)]
    after, (result,) = apply_edits(before, [edit], FIRST)

    assert result.elements_changed == 0
    assert after[0] is before[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_setting_what_is_there_changes_no_bit(dtype):
    before = chunks_of([3], dtype=dtype)
    before[0][0, 0, 0] = -0.0
    after, (result,) = apply_edits(before, [plan("set", value=before[0][0].float())], FIRST)

    assert result.elements_changed == 0
    assert after[0] is before[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_outside_the_selection_keep_every_bit(dtype):
    before = [awkward(dtype)]
    after, _ = apply_edits(before, [plan("set", value=2.0, rows=(0,), channels=(3,))], FIRST)

    assert bits(after)[0][0][1] == bits(before)[0][0][1]
    assert bits(after)[0][0][0][:3] == bits(before)[0][0][0][:3]
    assert bits(after)[0][0][0][4:] == bits(before)[0][0][0][4:]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_in_the_tensor_keeps_its_payload_under_scale_and_add(dtype):
    before = [awkward(dtype)[:, :, :3][:, :1]]
    for edit in (plan("scale", factor=2.0), plan("add", value=2.0)):
        after, (result,) = apply_edits(before, [edit], FIRST)

        assert bits(after) == bits(before)
        assert math.isnan(result.norm_before)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "edit"),
    [
        (torch.float16, plan("scale", factor=1e5)),
        (torch.float16, plan("set", value=65520.0)),
        (torch.float16, plan("add", value=1e6)),
        (torch.bfloat16, plan("set", value=3.4e38)),
        (torch.float32, plan("scale", factor=3e38)),
        (torch.float32, plan("add", alpha=1e30, value=1e30)),
    ],
)
def test_a_value_that_overflows_the_dtype_is_refused_with_numbers(dtype, edit):
    before = [torch.full((1, 2, 3), 2.0).to(dtype)]

    with pytest.raises(BadEdit, match=r"6 elements would become infinite or NaN in \w+, whose"):
        apply_edits(before, [edit], FIRST)


def test_an_infinity_times_zero_is_refused_and_zeroing_it_is_not():
    before = [torch.full((1, 1, 2), math.inf)]

    with pytest.raises(BadEdit, match="2 elements would become infinite or NaN"):
        apply_edits(before, [plan("scale", factor=0.0)], FIRST)
    assert apply_edits(before, [plan("zero")], FIRST)[0][0].tolist() == [[[0.0, 0.0]]]


def test_a_refused_edit_undoes_none_of_the_tensors_it_was_given():
    before = chunks_of([2, 2])
    kept = bits(before)

    with pytest.raises(BadEdit):
        apply_edits(before, [plan("zero"), plan("set", value=math.inf)], FIRST)

    assert bits(before) == kept


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (plan("scale"), "factor is None"),
        (plan("scale", factor=math.nan), "factor is nan"),
        (plan("scale", factor=1e39), "choose a number between"),
        (plan("add", value=1.0, alpha=math.inf), "alpha is inf"),
        (plan("add"), "add needs a value"),
        (plan("set"), "set needs a value"),
        (plan("set", value=math.nan), "1 of 1 elements"),
        (plan("set", value=[1, 2, math.inf, 0, 0, 0]), "1 of 6 elements"),
        (plan("set", value=[1.0, 2.0]), r"shape \[2\]; give one number, a vector \[6\]"),
        (plan("add", value=np.zeros((3, 6))), r"matrix \[4, 6\]"),
        (plan("add", value=np.zeros((2, 6)), rows=(0,)), r"matrix \[1, 6\]"),
        (plan("add", value=np.zeros(6), channels=(0, 1)), r"vector \[2\]"),
        (plan("zero", rows=(0, 4)), "this forward has rows 0 to 3"),
        (plan("zero", rows=(-1,)), "this forward has rows 0 to 3"),
        (plan("zero", rows=(1, 1)), "chosen twice"),
        (plan("zero", channels=(6,)), "the tensor has channels 0 to 5"),
        (plan("zero", channels=(2, 2)), "chosen twice"),
    ],
)
def test_an_edit_that_does_not_fit_is_refused_with_numbers(edit, said):
    with pytest.raises(BadEdit, match=said) as caught:
        apply_edits(chunks_of([3, 1]), [edit], FIRST)

    assert "\n" not in str(caught.value)


def test_an_edit_of_no_row_says_that_it_changed_nothing():
    before = chunks_of([2])
    after, (result,) = apply_edits(before, [plan("zero", rows=())], FIRST)

    assert after[0] is before[0]
    assert (result.positions, result.elements_changed, result.norm_before) == ((), 0, 0.0)


# --- any edit at all ---------------------------------------------------------------------------


@given(st.data())
def test_any_edit_changes_what_it_reports_and_nothing_else(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    before = chunks_of(sizes, width=4, dtype=dtype)
    total = sum(sizes)
    rows = data.draw(st.none() | st.lists(st.integers(0, total - 1), unique=True).map(tuple))
    channels = data.draw(st.none() | st.lists(st.integers(0, 3), unique=True).map(tuple))
    kind = data.draw(st.sampled_from(["scale", "add", "set", "zero"]))
    number = data.draw(st.floats(-100, 100, width=16))
    extra = {"scale": {"factor": number}, "zero": {}}.get(kind, {"value": number})
    after, (result,) = apply_edits(before, [plan(kind, rows=rows, channels=channels, **extra)], 0)

    old, new = torch.cat(before, 1)[0], torch.cat(after, 1)[0]
    differs = old.view(BITS[dtype]) != new.view(BITS[dtype])
    chosen = torch.zeros_like(differs)
    row_list = list(range(total) if rows is None else rows)
    for channel in range(4) if channels is None else channels:
        chosen[row_list, channel] = True
    assert not (differs & ~chosen).any()
    assert int(differs.sum()) == result.elements_changed
    assert result.positions == tuple(sorted(row_list))
    assert result.norm_before == pytest.approx(float(old[chosen].float().norm()), rel=1e-5)
    assert result.norm_after == pytest.approx(float(new[chosen].float().norm()), rel=1e-5)
