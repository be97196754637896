"""Conditions on the lens, named vectors and NaN counts, against torch by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernel_server.engine.checks import evaluate_checks
from kernel_server.engine.lens_values import LensValues
from kernel_server.protocol.arrays import Array
from kernel_server.protocol.conditions import parse_condition
from kernel_server.state.instructions import Check, Lookup

torch.set_num_threads(1)
WIDTH, VOCABULARY = 6, 40
HEAD = torch.randn(WIDTH, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2


class FakeLens:
    """A head that counts its rows, in the place of a model's."""

    def __init__(self, chunks: list[Tensor], first_row: int = 0) -> None:
        self.rows = 0
        self.products = 0
        self.remembered: dict[int, LensValues] = {}
        self._here = LensValues(3, chunks, self.head, first_row=first_row)

    def head(self, rows: Tensor) -> Tensor:
        self.rows += rows.shape[0]
        self.products += 1
        return rows.float() @ HEAD

    def here(self) -> LensValues:
        return self._here

    def before(self, breakpoint_id: int) -> LensValues | None:
        return self.remembered.get(breakpoint_id)

    def vector(self, value: Array) -> Tensor:
        return torch.from_numpy(np.array(value.numpy()))


def check(text: str, **changed: Any) -> Check:
    parsed = parse_condition(text)
    ids = {text: (len(text), 7) for text in parsed.prob_texts}
    vectors = changed.pop("vectors", {})
    where = {"breakpoint_id": 1, "point": 3, "hits": 0} | changed
    lookup = Lookup(token_ids=ids, vectors=vectors)
    return Check(names=parsed.names, holds=parsed.holds, lookup=lookup, **where)


def judge(checks: list[Check], lens: FakeLens, chunks: list[Tensor], count: int) -> Any:
    return evaluate_checks(checks, chunks, range(count), "t{}".format, 10, 2, lens)  # type: ignore[arg-type]


def values(count: int, seed: int = 0) -> Tensor:
    return torch.randn(1, count, WIDTH, generator=torch.Generator().manual_seed(seed))


def by_hand(chunk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Top tokens, entropies and probabilities of `[1, tokens, width]`."""
    probabilities = (chunk[0] @ HEAD).softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum(-1)
    return probabilities.argmax(-1), entropy, probabilities


@pytest.mark.parametrize("count", [1, 5, 70, 150])
@pytest.mark.parametrize("chunk", [64, 13])
def test_the_lens_reads_what_softmax_and_head_give(count, chunk):
    whole = values(count)
    chunks = list(whole.split(chunk, 1))
    tops, entropy, probabilities = by_hand(whole)
    middle = float(entropy.median())
    some = int(tops[0])
    both = probabilities[:, 4] + probabilities[:, 7]
    limit = float(both.median())
    checks = [
        check(f"entropy > {middle!r}", breakpoint_id=1),
        check(f'top_token == "t{some}"', breakpoint_id=2),
        check(f'prob("four") >= {limit * 1.0001!r}', breakpoint_id=3),
    ]
    lens = FakeLens(chunks)
    held = judge(checks, lens, chunks, count)

    def at(found: Tensor) -> tuple[int, ...]:
        return tuple(10 + int(i) for i in found.nonzero())

    apart = (entropy - middle).abs() > 1e-5  # the median itself may round to either side
    assert set(held.get(1, ())) - {10 + int(i) for i in (~apart).nonzero()} == set(
        at((entropy > middle) & apart)
    )
    assert held.get(2, ()) == at(tops == some)
    assert held.get(3, ()) == at(both >= limit * 1.0001)
    assert lens.rows == count  # each row once for all three


def test_the_head_is_asked_for_the_tokens_that_are_left_only_and_64_at_a_time():
    chunks = [values(100)]
    lens = FakeLens(chunks)
    held = judge([check("position > 30 and entropy > 0")], lens, chunks, 100)

    assert held == {1: tuple(range(31, 110))}
    assert (lens.rows, lens.products) == (79, 2)


@pytest.mark.parametrize("count", [1, 9])
def test_the_head_is_left_alone_when_the_cheaper_names_decide(count):
    chunks = [values(count)]
    lens = FakeLens(chunks)
    judge([check("norm > 1e9 and prob('a') > 0"), check("num_nan > 0")], lens, chunks, count)

    assert lens.products == 0


def test_of_one_token_the_head_is_asked_once_for_all_conditions():
    chunks = [values(1)]
    lens = FakeLens(chunks)
    checks = [
        check("top_token == 'x' or entropy > 0", breakpoint_id=1),
        check("prob('a') >= 0 and prob('bcd') >= 0", breakpoint_id=2),
        check("not top_token_changed", breakpoint_id=3),
    ]

    assert judge(checks, lens, chunks, 1) == {1: (10,), 2: (10,), 3: (10,)}
    assert (lens.products, lens.rows) == (1, 1)


@pytest.mark.parametrize("count", [1, 40])
def test_a_top_token_has_changed_where_it_was_another_at_the_location_before(count):
    before, now = values(count, seed=3), values(count, seed=4)
    now[0, : count // 2] = before[0, : count // 2] * 1.5
    lens = FakeLens([now])
    changed = check("top_token_changed")

    assert judge([changed], lens, [now], count) == {}  # nothing came before
    lens.remembered[1] = LensValues(2, [before], lens.head)
    expected = (by_hand(before)[0] != by_hand(now)[0]).nonzero().flatten() + 10
    held = judge([changed], lens, [now], count)
    assert held.get(1, ()) == tuple(expected.tolist())
    assert len(expected) > 0


def test_at_the_logits_the_last_token_is_compared_with_its_own_row_before():
    before, logits = values(4, seed=5), torch.zeros(1, 1, VOCABULARY)
    top = int(by_hand(before)[0][3])
    lens = FakeLens([logits])
    lens.remembered[1] = LensValues(2, [before], lens.head)
    for winner, expected in [(top, {}), ((top + 1) % VOCABULARY, {1: (13,)})]:
        logits = torch.nn.functional.one_hot(torch.tensor([[winner]]), VOCABULARY).float()
        lens._here = LensValues(3, [logits], lambda rows: rows, first_row=3)

        assert judge([check("top_token_changed")], lens, [logits], 4) == expected


def test_a_row_with_a_nan_has_no_top_token_and_no_entropy():
    chunk = values(3)
    chunk[0, 1, 0] = math.nan
    checks = [
        check("entropy >= 0", breakpoint_id=1),
        check("top_token == ''", breakpoint_id=2),
        check("num_nan == 1", breakpoint_id=3),
    ]

    assert judge(checks, FakeLens([chunk]), [chunk], 3) == {1: (10, 12), 2: (11,), 3: (11,)}


@pytest.mark.parametrize("count", [1, 4])
def test_nan_and_infinity_are_counted_apart(count):
    chunk = values(count)
    chunk[0, 0, 1:3] = math.inf
    chunk[0, 0, 3] = math.nan
    checks = [
        check("num_inf == 2 and num_nan == 1", breakpoint_id=1),
        check("num_inf == 0 and num_nan == 0", breakpoint_id=2),
    ]
    held = judge(checks, FakeLens([chunk]), [chunk], count)

    assert held[1] == (10,)
    assert held.get(2, ()) == tuple(range(11, 10 + count))


def test_a_norm_that_overflows_is_no_infinity_of_the_tensor():
    chunk = torch.full((1, 2, WIDTH), 3e38)

    held = judge([check("norm > 1e38 and num_inf == 0")], FakeLens([chunk]), [chunk], 2)

    assert held == {1: (10, 11)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 7])
def test_a_cosine_is_that_of_the_vector_its_own_check_was_given(dtype, count):
    chunk = values(count).to(dtype)
    one, two = (Array.from_numpy(values(1, seed)[0, 0].numpy()) for seed in (8, 9))
    similar = [
        torch.cosine_similarity(chunk[0].float(), torch.from_numpy(np.array(v.numpy())), dim=-1)
        for v in (one, two)
    ]
    checks = [
        check('cosine("joy") > 0.1', breakpoint_id=1, vectors={"joy": one}),
        check('cosine("joy") > 0.1', breakpoint_id=2, vectors={"joy": two}),
    ]
    held = judge(checks, FakeLens([chunk]), [chunk], count)

    for number, found in enumerate(similar, 1):
        assert held.get(number, ()) == tuple(10 + int(i) for i in (found > 0.1).nonzero())


def test_a_zero_vector_has_no_cosine():
    chunk = torch.zeros(1, 2, WIDTH)
    vector = Array.from_numpy(np.ones(WIDTH, np.float32))
    checks = [check('cosine("joy") <= 1', vectors={"joy": vector})]

    assert judge(checks, FakeLens([chunk]), [chunk], 2) == {}


def test_a_check_may_be_about_some_rows():
    chunks = [values(6)]
    lens = FakeLens(chunks)
    checks = [check("entropy > 0", rows=(1, 4)), check("norm > 0", rows=(0,), breakpoint_id=2)]

    assert judge(checks, lens, chunks, 6) == {1: (11, 14), 2: (10,)}
    assert lens.rows == 2
