"""A verdict is only as good as its ways to fail: each of them, one by one."""

from __future__ import annotations

import dataclasses

import pytest

from notebooks.harness.verdict import Control, Criterion, failures, table

EQUAL = Criterion("logits that differ", 0, "==", 0)
CAUGHT = Control("zeroed page", "pages", EQUAL.name, changed=512, value=37, caught=True)


@pytest.mark.parametrize(
    ("value", "comparison", "limit", "passes"),
    [
        (0, "==", 0, True),
        (1, "==", 0, False),
        (3, "!=", 4, True),
        (0.5, "<=", 0.5, True),
        (0.5, "<", 0.5, False),
        (0.5, ">=", 0.6, False),
        (7, ">", 6.5, True),
        (" Mary", "==", " Mary", True),
        (float("nan"), "<=", 1.0, False),
        (float("nan"), "!=", 1.0, False),
        (1.0, "<=", float("nan"), False),
    ],
)
def test_a_criterion_passes_exactly_when_its_comparison_holds(value, comparison, limit, passes):
    criterion = Criterion("figure", value, comparison, limit)

    assert criterion.passed is passes


def test_an_unknown_comparison_is_refused():
    with pytest.raises(ValueError, match="is none of"):
        Criterion("figure", 1, "~=", 1)


def test_a_claim_stands_when_every_criterion_holds_and_every_control_is_caught():
    assert failures([EQUAL], [CAUGHT]) == []


def test_one_criterion_that_does_not_hold_fails_the_verdict():
    wrong = dataclasses.replace(EQUAL, value=1)

    assert failures([EQUAL, wrong], [CAUGHT]) == ["criterion 'logits that differ': 1 is not == 0"]


def test_a_fault_that_bites_and_is_not_caught_fails_the_verdict():
    missed = dataclasses.replace(CAUGHT, value=0, caught=False)

    (line,) = failures([EQUAL], [CAUGHT, missed])

    assert "was not caught" in line and "512 elements" in line


def test_a_fault_that_does_not_bite_needs_another_of_its_group_that_does():
    blunt = dataclasses.replace(CAUGHT, name="eager, fp32", changed=0, value=0, caught=False)

    assert failures([EQUAL], [CAUGHT, blunt]) == []
    assert "no control of the group 'pages' bites" in failures([EQUAL], [blunt])[0]
    assert "'other'" in failures([EQUAL], [CAUGHT, dataclasses.replace(blunt, group="other")])[0]


def test_a_verdict_without_criteria_or_without_controls_fails():
    assert failures([], [CAUGHT]) == ["no criterion was judged"]
    assert "no control" in failures([EQUAL], [])[0]


def test_the_table_shows_every_criterion_and_control_with_its_outcome():
    blunt = dataclasses.replace(CAUGHT, name="eager", changed=0, caught=False)

    text = table([EQUAL, dataclasses.replace(EQUAL, name="other", value=2)], [CAUGHT, blunt])

    for part in ("logits that differ", "pass", "FAIL", "zeroed page", "caught", "does not bite"):
        assert part in text
