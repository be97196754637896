"""Directions from contrasting rows: arithmetic alone, in float64.

Decides how a direction follows from rows; where the rows come from is decided by `vectors`.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kernel_server.protocol.errors import BadArgument

_Floats: TypeAlias = npt.NDArray[np.float64]
METHODS = ("mean_difference", "pca")


def mean_difference(positive: npt.ArrayLike, negative: npt.ArrayLike) -> _Floats:
    """Mean of the positive rows minus mean of the negative ones: `[channels]`.

    positive, negative: `[prompts, channels]`. Source: Turner et al. 2023, "Steering language models
    with activation engineering"; Rimsky et al. 2023 for the mean over many pairs.
    """
    one, two = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    return np.asarray(one.mean(0) - two.mean(0), np.float64)


def paired_pca(positive: npt.ArrayLike, negative: npt.ArrayLike) -> tuple[_Floats, float]:
    """First component of the differences positive[i] − negative[i], and its share of their squares.

    positive, negative: `[prompts, channels]`, in pairs, two at least. The differences are not
    centred: what all pairs share is the direction sought. It is turned so that positive rows
    project higher, and is as long as the differences are along it on average, so that it compares
    with the mean difference. Source: Zou et al. 2023, "Representation engineering".
    """
    one, two = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    check_pairs(len(one), len(two))
    differences = one - two
    _, sizes, directions = np.linalg.svd(differences, full_matrices=False)
    total = float((sizes**2).sum())
    if total == 0:
        raise BadArgument("each pair of prompts has the same values, so there is no direction")
    first = directions[0]
    along = float((differences @ first).mean())
    return np.asarray(first * along, np.float64), float(sizes[0] ** 2 / total)


def check_pairs(num_positive: int, num_negative: int) -> None:
    """Raise BadArgument unless so many prompts make two pairs or more."""
    if num_positive != num_negative or num_positive < 2:
        raise BadArgument(
            f"pca takes pairs: {num_positive} positive and {num_negative} negative prompts; give"
            " two or more of each, in the same order, or use method='mean_difference'"
        )


def random_direction(like: npt.NDArray[Any], seed: int) -> npt.NDArray[np.float32]:
    """A direction drawn from all alike, with the norm of `like` `[channels]`: a control.

    The same seed gives the same direction.
    """
    drawn = np.random.default_rng(seed).standard_normal(len(like))
    norm = np.linalg.norm(np.asarray(like, np.float64))
    return (drawn * (norm / np.linalg.norm(drawn))).astype(np.float32)
