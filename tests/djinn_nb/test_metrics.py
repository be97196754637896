"""Metrics against the formulas written out, and what is no metric of what."""

from __future__ import annotations

import math

import numpy as np
import pytest

import djinn_nb as djinn
from djinn_nb import errors
from djinn_nb.metrics import (
    KL,
    LogitDifference,
    Metric,
    OnLogits,
    OnText,
    Probability,
    Rank,
    metrics_on,
)
from tests.djinn_nb.conftest import VOCABULARY

LOGITS = np.array([1.0, 3.0, 2.0, 3.0], np.float32)
WEIGHTS = np.exp(LOGITS.astype(np.float64))


def test_each_metric_is_its_formula() -> None:
    reference = np.array([0.5, 0.0, 1.0, -2.0], np.float32)
    shares = np.exp(reference.astype(np.float64))
    shares /= shares.sum()
    own = WEIGHTS / WEIGHTS.sum()

    assert LogitDifference(1, 0)(LOGITS) == 2.0
    assert Probability(2)(LOGITS) == pytest.approx(WEIGHTS[2] / WEIGHTS.sum(), rel=1e-12)
    assert KL(reference)(LOGITS) == pytest.approx((shares * np.log(shares / own)).sum(), rel=1e-12)
    assert KL(LOGITS)(LOGITS) == 0.0
    assert OnLogits(np.max)(LOGITS) == 3.0
    assert OnText(len, name="length")("four") == 4.0


def test_equal_logits_rank_by_token_id_as_greedy_draws_them() -> None:
    assert [Rank(token)(LOGITS) for token in range(4)] == [4, 1, 3, 2]
    assert int(np.argmax(LOGITS)) == 1


def test_banned_tokens_have_no_probability_and_an_infinite_divergence() -> None:
    banned = LOGITS.copy()
    banned[1] = -np.inf

    assert Probability(1)(banned) == 0.0
    assert Rank(1)(banned) == 4
    assert LogitDifference(1, 0)(banned) == -math.inf
    assert KL(LOGITS)(banned) == math.inf
    assert math.isfinite(KL(banned)(LOGITS))


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (np.full(4, np.nan, np.float32), "4 of 4 logits are NaN"),
        (np.zeros((2, 4), np.float32), r"not an array \[2, 4\]"),
        (np.arange(4), "logits of one token"),
        ("text", "logits of one token"),
        (np.full(4, -np.inf, np.float32), "no distribution"),
        (np.zeros(1, np.float32), "token id 2 lies outside the 1 logits"),
    ],
)
def test_what_is_no_row_of_logits_is_refused(logits: object, words: str) -> None:
    with pytest.raises(errors.BadArgument, match=words):
        Probability(2)(logits)


def test_a_text_is_looked_up_in_the_model_and_must_be_one_token(server: djinn.Server) -> None:
    mary = server.model.tokenizer.encode(" Mary", add_special_tokens=False)[0]
    logits = np.zeros(VOCABULARY, np.float32)
    logits[mary] = 5.0

    known = LogitDifference(" Mary", " John").on(server.model)
    assert known(logits) == 5.0
    assert known.name == "logit difference ' Mary' − ' John'"
    with pytest.raises(errors.BadArgument, match=r"not known yet: metric.on\(server.model\)"):
        LogitDifference(" Mary", " John")(logits)
    with pytest.raises(errors.BadArgument, match=r"is \d+ tokens of .* exactly one"):
        Probability(" Marylebone").on(server.model)
    with pytest.raises(errors.BadArgument, match="did you mean ' John'"):
        Probability("John").on(server.model)
    with pytest.raises(errors.BadArgument, match=f"0 to {VOCABULARY - 1}"):
        Rank(VOCABULARY).on(server.model)


def test_functions_and_lists_of_metrics_are_taken_and_others_refused(server: djinn.Server) -> None:
    def top(logits: np.ndarray) -> float:
        return float(logits.max())

    assert [one.name for one in metrics_on([Rank(1), top], server.model)] == ["rank 1", "top"]
    assert metrics_on(None, server.model) == []
    for wrong in (3, "rank", Rank):
        with pytest.raises(errors.BadArgument, match="a metric is one of"):
            metrics_on(wrong, server.model)
    with pytest.raises(errors.BadArgument, match="two metrics are called 'rank 1'"):
        metrics_on([Rank(1), Rank(1)], server.model)
    with pytest.raises(errors.BadArgument, match="no token"):
        Rank("")


def test_every_metric_says_its_name_and_unit() -> None:
    found: list[Metric] = [Rank(1), Probability(2), KL(LOGITS), LogitDifference(1, 2), OnText(len)]

    assert [one.unit for one in found] == ["rank", "probability", "nats", "logits", ""]
    assert repr(Rank(1)) == "Metric rank 1, in rank"
    assert len({one.name for one in found}) == 5
