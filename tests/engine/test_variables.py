"""Figures of a tensor: the norms conditions see, which checks hold where, summaries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernel_server.engine.checks import evaluate_checks
from kernel_server.engine.variables import summarize, token_norms
from kernel_server.protocol.conditions import parse_condition
from kernel_server.protocol.errors import BadCondition
from kernel_server.state.instructions import Check

torch.set_num_threads(1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TEXTS = {5: " a", 6: " to", 7: " b"}


def check(text: str | None, *, hits: int = 0, breakpoint_id: int = 1) -> Check:
    parsed = parse_condition(text) if text is not None else None
    return Check(
        breakpoint_id=breakpoint_id,
        point=3,
        names=parsed.names if parsed else frozenset(),
        holds=parsed.holds if parsed else None,
        hits=hits,
    )


def rows_of_norm(*norms: float, width: int = 4) -> Tensor:
    """`[1, tokens, width]` whose rows have these L2 norms."""
    return torch.tensor(norms)[None, :, None] * torch.full((width,), width**-0.5)


def judge(checks: list[Check], chunks: list[Tensor], ids: list[int], **changed: Any) -> Any:
    where = {"first_token": 10, "forward": 2} | changed
    return evaluate_checks(
        checks, chunks, ids, TEXTS.__getitem__, where["first_token"], where["forward"]
    )


# --- norms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_computed_in_float32(dtype):
    chunks = [torch.randn(1, 5, 64).to(dtype), torch.randn(1, 2, 64).to(dtype)]
    exact = torch.cat(chunks, 1)[0].double().norm(dim=-1)

    assert token_norms(chunks) == pytest.approx(exact.tolist(), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_a_token_has_the_same_norm_alone_and_among_others(dtype):
    chunk = torch.randn(1, 33, 384).to(dtype)
    alone = [token_norms([chunk[:, row : row + 1]])[0] for row in range(33)]

    assert token_norms([chunk]) == alone
    assert token_norms(list(chunk.split(7, 1))) == alone


def test_the_norm_of_large_half_precision_values_does_not_overflow():
    chunk = torch.full((1, 1, 100), 6e4, dtype=torch.float16)

    assert token_norms([chunk])[0] == pytest.approx(6e5, rel=1e-2)


# --- checks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "positions"),
    [
        ('token == " to"', (11, 14)),
        ("token_id > 5", (11, 12, 14)),
        ("position >= 13", (13, 14)),
        ("position == 10 or position == 14", (10, 14)),
        ("forward == 2", (10, 11, 12, 13, 14)),
        ("forward == 1", ()),
        ("norm > 2.5", (12, 13, 14)),
        ('norm > 2.5 and token == " to"', (14,)),
        ("hits == 4 and norm < 2.5", (10, 11)),
    ],
)
def test_a_condition_is_judged_for_every_token_fed(text, positions):
    chunks = [rows_of_norm(1, 2), rows_of_norm(3, 4, 5)]
    held = judge([check(text, hits=4)], chunks, [5, 6, 7, 5, 6])

    assert held == ({1: positions} if positions else {})


@pytest.mark.parametrize(
    ("text", "holds"), [('token == " to" and norm > 30', True), ("norm > 40", False)]
)
def test_a_single_token_is_judged(text, holds):
    assert judge([check(text)], [rows_of_norm(35)], [6]) == ({1: (10,)} if holds else {})


def test_several_checks_answer_for_themselves_with_their_own_hits():
    checks = [
        check("hits == 0", breakpoint_id=4),
        check("hits == 0", hits=1, breakpoint_id=5),
        check(None, breakpoint_id=6),
        check("norm > 1.5", breakpoint_id=7),
    ]

    assert judge(checks, [rows_of_norm(1, 2)], [5, 5]) == {4: (10, 11), 6: (10, 11), 7: (11,)}


def test_at_the_logits_only_the_last_token_is_judged():
    checks = [check("position < 99", breakpoint_id=1), check(None, breakpoint_id=2)]
    by_text = [check('token == " b"', breakpoint_id=3)]

    assert judge(checks, [rows_of_norm(3)], [5, 6, 7]) == {1: (12,), 2: (12,)}
    assert judge(by_text, [rows_of_norm(3)], [5, 6, 7]) == {3: (12,)}


def test_a_nan_has_a_norm_that_compares_false():
    chunks = [torch.tensor([[[math.nan, 1.0], [3.0, 4.0]]])]

    assert judge([check("norm > 0 or norm <= 0")], chunks, [5, 5]) == {1: (11,)}
    assert judge([check("norm != norm")], chunks, [5, 5]) == {1: (10,)}


def test_the_tensor_is_not_looked_at_and_texts_are_not_asked_for_unless_a_condition_does():
    chunk = torch.zeros(1, 2, 4, device="meta")  # has no elements to look at
    checks = [check("position > 3 and forward == 2 and token_id != 9 and hits == 0")]

    # no text for token 1
    assert judge(checks, [chunk], [1, 1]) == {1: (10, 11)}


def test_a_tensor_without_elements_tells_when_it_is_looked_at():
    with pytest.raises(NotImplementedError):
        judge([check("norm > 3")], [torch.zeros(1, 2, 4, device="meta")], [5, 7])


def test_the_norm_is_not_computed_for_tokens_the_text_rules_out():
    chunk = torch.zeros(1, 2, 4, device="meta")  # has no elements to look at

    assert judge([check('token == " to" and norm > 3')], [chunk], [5, 7]) == {}


def test_a_division_by_zero_is_raised():
    with pytest.raises(BadCondition, match="division by zero"):
        judge([check("1 / hits > 0")], [rows_of_norm(1)], [5])


# --- summaries ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("axes", [2, 3])
def test_a_summary_has_the_figures_of_the_whole_tensor(dtype, axes):
    whole = torch.randn(7, 16).to(dtype)
    chunks = [part if axes == 2 else part[None] for part in whole.split([4, 3])]
    summary = summarize(chunks, "layers.3.output")

    exact = whole.double()
    assert summary.shape == (7, 16)
    assert f"torch.{summary.dtype}" == str(dtype)
    assert (summary.minimum, summary.maximum) == (float(exact.min()), float(exact.max()))
    assert summary.mean == pytest.approx(float(exact.mean()), abs=1e-6)
    assert summary.norm == pytest.approx(float(exact.norm()), rel=1e-6)
    assert (summary.num_nan, summary.num_inf) == (0, 0)
    rows = summary.per_token.numpy()
    assert rows[:, 0].tolist() == token_norms(chunks)
    assert rows[:, 1].tolist() == exact.abs().amax(-1).tolist()


def test_a_summary_counts_what_is_not_a_number_and_leaves_it_out_of_the_range():
    values = torch.tensor([[1.0, math.nan, 3.0], [math.inf, -2.0, math.nan], [0.0, 0.0, 0.0]])
    summary = summarize([values], "embedding")

    assert (summary.minimum, summary.maximum) == (-2.0, math.inf)
    assert (summary.num_nan, summary.num_inf) == (2, 1)
    assert summarize([values[::2]], "embedding").mean == pytest.approx(4 / 5)
    assert math.isnan(summary.norm)
    assert [math.isnan(norm) for norm in summary.per_token.numpy()[:, 0]] == [True, True, False]


def test_a_summary_of_nothing_but_nan_says_so():
    summary = summarize([torch.full((2, 2), math.nan)], "embedding")

    assert summary.num_nan == 4
    assert all(map(math.isnan, (summary.minimum, summary.maximum, summary.mean, summary.norm)))


def test_a_summary_of_no_rows_is_one():
    summary = summarize([torch.zeros(0, 8)], "embedding")

    assert summary.shape == (0, 8)
    assert math.isnan(summary.minimum)
    assert summary.norm == 0


def test_looking_leaves_the_tensor_as_it_was():
    values = torch.randn(1, 3, 4)
    kept = values.clone()
    summarize([values], "embedding")
    judge([check("norm > 0")], [values], [5, 6, 7])

    assert torch.equal(values, kept)
