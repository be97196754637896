"""Which token comes next, from one row of logits. Depends on (logits, settings, seed, position).

Greedy takes the largest logit and, of equal ones, the lowest token id, as `torch.argmax` does and
with it stock `generate`. Otherwise one number is drawn from Philox keyed by (seed, position), a
counter-based generator that is independent of torch's and of the device, and turned into a token on
the CPU in float64: equal logits and an equal seed give equal tokens on every device.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernel_server.mapped import to_host
from kernel_server.protocol.errors import BadArgument, SessionFailed
from kernel_server.state.instructions import Sampling

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]

_WORD = 2**64


def sample(logits: Tensor, sampling: Sampling) -> int:
    """Draw the next token from logits `[vocabulary]`.

    The nucleus of `top_p` is the smallest set of most probable tokens whose probabilities sum to
    at least `top_p`, never empty; of equally probable ones the lower id comes first.

    Raises `SessionFailed` when the logits hold NaN or plus infinity, or nothing above minus
    infinity; `BadArgument` for a temperature or `top_p` out of range.

    >>> sample(torch.tensor([0.0, 3.0, 3.0]),
    ...        Sampling(temperature=0.0, top_p=1.0, seed=0, position=7))
    1
    """
    if not (sampling.temperature >= 0 and math.isfinite(sampling.temperature)):
        raise BadArgument(f"temperature is {sampling.temperature}: choose 0 or more")
    if not 0 < sampling.top_p <= 1:
        raise BadArgument(f"top_p is {sampling.top_p}: choose more than 0 and at most 1")
    if sampling.temperature == 0:
        return _greedy(logits, sampling.position)
    row = to_host(logits.detach().float()).numpy().astype(np.float64)
    largest = float(row.max())
    if not math.isfinite(largest):
        raise _no_token(logits, sampling.position)
    # a tiny temperature sends all but the largest to minus infinity, which is what it means
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((row - largest) / sampling.temperature)
    ids, chosen = _nucleus(weights, sampling.top_p)
    return int(ids[_place(chosen, uniform(sampling.seed, sampling.position))])


def _greedy(logits: Tensor, position: int) -> int:
    row = logits.detach().float()
    largest = row.argmax()[None]
    # one wait for the device instead of two; float64 holds every token id and every float32
    told = torch.cat([largest.double(), row.gather(0, largest).double()])
    token, value = to_host(told).tolist()
    # argmax takes a NaN for the largest, so the one it chose tells of all
    if not math.isfinite(value):
        raise _no_token(logits, position)
    return int(token)


def _no_token(logits: Tensor, position: int) -> SessionFailed:
    num_nan = int(logits.isnan().sum())
    num_inf = int(logits.isinf().sum())
    return SessionFailed(
        f"no token can be drawn for position {position}: of {logits.numel()} logits {num_nan} are"
        f" NaN and {num_inf} infinite; look for the layer where the values leave the range of"
        " the dtype, or remove the edit that caused it",
        num_nan=num_nan,
        num_inf=num_inf,
    )


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), the same for the same seed and position on every machine."""
    key = np.array([seed % _WORD, position], dtype=np.uint64)
    word = int(np.random.Philox(key=key).random_raw())
    return (word >> 11) * 2.0**-53


def _nucleus(weights: _Floats, top_p: float) -> tuple[_Ints | range, _Floats]:
    """Ids of the nucleus, ascending, and their weights."""
    if top_p == 1:
        return range(weights.size), weights
    # values alone are sorted: sorting ids with them takes ten times as long on a large vocabulary
    falling = np.sort(weights)[::-1]
    sums = np.cumsum(falling)
    size = min(int(np.searchsorted(sums, top_p * sums[-1], side="left")) + 1, weights.size)
    least = falling[size - 1]
    inside = weights > least
    ties = np.flatnonzero(weights == least)
    inside[ties[: size - int(inside.sum())]] = True
    ids = np.flatnonzero(inside)
    return ids, weights[ids]


def _place(weights: _Floats, number: float) -> int:
    """Where `number` of the way through the weights falls (the inverse of their sum)."""
    sums = np.cumsum(weights)
    place = int(np.searchsorted(sums, number * sums[-1], side="right"))
    # the product may round up to the sum itself; the last token with any weight is meant then
    return min(place, int(np.searchsorted(sums, sums[-1], side="left")))
