"""Rounds are taken by turns, compared one by one, and told with their spread."""

from __future__ import annotations

import pytest

from notebooks.harness import rounds


def test_every_one_comes_once_a_round_and_first_as_often_as_the_others():
    orders = list(rounds.by_turns(["a", "b", "c"], 6))

    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert sorted(order[0] for order in orders) == ["a", "a", "b", "b", "c", "c"]


def test_a_ratio_is_that_of_one_round():
    # the machine is twice as slow in the second one: nothing of it is in the ratios
    assert rounds.ratios([11.0, 22.0], [10.0, 20.0]) == pytest.approx([1.1, 1.1])
    with pytest.raises(ValueError, match="zip"):
        rounds.ratios([1.0], [1.0, 2.0])


def test_the_spread_leaves_a_tenth_out_at_each_end():
    assert rounds.told([float(i) for i in range(11)]) == "5 [1 .. 9]"
    assert rounds.told([2.0]) == "2"


def test_a_visit_is_compared_with_the_base_before_and_after_it():
    # the machine grows slower all the time, by as much from one visit to the next
    visits = [(0, 1.0), (1, 1.1), (0, 1.2), (16, 2.6), (0, 1.4)]

    found = rounds.beside_base(visits, base=0)

    assert [what for what, _ in found] == [1, 16]
    assert [ratio for _, ratio in found] == pytest.approx([1.0, 2.0])
