"""Each kind of edit against the same arithmetic written out by hand in numpy."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_server.engine.edit_kinds import orthonormal
from kernel_server.engine.sampler import sample
from kernel_server.engine.tensor_edits import apply_edits
from kernel_server.protocol.errors import BadEdit
from kernel_server.state.instructions import Sampling
from tests.engine.edit_plans import DTYPES, FIRST, awkward, bits, chunks_of, plan

INF = math.inf


def rounded(values: Any, dtype: torch.dtype) -> list[Tensor]:
    """Numbers computed by hand, rounded once to the dtype, as one chunk."""
    return [torch.from_numpy(np.asarray(values, np.float32)).to(dtype)[None]]


def numbers(chunks: list[Tensor]) -> np.ndarray:
    """What the chunks hold, float32 [tokens, channels]."""
    return torch.cat(chunks, 1)[0].float().numpy()


# --- clamp ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("least", "most"), [(-0.3, 0.7), (None, 0.1), (0.1, None), (0.25, 0.25), (-9.0, 9.0)]
)
def test_clamp_keeps_numbers_between_its_bounds(dtype, least, most):
    before = chunks_of([3, 2], dtype=dtype)
    x = numbers(before)
    after, (result,) = apply_edits(before, [plan("clamp", minimum=least, maximum=most)], FIRST)

    low = -INF if least is None else np.float32(least)
    high = INF if most is None else np.float32(most)
    expected = rounded(np.where(x < low, low, np.where(x > high, high, x)), dtype)
    assert bits([torch.cat(after, 1)]) == bits(expected)
    assert result.elements_changed == int((numbers(after) != x).sum())


@pytest.mark.parametrize("dtype", DTYPES)
def test_clamp_leaves_nan_and_minus_zero_alone_and_brings_infinities_in(dtype):
    before = [awkward(dtype)]
    after, _ = apply_edits(before, [plan("clamp", minimum=0.0, maximum=3.0)], FIRST)

    kept = before[0].isnan() | (before[0] == 0)
    as_bits = {torch.float32: torch.int32}.get(dtype, torch.int16)
    assert torch.equal(after[0].view(as_bits)[kept], before[0].view(as_bits)[kept])
    assert after[0][before[0] == INF].tolist() == [3.0, 3.0]


# --- project_out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_project_out_takes_the_part_along_a_direction_away(dtype):
    before = chunks_of([3, 2], dtype=dtype)
    direction = np.array([1, -2, 0.5, 0, 3, 1], np.float32)
    after, _ = apply_edits(before, [plan("project_out", value=direction)], FIRST)

    x = numbers(before)
    unit = direction.astype(np.float64) / np.linalg.norm(direction.astype(np.float64))
    part = np.outer(x.astype(np.float64) @ unit, unit).astype(np.float32)
    assert bits([torch.cat(after, 1)]) == bits(rounded(x - part, dtype))


def test_project_out_of_several_directions_leaves_nothing_of_any():
    before = chunks_of([4])
    skew = [[1.0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 2, 0, 1]]
    after, (result,) = apply_edits(before, [plan("project_out", value=skew)], FIRST)

    np.testing.assert_allclose(numbers(after) @ np.array(skew).T, 0, atol=1e-6)
    np.testing.assert_array_equal(numbers(after)[:, [2, 4]][:, 0], numbers(before)[:, 2])
    assert result.note is None


def test_directions_that_depend_on_others_are_counted_and_do_no_harm():
    before = chunks_of([2])
    twice = [[1.0, 2, 0, 0, 0, 0], [3, 6, 0, 0, 0, 0]]
    after, (result,) = apply_edits(before, [plan("project_out", value=twice)], FIRST)
    alone, _ = apply_edits(before, [plan("project_out", value=twice[0])], FIRST)

    assert result.note == "of 2 directions only 1 are independent"
    assert bits(after) == bits(alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_zero_beside_a_direction_stays_minus_zero(dtype):
    before = [torch.tensor([[-0.0, -1.0, 2.0], [-0.0, 3.0, -0.0]]).to(dtype)[None]]
    after, (result,) = apply_edits(before, [plan("project_out", value=[0.0, 1.0, 0.0])], FIRST)

    assert bits([after[0][:, :, ::2].contiguous()]) == bits([before[0][:, :, ::2].contiguous()])
    assert result.elements_changed == 2


def test_a_basis_is_orthonormal_and_spans_the_directions():
    directions = np.random.default_rng(3).standard_normal((5, 9)) * np.array(
        [[1e30], [1], [1], [1e-30], [1]]
    )
    basis = orthonormal(directions)

    np.testing.assert_allclose(basis @ basis.T, np.eye(5), atol=1e-12)
    np.testing.assert_allclose((directions @ basis.T) @ basis, directions, rtol=1e-9)


# --- mean and swap --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_puts_the_mean_of_the_chosen_tokens_in_each_of_them(dtype):
    before = chunks_of([3, 1, 3], dtype=dtype)
    rows = (0, 2, 3, 6)
    after, (result,) = apply_edits(before, [plan("mean", rows=rows, channels=(1, 4))], FIRST)

    x = numbers(before)
    expected = x.copy()
    mean = x[list(rows)].astype(np.float64).mean(0).astype(np.float32)
    expected[np.ix_(rows, (1, 4))] = mean[[1, 4]]
    assert bits([torch.cat(after, 1)]) == bits(rounded(expected, dtype))
    assert result.positions == (100, 102, 103, 106)
    assert after[1] is not before[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_swap_moves_every_bit_across_chunks(dtype):
    before = [awkward(dtype), chunks_of([2], width=8, dtype=dtype)[0]]
    after, (result,) = apply_edits(before, [plan("swap", rows=(3, 0))], FIRST)

    old, new = bits([torch.cat(before, 1)])[0][0], bits([torch.cat(after, 1)])[0][0]
    assert [new[0], new[3]] == [old[3], old[0]]
    assert new[1:3] == old[1:3]
    assert result.positions == (100, 103)


def test_swap_of_some_channels_leaves_the_others():
    before = chunks_of([2])
    after, _ = apply_edits(before, [plan("swap", channels=(5, 0))], FIRST)

    x, y = numbers(before), numbers(after)
    np.testing.assert_array_equal(y[:, [0, 5]], x[::-1][:, [0, 5]])
    np.testing.assert_array_equal(y[:, 1:5], x[:, 1:5])


@pytest.mark.parametrize("rows", [None, (0,), (0, 1, 2), ()])
def test_swap_of_other_than_two_tokens_is_refused(rows):
    with pytest.raises(BadEdit, match="exactly two tokens, and"):
        apply_edits(chunks_of([3]), [plan("swap", rows=rows)], FIRST)


# --- the same bits however the prompt is cut ------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "edit",
    [
        plan("clamp", minimum=-0.2, maximum=0.2),
        plan("project_out", value=np.linspace(-1, 2, 6)),
        plan("project_out", value=np.eye(6)[[1, 4]] + 0.5),
        plan("mean", rows=(1, 2, 5, 6)),
        plan("mean"),
        plan("swap", rows=(6, 1)),
    ],
)
def test_chunks_change_no_bit(dtype, edit):
    whole = chunks_of([7], dtype=dtype)
    parts = list(whole[0].split([2, 4, 1], 1))

    in_one, (one,) = apply_edits(whole, [edit], FIRST)
    in_parts, (three,) = apply_edits(parts, [edit], FIRST)

    assert bits(in_one) == bits([torch.cat(in_parts, 1)])
    assert (one.elements_changed, one.positions) == (three.elements_changed, three.positions)
    assert one.elements_changed > 0


# --- identity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "edit",
    [
        plan("clamp", minimum=-1e9, maximum=1e9),
        plan("clamp", minimum=-2.0),
        plan("project_out", value=[0, 0, 0, 0, 0, 1.0]),
        plan("mean", rows=(0, 2)),
        plan("mean", rows=(1,)),
        plan("swap", rows=(0, 2)),
    ],
)
def test_an_edit_that_finds_things_as_it_wants_them_changes_no_bit(dtype, edit):
    row = torch.tensor([0.5, -0.0, 0.0, -1.5, 0.1, 0.0]).to(dtype)
    other = torch.tensor([1.0, 2.0, 0.3, -0.0, 1.0, -0.0]).to(dtype)
    before = [torch.stack([row, other])[None], row[None, None]]
    after, (result,) = apply_edits(before, [edit], FIRST)

    assert result.elements_changed == 0
    assert all(new is old for new, old in zip(after, before, strict=True))
    assert result.norm_before == result.norm_after


# --- the next token -------------------------------------------------------------------------------


def row_of(*logits: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.tensor(logits).to(dtype)[None, None]]


LOGITS = (1.0, 3.0, -2.0, 2.5, 0.0)
SAMPLERS = [(0.0, 1.0), (1.0, 1.0), (1.0, 0.9), (1e6, 1.0), (1e-6, 0.5), (1e30, 1.0)]


def drawn(logits: list[Tensor], temperature: float, top_p: float) -> set[int]:
    """The tokens of 200 draws."""
    settings = Sampling(temperature=temperature, top_p=top_p, seed=11, position=0)
    row = logits[0][0, 0]
    return {sample(row, dataclasses.replace(settings, position=i)) for i in range(200)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("temperature", "top_p"), SAMPLERS)
def test_a_forced_token_is_drawn_by_every_sampler(dtype, temperature, top_p):
    after, (result,) = apply_edits(
        row_of(*LOGITS, dtype=dtype), [plan("force", token_ids=(2,))], 0, first_row=13
    )

    assert drawn(after, temperature, top_p) == {2}
    assert after[0][0, 0].tolist() == [-INF, -INF, -2.0, -INF, -INF]
    assert result.positions == (13,)
    assert result.elements_changed == 4
    assert result.norm_after == 2.0  # of what is finite


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("temperature", "top_p"), SAMPLERS)
def test_banned_tokens_are_drawn_by_no_sampler(dtype, temperature, top_p):
    before = row_of(*LOGITS, dtype=dtype)
    after, (result,) = apply_edits(before, [plan("ban", token_ids=(1, 0, 4))], 0)

    assert drawn(after, temperature, top_p) <= {2, 3}
    assert after[0][0, 0].tolist() == [-INF, -INF, -2.0, 2.5, -INF]
    assert result.norm_before == pytest.approx(np.linalg.norm(LOGITS), rel=1e-6)
    assert result.norm_after == pytest.approx(np.linalg.norm([2, 2.5]), rel=1e-6)


@pytest.mark.parametrize(("temperature", "top_p"), SAMPLERS)
def test_a_replacement_is_drawn_where_the_other_would_have_been(temperature, top_p):
    before = row_of(*LOGITS)
    after, _ = apply_edits(before, [plan("replace", token_ids=(1, 2))], 0)

    assert after[0][0, 0].tolist() == [1.0, -INF, 3.0, 2.5, 0.0]
    assert drawn(after, temperature, top_p) <= {0, 2, 3, 4}
    lower, _ = apply_edits(before, [plan("replace", token_ids=(2, 1))], 0)
    assert lower[0][0, 0].tolist() == [1.0, 3.0, -INF, 2.5, 0.0]
    greedy = Sampling(temperature=0.0, top_p=1.0, seed=0, position=9)
    assert sample(before[0][0, 0], greedy) == 1
    assert sample(after[0][0, 0], greedy) == 2


def test_the_last_of_two_forces_holds_and_a_banned_token_can_be_forced():
    plans = [plan("force", token_ids=(4,)), plan("force", token_ids=(1,), edit_id=2)]
    after, _ = apply_edits(row_of(*LOGITS), plans, 0)

    assert drawn(after, 1.0, 1.0) == {1}
    assert after[0][0, 0, 1] == 0.0


def test_banning_what_is_banned_and_forcing_what_is_forced_change_no_bit():
    banned = row_of(1.0, -INF, 2.0)
    forced = row_of(-INF, -INF, 2.0)
    for before, edit in [
        (banned, plan("ban", token_ids=(1,))),
        (banned, plan("replace", token_ids=(1, 0))),
        (forced, plan("force", token_ids=(2,))),
    ]:
        after, (result,) = apply_edits(before, [edit], 0)

        assert result.elements_changed == 0
        assert after[0] is before[0]


@pytest.mark.parametrize(
    "edits",
    [
        [plan("ban", token_ids=(0, 1, 2))],
        [plan("ban", token_ids=(0, 1)), plan("ban", token_ids=(2,))],
        [plan("force", token_ids=(0,)), plan("ban", token_ids=(0,))],
    ],
)
def test_bans_that_leave_no_token_are_refused(edits):
    with pytest.raises(BadEdit, match="none of 3 tokens could be drawn"):
        apply_edits(row_of(1.0, 2.0, 3.0), edits, 0)


def test_what_is_banned_stays_so_under_arithmetic_and_arithmetic_may_not_bring_it_back():
    before = row_of(1.0, -INF, 2.0)
    scaled, _ = apply_edits(before, [plan("scale", factor=2.0)], 0)

    assert scaled[0][0, 0].tolist() == [2.0, -INF, 4.0]
    for edit in (plan("scale", factor=-1.0), plan("scale", factor=0.0)):
        with pytest.raises(BadEdit, match="1 elements would become infinite or NaN"):
            apply_edits(before, [edit], 0)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (plan("clamp", minimum=1e39), "minimum is 1e.39; choose a number between"),
        (plan("project_out"), "project_out needs a value"),
        (plan("project_out", value=np.zeros(6)), "every direction is zero"),
        (plan("project_out", value=1.0), r"shape \[\]; give a direction \[6\]"),
        (plan("project_out", value=np.ones((2, 5))), r"shape \[2, 5\]; give a direction \[6\]"),
        (plan("project_out", value=[1, 2, INF, 0, 0, 0]), "1 of 6 elements"),
        (plan("force"), "force names 0 tokens, it takes 1"),
        (plan("force", token_ids=(1, 2)), "force names 2 tokens"),
        (plan("ban"), "ban names 0 tokens, it takes one or more"),
        (plan("ban", token_ids=(6,)), "the logits are of 0 to 5"),
        (plan("replace", token_ids=(1,)), "replace names 1 tokens, it takes 2"),
    ],
)
def test_a_kind_that_does_not_fit_is_refused_with_numbers(edit, said):
    with pytest.raises(BadEdit, match=said) as caught:
        apply_edits(chunks_of([3, 1]), [edit], FIRST)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["mean", "project_out"])
def test_one_nan_is_not_spread_over_others(kind):
    before = [torch.ones(1, 2, 3)]
    before[0][0, 0, 1] = math.nan
    edit = plan(kind, value=[1.0, 1, 1]) if kind == "project_out" else plan(kind)

    with pytest.raises(BadEdit, match="choose tokens without NaN and infinities"):
        apply_edits(before, [edit], FIRST)


def test_a_clamp_beyond_the_dtype_is_refused():
    with pytest.raises(BadEdit, match=r"6 elements would become infinite.*use smaller bounds"):
        apply_edits([torch.ones(1, 2, 3).half()], [plan("clamp", minimum=1e5)], FIRST)


# --- any edit at all ------------------------------------------------------------------------------

kinds = st.sampled_from(["scale", "add", "set", "zero", "clamp", "project_out", "mean", "swap"])


@settings(deadline=None)
@given(st.data())
def test_any_edit_made_twice_gives_the_same_bits_and_touches_what_it_chose(data):
    """An edit at a stop is computed from the unedited tensor, so this is what undo rests on."""
    dtype = data.draw(st.sampled_from(DTYPES))
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=3))
    before, total = chunks_of(sizes, width=4, dtype=dtype), sum(sizes)
    kept = bits(before)
    kind = data.draw(kinds)
    count = {"min_size": 2, "max_size": 2} if kind == "swap" else {"min_size": 1}
    rows = tuple(data.draw(st.lists(st.integers(0, total - 1), unique=True, **count)))
    channels = tuple(data.draw(st.lists(st.integers(0, 3), unique=True, min_size=1)))
    number = data.draw(st.floats(-100, 100, width=16))
    extra: dict[str, Any] = {
        "scale": {"factor": number},
        "add": {"value": number},
        "set": {"value": number},
        "clamp": {"minimum": number},
        "project_out": {"value": np.full(len(channels), abs(number) + 1)},
    }.get(kind, {})
    edit = plan(kind, rows=rows, channels=channels, **extra)

    once, (first,) = apply_edits(before, [edit], 0)
    again, (second,) = apply_edits(before, [edit], 0)

    assert bits(before) == kept
    assert bits(once) == bits(again) and first == second
    old, new = bits([torch.cat(before, 1)])[0][0], bits([torch.cat(once, 1)])[0][0]
    differs = {(r, c) for r in range(total) for c in range(4) if old[r][c] != new[r][c]}
    assert differs <= {(r, c) for r in rows for c in channels}
    assert len(differs) == first.elements_changed
    assert first.positions == tuple(sorted(rows))
